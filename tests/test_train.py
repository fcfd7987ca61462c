"""train.py as people run it: what a run leaves, what it continues, and its answers to mistakes."""

import random
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import normalized_mutual_info_score

import train
from odc.data.datasets import open_dataset
from odc.errors import Interrupted
from odc.runtime import checkpoint, launch
from tests.processes import run_script
from tests.runs import (
    SMALL, assert_equal_state, assert_one_sentence, assert_same_run, log_of, run_main, start,
    state_of, wait_for_step)

# --- what a run leaves ---------------------------------------------------------------------------


def test_files_of_a_run(finished, folder):
    for epoch in (1, 2):
        labels = np.load(finished / f"labels_epoch_{epoch}.npy")
        assert labels.shape == (150,) and labels.min() >= 0 and labels.max() < 8
        assert (finished / f"backbone_epoch_{epoch}.pth").exists()
    rows = (finished / "clusters.csv").read_text().splitlines()
    assert rows[0] == "path,cluster,similarity" and len(rows) == 151
    arrays = [np.load(finished / f"{name}.npy") for name in ("features", "labels", "centroids")]
    features, labels, centroids = arrays
    assert features.shape == (150, 32) and features.dtype == np.float32
    assert labels.dtype == np.int64 and centroids.shape == (8, 32)
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(150), abs=1e-5)
    for row, feature, label in zip(rows[1:], features, labels):
        path, cluster, similarity = row.split(",")
        cosine = feature @ centroids[label] / np.linalg.norm(centroids[label])
        assert (folder / path).exists() and int(cluster) == label
        assert float(similarity) == pytest.approx(cosine, abs=1e-4)
    for name in ("report.html",):
        assert (finished / name).stat().st_size > 10_000
    assert not list(finished.rglob("*.partial"))


def test_log(finished, folder):
    records = log_of(finished)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))  # 2 x ceil(150 / 16)
    names = {"epoch", "loss", "change_ratio", "empty", "smallest", "largest", "splits", "lr"}
    for record in steps:
        assert names <= record.keys()
        assert record["empty"] == 0 and 0 <= record["change_ratio"] <= 1
    # The last record is of the final clusters.
    assert [record["epoch"] for record in records if "nmi" in record] == [0, 1, 2, 2]
    labels, classes = np.load(finished / "labels.npy"), open_dataset(str(folder)).labels
    assert records[-1]["nmi"] == pytest.approx(normalized_mutual_info_score(classes, labels))


def test_backbone_loads_in_torchvision(folder, tmp_path):
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1"]
    assert run_main(*arguments, "--batch-size", "64", "--arch", "resnet18",
                    "--image-size", "72") == 0
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected


def test_workers_change_nothing(folder, finished, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2",
                    "--save-interval", "1", "--workers", "2") == 0
    states = [state_of(path) for path in (finished, tmp_path)]
    for name in ("backbone", "neck", "head", "memory", "optimizer"):
        assert_equal_state(states[0][name], states[1][name])


def test_starting_from_a_backbone(folder, finished, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1", "--lr", "0",
                    "--weights", finished / "backbone.pth") == 0
    before, after = (torch.load(path / "backbone.pth", weights_only=True)
                     for path in (finished, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_learning_rate_drops_and_the_head_has_no_momentum(folder, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "3",
                    "--lr-steps", "1", "2", "--lr-gamma", "0.5") == 0
    rates = [record["lr"] for record in log_of(tmp_path) if "loss" in record]
    assert rates == [0.05] * 10 + [0.025] * 10 + [0.0125] * 10
    groups = checkpoint.load(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
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
    assert start(folder, tmp_path).wait(300) == 0
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("number", launch.SIGNALS)
def test_a_signal_saves_and_stops(folder, finished, tmp_path, number):
    child = start(folder, tmp_path, "--checkpoint-interval", "1000")
    wait_for_step(child, tmp_path, 4)
    child.send_signal(number)
    assert child.wait(300) == 128 + number
    done = checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["global_step"]
    assert 4 <= done < 20 and done == log_of(tmp_path)[-1]["step"]
    assert start(folder, tmp_path).wait(300) == 0
    assert_same_run(finished, tmp_path)


def test_a_checkpoint_between_two_lines_of_the_log_holds_plain_numbers(folder, tmp_path):
    """A tensor among them would be on the CPU after a restart, and the run may be on a GPU."""
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1",
                    "--log-interval", "1000") == 0
    interval = checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["interval"]
    assert interval["steps"] == 10
    assert all(type(value) in (int, float) for value in interval.values())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_while_it_draws_the_clusters_of_an_epoch(folder, tmp_path, monkeypatch, moment):
    """Copies and records of the log are those of a run without a stop."""
    arguments = ["--data", folder, *SMALL, "--epochs", "3", "--save-interval", "1",
                 "--gallery-interval", "1", "--output"]
    assert run_main(*arguments, tmp_path / "whole") == 0
    write = train.write_results

    def stopped(*all_of_it):
        if moment == "after":
            write(*all_of_it)
        raise Interrupted("Stopped.")

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_results", stopped)
        assert run_main(*arguments, tmp_path / "run") == 128 + signal.SIGTERM
    assert run_main(*arguments, tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "backbone_epoch_1.pth").exists()
    assert (tmp_path / "run" / "labels_epoch_1.npy").exists()


def test_a_finished_run_says_so(folder, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert run_main("--data", folder, "--output", tmp_path / "run", *SMALL, "--epochs", "2") == 0
    said = capsys.readouterr().out
    assert "holds the finished run" in said and "Continuing" not in said


def test_two_runs_in_one_folder(folder, tmp_path, capsys):
    first = start(folder, tmp_path, "--epochs", "200")
    wait_for_step(first, tmp_path, 2)
    code = run_main("--data", folder, "--output", tmp_path, *SMALL)
    assert_one_sentence(capsys, code, tmp_path, "another run is writing there")
    first.kill()
    first.wait()
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2") == 0


def test_another_number_of_processes_goes_on(folder, finished, tmp_path):
    """1 -> 2 -> 1 processes; the memories are the same when they change hands."""
    output = ["--data", folder, "--output", tmp_path, *SMALL]
    assert run_main(*output, "--epochs", "1") == 0
    before = checkpoint.load(tmp_path / "checkpoint.pth")
    assert_equal_state(before["memory"]["labels"].numpy().tolist(),
                       np.load(finished / "labels_epoch_1.npy").tolist())
    result = run_script("train.py", *output, "--epochs", "2", processes=2)
    assert result.returncode == 0, result.stderr
    assert "Continuing" in result.stdout and "epoch 2" in result.stdout
    assert run_main(*output, "--epochs", "3") == 0
    epochs = [record["epoch"] for record in log_of(tmp_path) if "nmi" in record]
    assert epochs == [0, 1, 1, 2, 2, 3, 3]  # each start measures its final clusters, too
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["global_step"] == 10 + 5 + 10


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere/to/be/found"], ["nowhere/to/be/found", "does not exist"]),
    (["--arch", "vit"], ["--arch", "vit"]),
    (["--epochs", "0"], ["--epochs", "'0'"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "-1"], ["--lr"]),
    (["--memory-momentum", "1.5"], ["--memory-momentum", "1.5"]),
    (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--num-clusters", "200", "--min-cluster-size", "0"],
     ["--num-clusters 200", "there are only 150 images"]),
    (["--min-cluster-size", "100"], ["--min-cluster-size 100", "800", "150"]),
    (["--amp", "fp16"], ["--amp fp16", "bf16"]),
    (["--device", "cuda:77"], ["--device cuda:77"]),
    (["--weights", "nothing.pth"], ["nothing.pth"]),
    (["--unknown"], ["--unknown"]),
])
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, arguments, words):
    code = run_main("--data", folder, "--output", tmp_path, *SMALL, *arguments)
    assert_one_sentence(capsys, code, *words)


def test_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    code = run_main("--data", tmp_path, *SMALL, "--output", tmp_path / "out")
    assert_one_sentence(capsys, code, tmp_path, "no images")


def test_an_output_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("not a folder")
    code = run_main("--data", folder, *SMALL, "--output", tmp_path / "out")
    assert_one_sentence(capsys, code, tmp_path / "out")


@pytest.mark.parametrize("change, words", [
    (["--num-clusters", "9"], ["--num-clusters 8", "9"]),
    (["--lr", "0.1"], ["--lr 0.05", "0.1"]),
    (["--arch", "resnet18"], ["--arch narrow", "resnet18"]),
    (["--batch-size", "8"], ["--batch-size 16", "8"]),
    (["--seed", "1"], ["--seed 0", "1"]),
    (["--weights", "other.pth"], ["--weights None", "other.pth"]),
])
def test_other_settings_do_not_continue(folder, finished, capsys, change, words):
    code = run_main("--data", folder, "--output", finished, *SMALL, "--epochs", "3", *change)
    assert_one_sentence(capsys, code, *words, finished)


def test_a_recipe_does_not_continue_a_run_of_other_settings(folder, tmp_path, capsys):
    arguments = [argument for argument in SMALL if argument != "--recipe"]
    output = ["--data", folder, "--output", tmp_path, *arguments]
    assert run_main(*output, "--epochs", "1") == 0
    assert_one_sentence(capsys, run_main(*output, "--epochs", "2", "--recipe"),
                        "--recipe False, not True")


def test_another_dataset_does_not_continue(folder, finished, tmp_path, capsys):
    for kind, words in (("one more", f"on 150 images, and {tmp_path / 'one more'} has 151"),
                        ("one fewer", f"on 150 images, and {tmp_path / 'one fewer'} has 149"),
                        ("renamed", "other names or another order")):
        other = tmp_path / kind
        for path in folder.glob("*/*"):
            (other / path.parent.name).mkdir(parents=True, exist_ok=True)
            (other / path.parent.name / path.name).symlink_to(path)
        first = next(other.glob("*/*"))
        if kind == "one more":
            first.with_name("new.png").symlink_to(first.resolve())
        elif kind == "one fewer":
            first.unlink()
        else:
            first.rename(first.with_name("renamed.png"))
        code = run_main("--data", other, "--output", finished, *SMALL, "--epochs", "3")
        assert_one_sentence(capsys, code, words, finished)


def test_a_truncated_checkpoint(folder, finished, tmp_path, capsys):
    whole = (finished / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: len(whole) // 2])
    code = run_main("--data", folder, "--output", tmp_path, *SMALL)
    assert_one_sentence(capsys, code, tmp_path / "checkpoint.pth", "cannot be read as a checkpoint")


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

    def spoil_and_save(args, state, *rest):
        if state.progress.global_step == 3:
            next(state.network.parameters()).data.fill_(float("inf"))
        save(args, state, *rest)

    monkeypatch.setattr(train, "save", spoil_and_save)
    code = run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1",
                    "--checkpoint-interval", "1")
    assert_one_sentence(capsys, code, "The weights are not finite after step 3", "--lr")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["global_step"] == 2


def test_a_checkpoint_of_another_program(folder, finished, tmp_path, capsys):
    """With a right checksum, as eval_linear.py writes them."""
    state = checkpoint.load(finished / "checkpoint.pth")
    checkpoint.save(tmp_path / "checkpoint.pth", {**state, "program": "another"})
    code = run_main("--data", folder, "--output", tmp_path, *SMALL)
    assert_one_sentence(capsys, code, tmp_path / "checkpoint.pth",
                        "not a checkpoint of this version")


def test_images_that_break_while_the_run_trains(folder, tmp_path, capsys, monkeypatch):
    """After the first extraction, which would count them as well."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    train_epoch = train.train_epoch

    def break_and_train(*arguments):
        for path in sorted(data.glob("*/*"))[:20]:
            path.write_bytes(b"no image")
        train_epoch(*arguments)

    monkeypatch.setattr(train, "train_epoch", break_and_train)
    with pytest.warns(UserWarning):
        code = run_main("--data", data, "--output", tmp_path / "out", *SMALL, "--epochs", "1")
    assert_one_sentence(capsys, code, "of 150", "more than 1%")


def test_a_corrupt_image_is_named_and_replaced_and_many_stop_the_run(folder, tmp_path, capsys):
    data = tmp_path / "data"
    for path in folder.glob("*/*"):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).symlink_to(path)
    broken = sorted(data.glob("*/*"))[:3]
    arguments = ["--data", data, "--output", tmp_path / "out", *SMALL, "--epochs", "2"]
    broken[0].unlink()
    broken[0].write_bytes(b"no image")
    with pytest.warns(UserWarning, match=broken[0].name):
        assert run_main(*arguments) == 0
    steps = [record for record in log_of(tmp_path / "out") if "loss" in record]
    assert steps[-1]["failed_images"] == 1
    lines = (tmp_path / "out" / "clusters.csv").read_text().splitlines()
    without_cluster = [line for line in lines if line.endswith(",,")]
    assert without_cluster == [f"{broken[0].relative_to(data)},,"]
    for path in broken[1:]:
        path.unlink()
        path.write_bytes(b"no image")
    capsys.readouterr()
    with pytest.warns(UserWarning):
        code = run_main(*arguments[:3], tmp_path / "out2", *arguments[4:])
    assert_one_sentence(capsys, code, "3 of 150", "1%")


def test_two_processes_say_it_once(tmp_path):
    result = run_script("train.py", "--data", "nowhere", "--output", tmp_path, *SMALL, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("error: nowhere does not exist") == 1
