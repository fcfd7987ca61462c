"""train.py as people run it: what a run leaves, what it continues, and its answers to mistakes."""

import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

import train
from odc.data import images
from odc.data.datasets import open_dataset
from odc.runtime import checkpoint, launch
from tests.runs import (
    SMALL, assert_equal_state, assert_one_sentence, assert_same_run, log_of, run_main, start,
    state_of, wait_for_step)

# --- what a run leaves ---------------------------------------------------------------------------


def test_files_of_a_run(finished, folder):
    rows = (finished / "clusters.csv").read_text().splitlines()
    assert rows[0] == "path,cluster,similarity,root" and len(rows) == 151
    arrays = [np.load(finished / f"{name}.npy") for name in ("features", "labels", "centroids")]
    features, labels, centroids = arrays
    assert features.shape == (150, 256) and features.dtype == np.float32
    assert labels.dtype == np.int64 and centroids.shape == (8, 256)
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(150), abs=1e-5)
    for row, feature, label in zip(rows[1:], features, labels):
        path, cluster, similarity, root = row.split(",")
        cosine = feature @ centroids[label] / np.linalg.norm(centroids[label])
        assert (folder / path).exists() and int(cluster) == label
        assert float(similarity) == pytest.approx(cosine, abs=1e-4)
    assert (finished / "report.html").stat().st_size > 10_000
    assert {path.name for path in finished.iterdir()} == {
        "backbone.pth", "checkpoint.pth", "clusters.csv", "features.npy", "labels.npy",
        "centroids.npy", "log.jsonl", "memory", "report.html", ".lock", "duplicates.csv"}


def test_log(finished, folder):
    records = log_of(finished)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [10, 20]  # an epoch has ceil(150 / 16)
    names = {"epoch", "loss", "change_ratio", "empty", "smallest", "largest", "splits", "lr"}
    for record in steps:
        assert names <= record.keys()
        assert record["empty"] == 0 and 0 <= record["change_ratio"] <= 1
    # The last record is of the final clusters.
    assert [record["epoch"] for record in records if "nmi" in record] == [0, 1, 2, 2]
    labels, classes = np.load(finished / "labels.npy"), open_dataset(str(folder)).labels
    assert records[-1]["nmi"] == pytest.approx(normalized_mutual_info_score(classes, labels))


def test_workers_change_nothing(folder, finished, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2",
                    "--workers", "2") == 0
    states = [state_of(path) for path in (finished, tmp_path)]
    for name in ("backbone", "neck", "head", "memory", "optimizer"):
        assert_equal_state(states[0][name], states[1][name])


@pytest.mark.parametrize("epoch, rate", [(399, 0.06), (400, 0.024)])
def test_learning_rate(epoch, rate):
    args = SimpleNamespace(lr=0.06, epochs=440)
    assert train.learning_rate(args, epoch) == pytest.approx(rate)


def test_the_head_has_no_momentum(finished):
    groups = checkpoint.read_dict(finished / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.9, 0.0]
    assert [group["weight_decay"] for group in groups] == [1e-5, 1e-5]


# --- continuing ----------------------------------------------------------------------------------


def test_killed_at_random_steps_and_resumed_is_the_same_run(folder, finished, tmp_path):
    steps = sorted(random.Random(0).sample(range(1, 20), 5))
    for step in steps:
        child = start(folder, tmp_path, "--checkpoint-interval", "3")
        wait_for_step(child, tmp_path, step)
        assert child.poll() is None, "the run ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
    for _ in ("the rest", "nothing, as after a kill at the very end"):
        assert start(folder, tmp_path).wait(300) == 0
        assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("number", launch.SIGNALS)
def test_a_signal_saves_and_stops(folder, finished, tmp_path, number):
    child = start(folder, tmp_path, "--checkpoint-interval", "1000")
    wait_for_step(child, tmp_path, 4)
    child.send_signal(number)
    assert child.wait(300) == 128 + number
    done = checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["global_step"]
    assert 4 <= done < 20
    assert start(folder, tmp_path).wait(300) == 0
    assert_same_run(finished, tmp_path)


def test_a_checkpoint_between_two_lines_of_the_log_holds_plain_numbers(
        folder, tmp_path, monkeypatch):
    """A tensor among them would be on the CPU after a restart, and the run may be on a GPU."""
    check_step = train.check_step
    monkeypatch.setattr(train, "check_step", lambda *step: (check_step(*step)[0], True))
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1") == 143
    interval = checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["interval"]
    assert interval["steps"] == 1
    assert all(type(value) in (int, float) for value in interval.values())


def test_a_finished_run_says_so(folder, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert run_main("--data", folder, "--output", tmp_path / "run", *SMALL, "--epochs", "2") == 0
    said = capsys.readouterr().out
    assert "holds a run of 2 epochs" in said and "Continuing" not in said


def test_two_runs_in_one_folder(folder, tmp_path, capsys):
    first = start(folder, tmp_path, "--epochs", "200")
    wait_for_step(first, tmp_path, 2)
    code = run_main("--data", folder, "--output", tmp_path, *SMALL)
    assert_one_sentence(capsys, code, tmp_path, "another run is writing there")
    first.kill()
    first.wait()
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2") == 0


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere/to/be/found"], ["nowhere/to/be/found", "does not exist"]),
    (["--data", __file__], ["test_train.py", "is no folder"]),
    (["--workers", "2"], ["--workers 2", "/dev/shm", "--shm-size"]),
    (["--arch", "vit"], ["--arch", "vit"]), (["--epochs", "0"], ["--epochs 0", "--pretrained"]),
    (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "-1"], ["--lr"]),
    (["--memory-momentum", "1.5"], ["1.5"]), (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--num-clusters", "200", "--min-cluster-size", "0"], ["-clusters 200", "need 200 images"]),
    (["--min-cluster-size", "100"], ["--min-cluster-size 100", "800", "150"]),
    (["--device", "cuda:77"], ["cuda:77"]), (["--pretrained", "random"], ["--pretrained random"]),
    (["--batch-size", "1"], ["--batch-size"]), (["--amp", "fp16"], ["--amp fp16", "bf16"]),
    (["--tensorboard"], ["--tensorboard", "pip install tensorboard"]),
    (["--unknown"], ["--unknown"]), (["--output", __file__], ["test_train.py"]),
])
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=16, f_frsize=4096))
    code = run_main("--data", folder, "--output", tmp_path, *SMALL, *arguments)
    assert_one_sentence(capsys, code, *words)


@pytest.mark.parametrize("change, words", [
    (["--num-clusters", "9"], ["--num-clusters 8", "9"]),
    (["--lr", "0.1"], ["--lr 0.05", "0.1"]),
    (["--arch", "resnet18"], ["--arch narrow", "resnet18"]),
    (["--batch-size", "8"], ["--batch-size 16", "8"]),
    (["--seed", "1"], ["--seed 0", "1"]),
    (["--pretrained", "other.pth"], ["--pretrained None", "other.pth"]),
    (["--recluster-interval", "1"], ["--recluster-interval 0", "1"]),
    (["--preset", "demo"], ["--preset recipe", "demo"]),
])
def test_other_settings_do_not_continue(folder, finished, capsys, change, words):
    code = run_main("--data", folder, "--output", finished, *SMALL, "--epochs", "3", *change)
    assert_one_sentence(capsys, code, *words, finished)


def linked(folder, target):
    """A copy of a folder of class folders, made of links: its images, sorted."""
    for path in folder.glob("*/*"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        (target / path.parent.name / path.name).symlink_to(path)
    return sorted(target.glob("*/*"))


@pytest.mark.parametrize("kind", ["one more", "one fewer", "renamed"])
def test_another_dataset_does_not_continue(folder, finished, tmp_path, capsys, kind):
    first = linked(folder, tmp_path)[0]
    if kind == "one more":
        first.with_name("new.png").symlink_to(first.resolve())
    elif kind == "one fewer":
        first.unlink()
    else:
        first.rename(first.with_name("renamed.png"))
    code = run_main("--data", tmp_path, "--output", finished, *SMALL, "--epochs", "3")
    assert_one_sentence(capsys, code, "holds a run on other images", tmp_path, finished)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path, capsys):
    code = run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1", "--lr", "1e6",
                    "--checkpoint-interval", "1")
    assert_one_sentence(capsys, code, "The loss is", "step", "--lr")
    state = state_of(tmp_path)
    for value in [*state["memory"].values(), *state["backbone"].values()]:
        assert torch.isfinite(value).all()


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, capsys, monkeypatch):
    """The loss tells only in the next step."""
    save = train.save

    def spoil_and_save(state, *rest):
        if state.progress.global_step == 3:
            next(state.network.parameters()).data.fill_(float("inf"))
        save(state, *rest)

    monkeypatch.setattr(train, "save", spoil_and_save)
    code = run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1",
                    "--checkpoint-interval", "1")
    assert_one_sentence(capsys, code, "The weights are not finite after step 3", "--lr")
    assert checkpoint.read_dict(tmp_path / "checkpoint.pth")["progress"]["global_step"] == 2


# --- images that cannot be read ------------------------------------------------------------------


def test_an_image_that_cannot_be_read_leaves_the_set(folder, tmp_path, capsys):
    """It is named once, it has no row anywhere, and the run continues without it."""
    broken = linked(folder, tmp_path / "data")[0]
    content, output = broken.read_bytes(), tmp_path / "out"
    broken.unlink()
    broken.write_bytes(b"no image")
    arguments = ["--data", tmp_path / "data", "--output", output, *SMALL]
    assert run_main(*arguments, "--epochs", "1") == 0
    name = str(broken.relative_to(tmp_path / "data"))
    line = f"1 of 150 images in {tmp_path / 'data'} cannot be read, such as '{name}'"
    assert capsys.readouterr().out.count(line) == 1
    assert (output / "unreadable.txt").read_text() == f"{name}\tnot an image in a known format\n"
    assert len(np.load(output / "features.npy")) == len(np.load(output / "labels.npy")) == 149
    assert name not in (output / "clusters.csv").read_text()
    broken.write_bytes(content)  # too late for this run: its rows are numbered
    assert run_main(*arguments, "--epochs", "2") == 0
    assert len(state_of(output)["memory"]["labels"]) == 149


def test_more_than_1_percent_of_unreadable_images_stop_a_run(folder, tmp_path, capsys):
    for path in linked(folder, tmp_path / "data")[:2]:
        path.unlink()
        path.write_bytes(b"no image")
    code = run_main("--data", tmp_path / "data", "--output", tmp_path / "out", *SMALL)
    assert_one_sentence(capsys, code, "2 of 150 images", "repair or remove them")


@pytest.mark.parametrize("seconds", [2, 3600])
def test_an_image_that_is_away_later(folder, finished, tmp_path, capsys, monkeypatch, seconds):
    """Back in time, it changes nothing. Else the run saves its steps and names it; and goes on."""
    linked(folder, tmp_path / "data")
    read, away, slept = images.read_image, set(), []

    def failing_read(path, *rest):
        if path in away and sum(slept) < seconds:
            raise FileNotFoundError(2, "No such file", path)
        return read(path, *rest)

    def check_and_take_away(args, progress, loss):
        if progress.global_step == 3:
            away.update(map(str, sorted((tmp_path / "data").glob("*/*"))[:40]))
        return check_step(args, progress, loss)

    check_step = train.check_step
    arguments = ["--data", tmp_path / "data", "--output", tmp_path / "out", *SMALL, "--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", failing_read)
        patch.setattr(images.time, "sleep", slept.append)
        patch.setattr(train, "check_step", check_and_take_away)
        code = run_main(*arguments)
    if seconds == 3600:
        assert_one_sentence(capsys, code, tmp_path / "data", "cannot be read", "restore it")
        assert state_of(tmp_path / "out")["progress"]["global_step"] > 3
        assert run_main(*arguments) == 0
    assert_equal_state(state_of(tmp_path / "out")["backbone"], state_of(finished)["backbone"])
