"""What a run survives: kills, signals, lost processes, full disks, odd numbers, long hours."""

import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from odc import distributed, settings
from odc.data.images import ImageSet
from odc.evaluation import knn
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import path as path_type
from tests.processes import fork_ranks, run_script, run_to_exit
from tests.runs import (
    SMALL, assert_one_sentence, assert_same_run, log_of, run_main, start, wait_for_step)

FREQUENT = ["--epochs", "3", "--checkpoint-interval", "1"]


def arguments_for(folder, output, *extra):
    return ["--data", folder, "--output", output, *SMALL, *FREQUENT, *extra]


def finish(folder, output, W, *extra):
    """Run to the end on W processes."""
    ranks = fork_ranks("train.py", *arguments_for(folder, output, *extra), processes=W)
    assert [rank.wait(600) for rank in ranks] == [0] * W


def workers_of(torchrun):
    """Process ids of the ranks that a torchrun process has started."""
    try:
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        return [int(pid) for pid in children
                if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    except FileNotFoundError:  # the run has come to its end meanwhile
        return []


@pytest.mark.slow
@pytest.mark.parametrize("W, kills", [(2, 16), (4, 4)])
def test_20_kills_of_a_random_process_at_random_moments(folder, tmp_path, W, kills):
    """Half of the kills wait for a checkpoint's temporary file, to come within its write.

    With four processes, the order in which gradients are added matters.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(folder, whole, W)
    draw, path = random.Random(0), killed / "checkpoint.pth"
    number = in_write = 0
    for _ in range(3 * kills):  # a run that ends before the kill does not count
        if number == kills:
            break
        ranks = fork_ranks("train.py", *arguments_for(folder, killed), processes=W)
        done = checkpoint.read_dict(path)["progress"]["global_step"] if path.exists() else 0
        wait_for_step(ranks[0], killed, done + draw.randrange(4))
        deadline, writing = time.monotonic() + (5 if number % 2 else draw.uniform(0, 0.2)), False
        while time.monotonic() < deadline and not (number % 2 and writing):
            writing = any(killed.glob("checkpoint.pth.*.partial"))
        victim = draw.choice(ranks)
        if victim.poll() is None:
            victim.kill()
            number, in_write = number + 1, in_write + writing
            for rank in ranks:  # as torchrun does
                rank.terminate()
        for rank in ranks:
            rank.join(30)
            rank.kill()
        if (killed / "backbone.pth").exists():  # it had come to its end: once more, from the start
            shutil.rmtree(killed)
    assert number == kills and in_write > 0
    finish(folder, killed, W)
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_torchrun_loses_a_process(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(folder, whole, 2)
    run = start(folder, killed, *FREQUENT, processes=2, restarts=3)
    wait_for_step(run, killed, 4)
    os.kill(workers_of(run)[1], signal.SIGKILL)
    assert run.wait(600) == 0
    assert_same_run(whole, killed)


def join_and_be_lost():
    assert distributed.all_reduce(torch.ones(1)) == 2
    os._exit(0)  # nothing is cleaned up


def test_processes_that_start_again_on_the_store_of_lost_ones():
    """torchrun's store outlives the processes. Process 0 would find process 1's old address."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart in range(2):
        codes, outputs, _ = run_to_exit(
            join_and_be_lost, 2, port=store.port, timeout=60, TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=str(restart))
        assert codes == [0, 0], outputs


def train_in_child(change, *arguments):
    """Run train.py, changed by a function, with the arguments for each process or for all."""
    if change:
        change()
    own = arguments[distributed.rank() % len(arguments)]
    launch.run_program(train.main, list(map(str, own)))


def at_step(step, do, of_rank):
    """Make a process do something in this step of an epoch, the first of which is step 0."""
    check_step = train.check_step

    def changed(args, progress, *rest):
        if distributed.rank() == of_rank and progress.step == step:
            do()
        return check_step(args, progress, *rest)

    train.check_step = changed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_1_2_4_1_processes(folder, tmp_path):
    for epoch, W in enumerate((1, 2, 4, 1), 1):
        finish(folder, tmp_path, W, "--epochs", epoch)
    epochs = [record["epoch"] for record in log_of(tmp_path) if "nmi" in record]
    assert epochs == [0, 1, 1, 2, 2, 3, 3, 4, 4]  # each start measures its final clusters, too


def test_another_number_of_processes_within_an_epoch(folder, tmp_path, monkeypatch):
    """A step has as many images as before, so the epoch goes on where it was."""
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1"]
    monkeypatch.setattr(train, "check_step", train.check_step)  # which is put back then
    at_step(3, terminate, 0)
    assert run_main(*arguments) == 128 + signal.SIGTERM
    result = run_script("train.py", *arguments, processes=2)
    assert result.returncode == 0 and "epoch 1 after step 4" in result.stdout
    assert [record["step"] for record in log_of(tmp_path) if "loss" in record] == [10]


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase, number", [
    ("extract", signal.SIGTERM), ("extract", signal.SIGHUP), ("kmeans", signal.SIGINT),
    ("save", signal.SIGUSR1)])
def test_a_signal_in_every_phase(folder, tmp_path, monkeypatch, phase, number):
    """In a step: test_train.test_a_signal_saves_and_stops."""
    original = getattr(train, phase)

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, phase, interrupted)
        if phase == "extract":
            patch.setattr(train, "kmeans", None)  # extraction sees the signal
        assert run_main(*arguments_for(folder, tmp_path)) == 128 + number
    assert (tmp_path / "checkpoint.pth").exists() == (phase == "save")  # else there is nothing yet
    assert run_main(*arguments_for(folder, tmp_path)) == 0
    epochs = [record["epoch"] for record in log_of(tmp_path) if "nmi" in record]
    assert epochs == [0, 1, 2, 3, 3]  # the last one is of the final clusters


def test_a_signal_during_the_measurement_at_an_epochs_end(folder, tmp_path, monkeypatch):
    """The steps of the epoch are not lost, and its end comes once more."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--checkpoint-interval", "1000"]
    assert run_main(*arguments_for(folder, whole, *arguments)) == 0
    knn_accuracy = knn.knn_accuracy

    def interrupted(*rest, **options):
        if (stopped / "log.jsonl").read_text().count("loss") == 2:
            terminate()
        return knn_accuracy(*rest, **options)

    monkeypatch.setattr(knn, "knn_accuracy", interrupted)
    assert run_main(*arguments_for(folder, stopped, *arguments)) == 128 + signal.SIGTERM
    assert checkpoint.read_dict(stopped / "checkpoint.pth")["progress"]["global_step"] == 20
    monkeypatch.undo()
    assert run_main(*arguments_for(folder, stopped, *arguments)) == 0
    assert_same_run(whole, stopped)


def test_a_signal_on_one_process_stops_all(folder, tmp_path):
    codes, *_ = run_to_exit(
        train_in_child, 2, partial(at_step, 3, terminate, 1), arguments_for(folder, tmp_path))
    assert codes == [143, 143]
    assert checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["global_step"] == 4


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_stops(folder, tmp_path):
    """What SLURM sends before it requeues a job."""
    run = start(folder, tmp_path, "--epochs", "200", "--checkpoint-interval", "1", processes=2)
    wait_for_step(run, tmp_path, 4)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    assert 4 <= checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["global_step"] < 2000


def terminate_twice():
    for _ in range(2):  # the first one waits for the step to end
        terminate()
        time.sleep(1.5)
        print("goes on", flush=True)


def test_a_second_signal_exits_at_once(folder, tmp_path):
    codes, outputs, _ = run_to_exit(
        train_in_child, 1, partial(at_step, 0, terminate_twice, 0), arguments_for(folder, tmp_path))
    assert codes == [128 + signal.SIGTERM] and outputs[0].count("goes on") == 1


# --- disk ----------------------------------------------------------------------------------------


def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # of a file that is written


@pytest.mark.parametrize("W", [1, 2])
def test_a_full_disk_during_a_run(folder, tmp_path, W):
    """Only process 0 writes all of it; the other must not wait for it for ever."""
    assert run_main(*arguments_for(folder, tmp_path, "--epochs", "1")) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    token = (tmp_path / ".lock").read_text().split()[-1]
    for name in ("checkpoint.pth", "backbone.pth", "features.npy"):
        (tmp_path / f"{name}.{token}.partial").write_bytes(b"left by a run that was killed")
    arguments = arguments_for(folder, tmp_path)
    codes, outputs, _ = run_to_exit(train_in_child, W, fill_the_disk, arguments)
    assert codes == [2] * W
    output = "".join(outputs)
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert "could not be written" in output and "from before is kept" in output
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


# --- lost workers, and machines that are not alike -----------------------------------------------


def kill_a_worker():
    load = ImageSet.load

    def die(images, i, patient=False):
        if (worker := torch.utils.data.get_worker_info()) and worker.id == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(images, i, patient)

    ImageSet.load = die


def test_a_killed_worker_ends_the_run(folder, tmp_path):
    """With a sentence, and without waiting for the worker that is left."""
    arguments = arguments_for(folder, tmp_path, "--workers", "2")
    codes, outputs, _ = run_to_exit(train_in_child, 1, kill_a_worker, arguments)
    assert codes == [2] and "error: a loader worker has died" in outputs[0]


def assert_refused(words, *arguments):
    """Started with a list of arguments each, processes end with one sentence."""
    codes, outputs, _ = run_to_exit(train_in_child, len(arguments), None, *arguments, timeout=120)
    assert codes == [2] * len(arguments) and words in outputs[0], outputs
    assert "".join(outputs).count("error: ") == 1


def test_processes_with_different_arguments(folder, tmp_path):
    own = arguments_for(folder, tmp_path)
    assert_refused("different arguments", own, [*own, "--lr", "0.01"])


def test_processes_with_different_images(folder, tmp_path):
    """Folders of equal size and other names, as on machines with copies of their own."""
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    image = min(path for path in others.rglob("*") if path.is_file())
    image.rename(image.with_stem("renamed"))
    assert_refused("the processes see different images",
                   *(arguments_for(data, tmp_path / "out") for data in (folder, others)))


def test_outputs_that_the_machines_do_not_share(folder, finished, tmp_path):
    """The first save tells, before any step; with a checkpoint on one machine, the start."""
    assert_refused("a folder that all machines share",
                   *(arguments_for(folder, tmp_path / name) for name in "ab"))
    copied = tmp_path / "copied"
    shutil.copytree(finished, copied)
    assert_refused("different checkpoints",
                   *(arguments_for(folder, output) for output in (tmp_path / "c", copied)))


# --- numbers -------------------------------------------------------------------------------------

NUMBERS = [action.option_strings[0] for action in settings.make_parser()._actions
           if action.type not in (None, path_type) and action.nargs in (None, "*")]
# These would work, but not within a test.
TOO_LONG = {("--epochs", "200"), ("--workers", "200")}


@pytest.mark.slow
@pytest.mark.parametrize("flag", NUMBERS)
def test_any_number_is_a_sentence_or_a_working_run(folder, tmp_path, capsys, flag):
    for value in ("0", "-1", "1", "0.5", "200", "1e30", "nan", "many", ""):
        if (flag, value) in TOO_LONG:
            continue
        base = list(SMALL)
        if flag in base:
            del base[base.index(flag) : base.index(flag) + 2]
        epochs = [] if flag == "--epochs" else ["--epochs", "1"]
        capsys.readouterr()
        code = run_main("--data", folder, "--output", tmp_path / f"out {value}", *base, *epochs,
                        f"{flag}={value}")
        if code != 0:
            assert_one_sentence(capsys, code)


@pytest.mark.parametrize("K, smallest, batch", [
    (150, 0, 64), (150, 1, 64), (1, 20, 64), (1, 150, 64), (7, 21, 64), (8, 5, 200)])
def test_extreme_numbers_of_clusters(folder, tmp_path, K, smallest, batch):
    """The last has a batch that is larger than the data."""
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1",
                    "--num-clusters", K, "--min-cluster-size", smallest,
                    "--batch-size", batch) == 0
    steps = [record["step"] for record in log_of(tmp_path) if "loss" in record]
    assert steps == [-(-150 // batch)]


# --- long hours ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_soak_of_the_demonstration(tmp_path):
    """5 epochs; memory in use and open files of both processes, sampled from outside."""
    ranks = fork_ranks("train.py", *arguments_for("shapes", tmp_path, "--epochs", "5",
                       "--batch-size", "64", "--checkpoint-interval", "3"), processes=2)
    wait_for_step(ranks[0], tmp_path, 2)
    resident, files, log = ([], []), ([], []), tmp_path / "log.jsonl"
    # Up to the last epoch: the end opens files and imports what draws them.
    while ranks[0].poll() is None and '"epoch": 5' not in log.read_text():
        for rank, pages, numbers in zip(ranks, resident, files):
            pages.append(int(Path(f"/proc/{rank.pid}/statm").read_text().split()[1]))
            numbers.append(len(os.listdir(f"/proc/{rank.pid}/fd")))
        time.sleep(0.25)
    assert [rank.wait(600) for rank in ranks] == [0, 0]
    for pages, numbers in zip(resident, files):
        pages, half = np.array(pages[len(pages) // 10 :]), len(numbers) // 2  # first, caches fill
        assert pages[len(pages) // 2 :].mean() <= 1.02 * pages[: len(pages) // 2].mean()
        # The median: a sample may fall into the moment in which a checkpoint is open.
        assert np.median(numbers[half:]) <= np.median(numbers[:half])
