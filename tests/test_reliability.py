"""What a run survives: kills, signals, lost processes, full disks, odd numbers, long hours."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from odc import distributed, settings
from odc.errors import UserError
from odc.evaluation import knn
from odc.memory import ODCMemory
from odc.runtime import checkpoint, launch
from tests.processes import command, environment, run_processes, run_script
from tests.runs import (
    SMALL, assert_equal_state, assert_one_sentence, assert_same_run, log_of, run_main,
    wait_for_step)


def arguments_for(folder, output, *extra):
    return ["--data", folder, "--output", output, *SMALL, "--epochs", "3",
            "--checkpoint-interval", "1", *extra]


def start_two(folder, output, *torchrun):
    line = command("train.py", *arguments_for(folder, output), processes=2)
    line[line.index("--standalone") : line.index("--standalone")] = torchrun
    return quiet(line)


def quiet(line):
    """Start a command whose output nobody reads."""
    return subprocess.Popen(list(map(str, line)), env=environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def workers_of(torchrun):
    """Process ids of the ranks that a torchrun process has started."""
    try:
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        return [int(pid) for pid in children
                if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    except FileNotFoundError:  # the run has come to its end meanwhile
        return []


def kill(pid):
    """Whether there was such a process to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def is_writing(output):
    return any(output.glob("checkpoint.pth.*.partial"))


@pytest.mark.slow
def test_20_kills_of_a_random_process_at_random_moments(folder, tmp_path):
    """Half of the kills wait for a checkpoint's temporary file, to come within its write."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_two(folder, whole).wait(600) == 0
    killed.mkdir()
    draw = random.Random(0)
    number = in_write = 0
    for _ in range(60):  # a run that ends before the kill does not count
        if number == 20:
            break
        run = start_two(folder, killed)
        path = killed / "checkpoint.pth"
        done = checkpoint.read_dict(path)["progress"]["global_step"] if path.exists() else 0
        wait_for_step(run, killed, done + draw.randrange(4))
        deadline = time.monotonic() + (5 if number % 2 else draw.uniform(0, 0.2))
        while time.monotonic() < deadline and not (number % 2 and is_writing(killed)):
            pass
        writing = is_writing(killed)
        if (workers := workers_of(run)) and kill(draw.choice(workers)):
            number += 1
            in_write += writing
        run.wait(300)
        if (killed / "backbone.pth").exists():  # it had come to its end: once more, from the start
            shutil.rmtree(killed)
            killed.mkdir()
    assert number == 20 and in_write > 0
    assert start_two(folder, killed).wait(600) == 0
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_four_processes_go_on_to_the_last_bit(folder, tmp_path):
    """With more than two, the order in which gradients are added matters."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("train.py", *arguments_for(folder, whole), processes=4).returncode == 0
    run = quiet(command("train.py", *arguments_for(folder, killed), processes=4))
    wait_for_step(run, killed, 4)
    assert kill(workers_of(run)[2])
    run.wait(300)
    assert run_script("train.py", *arguments_for(folder, killed), processes=4).returncode == 0
    assert_same_run(whole, killed)


JOIN = """
import os, time, torch
time.sleep(2 * int(os.environ["RANK"]))  # process 0 would find the old address of process 1
from odc import distributed
distributed.init("cpu")
assert distributed.all_reduce(torch.ones(1)) == 2
os._exit(0)  # lost: nothing is cleaned up
"""


def test_processes_that_start_again_on_the_store_of_lost_ones():
    """torchrun's store outlives the processes, and so does what they wrote there."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                 TORCHELASTIC_USE_AGENT_STORE="True")
    for start in range(2):
        group["TORCHELASTIC_RESTART_COUNT"] = str(start)
        children = [subprocess.Popen([sys.executable, "-c", JOIN], text=True,
                                     env=environment(**group, RANK=str(rank)),
                                     stderr=subprocess.PIPE) for rank in range(2)]
        try:
            codes = [child.wait(120) for child in children]
            assert codes == [0, 0], [child.stderr.read() for child in children]
        finally:
            for child in children:
                child.kill()


@pytest.mark.slow
def test_torchrun_restarts_a_lost_process(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_two(folder, whole).wait(600) == 0
    run = start_two(folder, killed, "--max-restarts", "3")
    wait_for_step(run, killed, 3)
    kill(workers_of(run)[1])
    assert run.wait(600) == 0
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_an_error_on_one_process_stops_the_other_and_is_shown(folder, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("""
import sys
import train
from odc import distributed
from odc.runtime import launch
check_step = train.check_step
def broken(args, progress, *rest):
    if distributed.rank() == 1 and progress.step == 2:
        raise RuntimeError("the disk is on fire")
    return check_step(args, progress, *rest)
train.check_step = broken
launch.run_program(train.main, sys.argv[1:])
""")
    line = command(script, *arguments_for(folder, tmp_path / "out"), processes=2)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "the disk is on fire" in result.stderr
    assert checkpoint.read_dict(tmp_path / "out" / "checkpoint.pth")["progress"]["global_step"] == 2


@pytest.mark.slow
def test_1_2_4_1_processes(folder, tmp_path):
    """The memories are handed on unchanged, however they are split."""
    for epoch, W in enumerate((1, 2, 4, 1), 1):
        arguments = ["--data", folder, "--output", tmp_path, *SMALL]
        if epoch > 1:
            assert all(run_processes(restores_the_memory, W, tmp_path))
        result = run_script("train.py", *arguments, "--epochs", epoch, processes=W)
        assert result.returncode == 0, result.stderr
    epochs = [record["epoch"] for record in log_of(tmp_path) if "nmi" in record]
    assert epochs == [0, 1, 1, 2, 2, 3, 3, 4, 4]  # each start measures its final clusters, too


def test_another_number_of_processes_within_an_epoch(folder, tmp_path, monkeypatch):
    """A step has as many images as before, so the epoch goes on where it was."""
    check_step = train.check_step

    def check_and_stop(args, progress, *rest):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return check_step(args, progress, *rest)

    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1"]
    monkeypatch.setattr(launch, "_signal_received", None)
    monkeypatch.setattr(train, "check_step", check_and_stop)
    assert run_main(*arguments) == 128 + signal.SIGTERM
    result = run_script("train.py", *arguments, processes=2)
    assert result.returncode == 0 and "in epoch 1 after step 4." in result.stdout
    assert [record["step"] for record in log_of(tmp_path) if "loss" in record] == [10]


def restores_the_memory(output):
    """Whether this process gets its rows of the features, whoever wrote them."""
    path, state = output / "checkpoint.pth", checkpoint.read_dict(output / "checkpoint.pth")
    saved = state["memory"]
    memory = ODCMemory(len(saved["labels"]), 256, len(saved["centroids"]))
    memory.load_state_dict(saved, checkpoint.read_rows(path, state, memory.rows))
    whole = checkpoint.read_rows(path, state, slice(0, len(saved["labels"])))
    assert_equal_state(memory.state_dict(), saved)
    return torch.equal(memory.features, whole[memory.rows])


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", launch.SIGNALS)
@pytest.mark.parametrize("phase", ["extract", "kmeans", "save"])
def test_a_signal_in_every_phase(folder, tmp_path, monkeypatch, phase, number):
    """In a step: test_train.test_a_signal_saves_and_stops."""
    monkeypatch.setattr(launch, "_signal_received", None)
    module = checkpoint if phase == "save" else train
    original = getattr(module, phase)

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, phase, interrupted)
    if phase == "extract":
        monkeypatch.setattr(train, "kmeans",
                            lambda *_: pytest.fail("extraction has not seen the signal"))
    assert run_main(*arguments_for(folder, tmp_path)) == 128 + number
    path = tmp_path / "checkpoint.pth"
    assert path.exists() == (phase == "save")  # before that there is nothing worth saving
    if path.exists():
        assert checkpoint.read_dict(path)["progress"]["global_step"] <= 1
    monkeypatch.undo()
    monkeypatch.setattr(launch, "_signal_received", None)
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
            os.kill(os.getpid(), signal.SIGTERM)
        return knn_accuracy(*rest, **options)

    monkeypatch.setattr(launch, "_signal_received", None)
    monkeypatch.setattr(knn, "knn_accuracy", interrupted)
    assert run_main(*arguments_for(folder, stopped, *arguments)) == 128 + signal.SIGTERM
    assert checkpoint.read_dict(stopped / "checkpoint.pth")["progress"]["global_step"] == 20
    monkeypatch.undo()
    monkeypatch.setattr(launch, "_signal_received", None)
    assert run_main(*arguments_for(folder, stopped, *arguments)) == 0
    assert_same_run(whole, stopped)


def train_with_a_signal_on_one_process(folder, output):
    if distributed.rank() == 1:
        original = train.check_step

        def check_step(args, progress, *rest):
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(args, progress, *rest)

        train.check_step = check_step
    try:
        launch.run_program(train.main, [str(a) for a in arguments_for(folder, output)])
    except SystemExit as stopped:
        return stopped.code


def test_a_signal_on_one_process_stops_all(folder, tmp_path):
    assert run_processes(train_with_a_signal_on_one_process, 2, folder, tmp_path) == [143, 143]
    assert checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["global_step"] == 4


def test_sigterm_to_torchrun_saves_and_stops(folder, tmp_path):
    """What SLURM sends before it requeues a job."""
    arguments = arguments_for(folder, tmp_path, "--checkpoint-interval", "1000")
    run = quiet(command("train.py", *arguments, processes=2))
    wait_for_step(run, tmp_path, 4)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    progress = checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]
    assert progress["global_step"] >= 4
    assert progress["step"] > 0  # within an epoch, so it was saved because of the signal


def test_a_second_signal_exits_at_once(folder, tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text("""
import sys, time
import train
from odc.runtime import launch
def stuck(*arguments):
    print("stuck", flush=True)
    while True:
        time.sleep(0.01)
train.check_step = stuck
launch.run_program(train.main, sys.argv[1:])
""")
    arguments = map(str, arguments_for(folder, tmp_path / "out"))
    child = subprocess.Popen([sys.executable, script, *arguments], env=environment(), text=True,
                             stdout=subprocess.PIPE)
    try:
        while "stuck" not in child.stdout.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.5)  # it waits for its step to end
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    finally:
        child.kill()


# --- disk ----------------------------------------------------------------------------------------


def on_a_full_disk(line):
    """Run a command that cannot write files above 100 kB."""
    limit = (100_000, 100_000)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def test_a_full_disk_during_a_run(folder, tmp_path):
    assert run_main(*arguments_for(folder, tmp_path, "--epochs", "1")) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    token = (tmp_path / ".lock").read_text().split()[-1]
    for name in ("checkpoint.pth", "backbone.pth"):
        (tmp_path / f"{name}.{token}.partial").write_bytes(b"left by a run that was killed")
    result = on_a_full_disk(command("train.py", *arguments_for(folder, tmp_path)))
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert "could not be written" in result.stderr and "from before is kept" in result.stderr
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_stops_every_process(folder, tmp_path):
    """Only the main process writes; the other must not wait for it for ever."""
    result = on_a_full_disk(command("train.py", *arguments_for(folder, tmp_path), processes=2))
    assert result.returncode != 0 and result.stderr.count("error: ") == 1
    assert "could not be written" in result.stderr


# --- lost workers, and machines that are not alike -----------------------------------------------


def test_a_killed_worker_ends_the_run(folder, tmp_path):
    """With a sentence, and without waiting for the worker that is left."""
    script = tmp_path / "killed.py"
    script.write_text("""
import os, signal, sys
import torch, train
from odc.data.images import ImageSet
from odc.runtime import launch
load = ImageSet.load
def die(images, i, patient=False):
    if (worker := torch.utils.data.get_worker_info()) and worker.id == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(images, i, patient)
ImageSet.load = die
launch.run_program(train.main, sys.argv[1:])
""")
    line = [sys.executable, script, *arguments_for(folder, tmp_path / "out", "--workers", "2")]
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "error: a loader worker has died" in result.stderr


def train_with_another_rate_on_one_process(folder, output):
    rate = ["--lr", "0.01"] if distributed.rank() == 1 else []
    try:
        train.main([str(a) for a in arguments_for(folder, output, *rate)])
    except UserError as error:
        return str(error)


def test_processes_with_different_arguments(folder, tmp_path):
    said = run_processes(train_with_another_rate_on_one_process, 2, folder, tmp_path)
    assert all("different arguments" in words for words in said)


def train_on_other_images_in_one_process(folder, others, output):
    data = others if distributed.rank() else folder
    try:
        train.main(["--data", str(data), "--output", str(output), "--device", "cpu"])
    except UserError as error:
        return str(error)


def test_processes_with_different_images(folder, tmp_path):
    """Folders of equal size and other names, as on machines with copies of their own."""
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    image = min(path for path in others.rglob("*") if path.is_file())
    image.rename(image.with_stem("renamed"))
    said = run_processes(train_on_other_images_in_one_process, 2, folder, others, tmp_path / "out",
                         timeout=120)
    assert all("the processes see different images" in words for words in said)


def train_where_one_process_sees_no_checkpoint(folder, empty, held):
    output = held if distributed.rank() else empty
    try:
        train.main(["--data", str(folder), "--output", str(output), "--device", "cpu"])
    except UserError as error:
        return str(error)


def test_processes_with_different_checkpoints(folder, finished, tmp_path):
    """An --output that the machines do not share. No process waits for another one's collective."""
    said = run_processes(train_where_one_process_sees_no_checkpoint, 2, folder, tmp_path, finished,
                         timeout=120)
    assert all("different checkpoints" in words for words in said)


def train_into_a_folder_of_its_own(folder, output):
    try:
        train.main([str(a) for a in arguments_for(folder, output / str(distributed.rank()))])
    except UserError as error:
        return str(error)


def test_outputs_that_the_machines_do_not_share(folder, tmp_path):
    """The first save tells, before any step."""
    said = run_processes(train_into_a_folder_of_its_own, 2, folder, tmp_path)
    assert all("a folder that all machines share" in words for words in said)


# --- numbers -------------------------------------------------------------------------------------

NUMBERS = [action.option_strings[0] for action in settings.make_parser()._actions
           if action.type is not None and action.nargs in (None, "*")]
# These would work, but not within a test.
TOO_LONG = {("--epochs", "200"), ("--epochs", "4000"), ("--epochs", "65536"),
            ("--image-size", "4000"), ("--batch-size", "4000"), ("--batch-size", "65536"),
            ("--workers", "200")}


@pytest.mark.slow
@pytest.mark.parametrize("flag", NUMBERS)
def test_any_number_is_a_sentence_or_a_working_run(folder, tmp_path, capsys, flag):
    for value in ("0", "-1", "1", "0.5", "4000", "65536", "200", "1e30", "nan", "-inf", "many", ""):
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


@pytest.mark.parametrize("K, smallest", [(150, 0), (150, 1), (1, 20), (1, 150), (7, 21)])
def test_extreme_numbers_of_clusters(folder, tmp_path, K, smallest):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1",
                    "--num-clusters", K, "--min-cluster-size", smallest,
                    "--batch-size", "64") == 0


def test_a_batch_larger_than_the_data(folder, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2",
                    "--batch-size", "200") == 0
    assert [record["step"] for record in log_of(tmp_path) if "loss" in record] == [1, 2]


# --- long hours ----------------------------------------------------------------------------------


def soak(steps):
    """Steps of the memory alone: resident pages and open files over time, and the largest drift.

    The drift is of a centroid, against its mean counted anew.
    """
    N, d, K, B = 1000, 16, 20, 8
    generator = torch.Generator().manual_seed(0)
    memory = ODCMemory(N, d, K)
    memory.initialize(torch.rand(N, d, generator=generator)[memory.rows],
                      torch.randint(K, (N,), generator=generator))
    resident, files = [], []
    for step in range(steps):
        memory.update_samples(torch.randint(N, (B,), generator=generator),
                              torch.rand(B, d, generator=generator))
        if step % 10 == 9:
            memory.update_centroids()
        memory.split_small_clusters()
        memory.loss_weights()
        if step % 250 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            files.append(len(os.listdir("/proc/self/fd")))
    memory.update_centroids()
    recounted = ODCMemory(N, d, K)
    recounted.load_state_dict(memory.state_dict(), memory.features)
    recounted.update_centroids()
    return resident, files, float((memory.centroids - recounted.centroids).abs().max())


def assert_flat(values, tolerance):
    values = np.array(values[len(values) // 10 :])  # the start fills caches
    first, last = values[: len(values) // 2], values[len(values) // 2 :]
    assert last.mean() <= first.mean() * (1 + tolerance), (first.mean(), last.mean())


@pytest.mark.slow
def test_soak_of_the_memory():
    for resident, files, drift in run_processes(soak, 2, 50_000, timeout=1500):
        assert_flat(resident, 0.02)
        assert max(files[len(files) // 2 :]) <= max(files[: len(files) // 2])
        assert drift < 1e-4


@pytest.mark.slow
def test_soak_of_the_demonstration(tmp_path):
    """20 epochs; memory in use and open files of both processes, sampled from outside."""
    run = quiet(command("train.py", "--output", tmp_path, "--epochs", "20", processes=2))
    wait_for_step(run, tmp_path, 2)
    resident, files, log = {}, {}, tmp_path / "log.jsonl"
    # Up to the last epoch: the end opens files and imports what draws them.
    while run.poll() is None and log.read_text().count('"epoch": 20') < 1:
        try:
            for pid in workers_of(run):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                resident.setdefault(pid, []).append(pages)
                files.setdefault(pid, []).append(len(os.listdir(f"/proc/{pid}/fd")))
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
        time.sleep(0.25)
    assert run.wait(600) == 0 and len(resident) == 2
    for pid in resident:
        assert_flat(resident[pid], 0.02)
        half = len(files[pid]) // 2
        # The median: a sample may fall into the moment in which a checkpoint is open.
        assert np.median(files[pid][half:]) <= np.median(files[pid][:half])
