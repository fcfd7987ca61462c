"""The three evaluation scripts: what they write, what they refuse, how they stop and continue."""

import importlib
import json
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
import odc
from odc import distributed
from odc.errors import UserError
from odc.evaluation import frozen_backbone
from odc.model import ODC, ResNet
from odc.outputs import results
from odc.runtime import checkpoint
from tests.layouts import put_files, put_inaturalist, put_voc
from tests.processes import ForkedScript, run_processes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone.pth of the narrow network with the small stem."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(ODC("narrow", True, num_clusters=3).backbone.state_dict(), path)
    return str(path)


def put_imagenet(root, train=12, val=7):
    """Noisy images of three classes, each of its colour."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k in range(3):
            (root / split / f"n0000000{k}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (36, 44, 3), dtype=np.uint8)
                pixels[:, :, k] += 60
                path = root / split / f"n0000000{k}" / f"{split}_{i}.JPEG"
                Image.fromarray(pixels).save(path, quality=95)
    return str(root)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main function in this process; returns what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


def results_of(path):
    return json.loads(path.read_text()) | {"processes": None}


SMALL = ("--image-size", 32, "--workers", 0, "--device", "cpu")


def run_knn(arguments):
    sys.argv = ["eval_knn", *map(str, arguments)]
    eval_knn.main()


def test_knn_with_one_and_two_processes(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--k", 1, 5, 30, "--batch-size", 5)
    run_processes(run_knn, 2, (*arguments, "--output", tmp_path / "two.json"))
    out = call("eval_knn", *arguments, "--output", tmp_path / "one.json")
    one = results_of(tmp_path / "one.json")
    assert one == results_of(tmp_path / "two.json") and one["results"]["k=5"]["top1"] > 60
    assert one["results"]["k=5"]["top5"] == 100
    assert "| k=1" in out and f"{one['results']['k=5']['top1']:.2f}" in out
    assert "ODC" not in out  # 36 images are not ImageNet
    with pytest.raises(UserError, match="--k 200: .* has only 36 images"):
        call("eval_knn", *arguments, "--k", 5, 200)


@pytest.mark.parametrize("protocol, columns", [
    ("imagenet-multihead", "Feature1 Feature2 Feature3 Feature4 Feature5"),
    ("imagenet-1percent", "Fine-tuned")])
def test_linear(tmp_path, weights, call, protocol, columns):
    names = [f"n0000000{k}/train_{i}.JPEG" for k in range(3) for i in range(11)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    arguments = ("--weights", weights, "--data", put_imagenet(tmp_path / "data"), *SMALL,
                 "--protocol", protocol, "--epochs", 2, "--batch-size", 8, "--subset",
                 tmp_path / "list.txt", "--output", tmp_path / "one.json")
    out = call("eval_linear", *arguments)
    one = results_of(tmp_path / "one.json")
    assert " ".join(one["results"]) == columns and len(one["history"]) == 2
    assert one["protocol"] == protocol and one["train_images"] == 33
    assert one["not_the_recipes"] == dict(epochs=2, lr_steps=[1, 2 - ("head" in protocol)],
                                          batch_size=8)
    assert f"protocol {protocol} on 33 images" in out and "published" not in out
    # Started again, the finished run is read, though fine-tuning has changed the backbone.
    call("eval_linear", *arguments)
    assert results_of(tmp_path / "one.json") == one
    for other in (["--lr", 0.02], ["--seed", 1], ["--weights", "random", "--arch", "narrow"]):
        with pytest.raises(UserError, match="checkpoint.pth holds a run with (lr|seed|weights) "):
            call("eval_linear", *arguments, *other)
    with pytest.raises(UserError, match="none.txt: No such file"):
        call("eval_linear", *arguments, "--subset", tmp_path / "none.txt")


def test_svm_on_voc07(tmp_path, weights, call):
    put_voc(tmp_path, 66, 31)
    out = call("eval_svm", "--weights", weights, "--data", tmp_path, *SMALL, "--output",
               tmp_path / "one.json")
    one = results_of(tmp_path / "one.json")
    assert one["results"]["SVM"] > 70 and one["train_images"] == 66  # chance is about 40
    assert "Best Layer" in out and "published" not in out
    for script in ("eval_knn", "eval_linear"):
        with pytest.raises(UserError, match="several classes an image"):
            call(script, "--weights", weights, "--data", tmp_path)


@pytest.mark.parametrize("script, more", [
    ("eval_knn", ("--k", 300)), ("eval_svm", ()),
    ("eval_linear", ("--epochs", 1, "--train-share", 0.2))])
def test_unreadable_images_are_left_out(tmp_path, weights, call, script, more):
    data = put_imagenet(tmp_path / "data", train=101, val=40)
    broken = [f"{data}/val/n00000001/val_5.JPEG"]
    if script != "eval_linear":  # without the image it would train in another order
        broken.append(f"{data}/train/n00000001/train_5.JPEG")
    for path in broken:
        os.truncate(path, 100)
    arguments = (script, "--weights", weights, "--data", data, *SMALL, *more, "--output")
    out = call(*arguments, tmp_path / "with.json")
    assert out.count("1 of 120 images in ") == 1 and "val_5.JPEG' (" in out
    for path in broken:
        os.remove(path)
    call(*arguments, tmp_path / "without.json")
    one = results_of(tmp_path / "with.json")
    assert one == results_of(tmp_path / "without.json") and one["val_images"] == 119


def prepared(*arguments):
    return frozen_backbone.prepare(eval_knn.make_parser().parse_args(
        list(map(str, ("--device", "cpu", "--workers", 0, *arguments)))))


def test_the_image_size_comes_with_the_weights(tmp_path, weights):
    """Both files of a run keep it. Else it is 224, or that of small images in memory."""
    data, model = put_imagenet(tmp_path / "data", train=2, val=2), ODC("narrow", True)
    results.write_backbone(tmp_path / "backbone.pth", model.backbone, 48)
    checkpoint.write_dict(tmp_path / "checkpoint.pth", dict(
        program="odc train", backbone=model.backbone.state_dict(), head=model.head.state_dict(),
        settings={"data": "shapes", "image_size": 48}))
    for name in ("backbone.pth", "checkpoint.pth"):
        assert prepared("--weights", tmp_path / name, "--data", data).image_size == 48
    assert prepared("--weights", weights, "--data", data, "--image-size", 32).image_size == 32
    with pytest.raises(UserError, match="--image-size 224: .* is for 64 pixels or less"):
        prepared("--weights", weights, "--data", data)  # without the size
    assert prepared("--weights", weights, "--data", "shapes").image_size == 32
    results.write_backbone(tmp_path / "other.pth", ResNet("narrow"), 10**6)  # no size of an image
    assert prepared("--weights", tmp_path / "other.pth", "--data", data).image_size == 224


def test_mistakes_of_all_scripts(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=16, f_frsize=4096))
    data = put_imagenet(tmp_path / "data", train=2, val=2)
    put_inaturalist(tmp_path / "plants")
    path = tmp_path / "plants" / "val2018.json"
    path.write_text(path.read_text().replace("plant 1", "tree"))
    put_files(tmp_path, "other/train/a.jpg", "other/val/b.jpg", "alone/train/a.jpg")
    os.mkfifo(tmp_path / "fifo")
    for arguments, sentence in [
            (["--weights", tmp_path / "absent.pth"], "No such file"),
            (["--weights", tmp_path / "fifo"], "a directory or a device"),
            (["--workers", 2, *SMALL[:2]], "--shm-size"), (["--data", ""], "an empty text"),
            (["--arch", "resnet50"], "resnet50"), (["--output", tmp_path], "it is no file"),
            (["--output", tmp_path / "no" / "a.json"], "writable"),
            (["--data", tmp_path / "plants"], "same classes in one order"),
            (["--data", tmp_path / "other"], "must have labels"),
            (["--data", tmp_path / "alone"], "has no val split")]:
        with pytest.raises(UserError, match=sentence):
            prepared("--weights", weights, "--data", data, *arguments)


def test_an_output_that_is_an_input_is_refused(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data", train=2, val=2)
    (tmp_path / "link.pth").symlink_to(weights)
    (tmp_path / "list.txt").write_text("n00000000/train_0.JPEG\nn00000001/train_1.JPEG")
    before = open(weights, "rb").read()
    arguments = ("--weights", weights, "--data", data, *SMALL, "--epochs", 1, "--batch-size", 4)
    for file in (weights, tmp_path / "link.pth", tmp_path / "list.txt",
                 f"{data}/val/n00000000/val_0.JPEG"):
        with pytest.raises(UserError, match="not a result of this program"):
            call("eval_linear", *arguments, "--subset", tmp_path / "list.txt", "--output", file)
    assert open(weights, "rb").read() == before
    (tmp_path / "a.json").touch()
    for _ in range(2):  # an empty file may be replaced, and an earlier result
        call("eval_knn", *arguments[:4], *SMALL, "--k", 1, "--output", tmp_path / "a.json")


def answers_of_ranks(choices):
    """What `prepare` says, for each list with the arguments of rank 0 and of rank 1."""
    answers = []
    for arguments in choices:
        try:
            answers.append(prepared(*arguments[distributed.rank()]).image_size)
        except UserError as error:
            answers.append(str(error))
    return answers


def test_processes_with_different_arguments_or_weights(tmp_path, weights):
    """They would end in a number that is nobody's, or wait for each other. Paths may differ."""
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "conv1.weight": state["conv1.weight"] * 2}, tmp_path / "other.pth")
    shutil.copy(weights, tmp_path / "same.pth")
    good = ["--data", put_imagenet(tmp_path / "data"), *SMALL, "--weights", weights]
    others = (["--weights", tmp_path / "other.pth"], ["--batch-size", 30], ["--seed", 1],
              ["--output", tmp_path / "o.json"],
              ["--weights", tmp_path / "same.pth", "--workers", 1])
    for answers in run_processes(answers_of_ranks, 2, [(good, good + more) for more in others]):
        assert answers.pop() == 32
        assert all("The processes have different arguments or weights" in a for a in answers)


@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_svm"])
def test_help_fits_80_columns(script, capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit):
            importlib.import_module(script).make_parser().parse_args([option])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "--weights" in text and "--output" in text and odc.__version__ in text


def test_signal_stops_and_the_same_command_continues(tmp_path, weights, call):
    arguments = ("--weights", weights, "--data", put_imagenet(tmp_path / "data"), *SMALL,
                 "--batch-size", 4, "--epochs", 4, "--output", tmp_path / "a.json")
    running = ForkedScript("eval_linear.py", *arguments, out=tmp_path / "out")
    while not (tmp_path / "a.checkpoint.pth").exists() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 128 + signal.SIGTERM
    assert "Stopped, as a signal asked" in (tmp_path / "out").read_text()
    assert not (tmp_path / "a.json").exists()
    out = call("eval_linear", *arguments)
    assert "Continuing" in out and "epoch 1/" not in out and "epoch 4/" in out
