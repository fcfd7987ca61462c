"""The three evaluation scripts, started as people start them, on a tiny copy of each data set."""

import importlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import odc
from odc.data.datasets import VOC_CLASSES, open_dataset
from odc.errors import UserError
from odc.model import ODC
from odc.runtime import checkpoint
from odc.runtime.launch import SIGNALS
from tests.processes import ROOT, environment, free_port


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone.pth of the narrow network with the small stem."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(ODC("narrow", True, num_clusters=3).backbone.state_dict(), path)
    return str(path)


def put_image(path, label, generator):
    """A noisy image whose colour and stripes tell its label."""
    pixels = generator.integers(0, 90, (36, 44, 3))
    pixels[:, :, label % 3] += 60
    pixels[:: 2 + label // 3] += 50
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=95)


def put_imagenet(root, classes=3, train=12, val=7):
    generator = np.random.default_rng(0)
    for k in range(classes):
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                put_image(f"{root}/{split}/n0000000{k}/{split}_{i}.JPEG", k, generator)
    return str(root)


def put_places(root):
    generator, folder = np.random.default_rng(1), "data/vision/torralba/deeplearning/images256"
    for split, count in (("train", 24), ("val", 12)):
        lines = [f"a/place{i % 4}/{split}_{i}.jpg {i % 4}" for i in range(count)]
        for i, line in enumerate(lines):
            put_image(f"{root}/{folder}/{line.split()[0]}", i % 4, generator)
        os.makedirs(f"{root}/trainvalsplit_places205", exist_ok=True)
        open(f"{root}/trainvalsplit_places205/{split}_places205.csv", "w").write("\n".join(lines))
    return str(root)


def put_inaturalist(root):
    generator = np.random.default_rng(2)
    for split, count in (("train", 24), ("val", 12)):
        names = [f"train_val2018/Aves/{i % 3}/{split}{i}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            put_image(f"{root}/{name}", i % 3, generator)
        content = dict(images=[dict(id=i, file_name=name) for i, name in enumerate(names)],
                       annotations=[dict(image_id=i, category_id=i % 3) for i in range(count)],
                       categories=[dict(id=k, name=f"bird {k}") for k in range(3)])
        open(f"{root}/{split}2018.json", "w").write(json.dumps(content))
    return str(root)


def put_voc(root, train=66, val=31):
    """20 classes, several in an image, some difficult; a class is one stripe of the image's 20."""
    generator, base = np.random.default_rng(3), f"{root}/VOCdevkit/VOC2007"
    os.makedirs(f"{base}/ImageSets/Main")
    os.makedirs(f"{base}/JPEGImages")
    for stem, count in (("trainval", train), ("test", val)):
        targets = np.where(generator.random((count, 20)) < 0.15, 1, -1)
        targets[np.arange(count), np.arange(count) % 20] = 1
        targets[generator.random((count, 20)) < 0.03] = 0
        ids = [f"{stem}{i:04d}" for i in range(count)]
        for name, row in zip(ids, targets):
            pixels = generator.integers(0, 100, (40, 40, 3))
            pixels[(row == 1).repeat(2)] += 120
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(f"{base}/JPEGImages/{name}.jpg", quality=95)
        open(f"{base}/ImageSets/Main/{stem}.txt", "w").write("\n".join(ids))
        for k, label in enumerate(VOC_CLASSES):
            lines = [f"{name} {target:2d}" for name, target in zip(ids, targets[:, k])]
            open(f"{base}/ImageSets/Main/{label}_{stem}.txt", "w").write("\n".join(lines))
    return str(root)


def command(script, *arguments, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                  f"--master_port={free_port()}"]
    return [*start, f"{ROOT}/{script}.py", *map(str, arguments)]


def start(script, *arguments, processes=1, folder=ROOT):
    """Run a script in processes of its own; returns what it printed."""
    done = subprocess.run(command(script, *arguments, processes=processes), cwd=folder,
                          env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main function in this process; returns what it printed."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results_of(path):
    content = json.loads(path.read_text())
    content.pop("processes")
    return content


# --- each script on each data set, with one and two processes ------------------------------------

SMALL = ("--image-size", 32, "--workers", 0, "--device", "cpu")


def test_knn_on_imagenet(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--k", 1, 5, 30, "--batch-size", 5)
    out = start("eval_knn", *arguments, "--output", tmp_path / "two.json", processes=2)
    call("eval_knn", *arguments, "--output", tmp_path / "one.json", "--features-cache",
         tmp_path / "cache")
    one, two = results_of(tmp_path / "one.json"), results_of(tmp_path / "two.json")
    assert one == two and one["results"]["k=5"]["top1"] > 60
    assert one["results"]["k=5"]["top5"] == 100
    assert "| k=1" in out and f"{one['results']['k=5']['top1']:.2f}" in out
    assert "ODC" not in out and one["published"] is None  # 36 images are not ImageNet
    assert len(os.listdir(tmp_path / "cache")) == 2
    call("eval_knn", *arguments, "--output", tmp_path / "again.json", "--features-cache",
         tmp_path / "cache")
    assert results_of(tmp_path / "again.json") == one and len(os.listdir(tmp_path / "cache")) == 2
    call("eval_knn", "--weights", "random", "--arch", "narrow", *arguments[2:],
         "--features-cache", tmp_path / "cache")
    assert len(os.listdir(tmp_path / "cache")) == 4
    # An image that changes under its name makes the features of its split anew.
    Image.new("RGB", (50, 50)).save(f"{data}/val/n00000001/val_3.JPEG")
    call("eval_knn", *arguments, "--output", tmp_path / "black.json", "--features-cache",
         tmp_path / "cache")
    call("eval_knn", *arguments, "--output", tmp_path / "anew.json")
    assert results_of(tmp_path / "black.json") == results_of(tmp_path / "anew.json")
    assert len(os.listdir(tmp_path / "cache")) == 5


def test_linear_on_imagenet(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--protocol", "imagenet-multihead",
                 "--num-classes", 3, "--epochs", 3, "--batch-size", 8, "--with-avgpool",
                 "--avgpool-lr", 0.1)
    out = start("eval_linear", *arguments, "--output", tmp_path / "two.json", processes=2)
    call("eval_linear", *arguments, "--output", tmp_path / "one.json")
    one, two = results_of(tmp_path / "one.json"), results_of(tmp_path / "two.json")
    assert one == two
    assert " ".join(one["results"]) == "Feature1 Feature2 Feature3 Feature4 Feature5 AvgPool"
    assert one["protocol"] == "imagenet-multihead" and one["not_the_recipes"]["epochs"] == 3
    assert "protocol imagenet-multihead" in out and "|  published" not in out
    assert one["settings_of_avgpool"]["lr"] == 0.1
    assert "AvgPool here: 3 epochs, batch 8, lr 0.1 x 0.1 after epochs 2 2" in out
    # Started again with the same settings, the finished run is read; with others it is refused.
    call("eval_linear", *arguments, "--output", tmp_path / "one.json")
    assert results_of(tmp_path / "one.json") == one
    with pytest.raises(UserError, match="one.checkpoint.pth holds a run with lr"):
        call("eval_linear", *arguments, "--lr", 0.02, "--output", tmp_path / "one.json")
    with pytest.raises(UserError, match="--avgpool-lr 0.1 is of --with-avgpool"):
        call("eval_linear", *[a for a in arguments if a != "--with-avgpool"])


def test_fine_tuning_on_a_list_of_imagenet(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data")
    names = [f"n0000000{k}/train_{i}.JPEG" for k in range(3) for i in (1, 4, 7)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    arguments = ("--data", data, *SMALL, "--protocol", "imagenet-1percent", "--num-classes", 3,
                 "--subset", tmp_path / "list.txt", "--epochs", 1, "--batch-size", 4)
    two = start("eval_linear", "--weights", weights, *arguments, "--output", tmp_path / "two.json",
                processes=2)
    call("eval_linear", "--weights", weights, *arguments, "--output", tmp_path / "one.json")
    one = results_of(tmp_path / "one.json")
    assert one == results_of(tmp_path / "two.json") and one["train_images"] == 9
    assert one["not_the_recipes"] == dict(classes=3, epochs=1, lr_steps=[1, 1], batch_size=4)
    assert "1 epochs, batch 4, lr 0.1 (head x 100) x 0.2" in two
    assert "imagenet fine-tuning (%), protocol imagenet-1percent" in two
    # Started again, the finished run is read, though its backbone has changed since the start.
    call("eval_linear", "--weights", weights, *arguments, "--output", tmp_path / "one.json")
    assert results_of(tmp_path / "one.json") == one
    with pytest.raises(UserError, match="one.checkpoint.pth holds a run with weights"):
        call("eval_linear", "--weights", "random", "--arch", "narrow", *arguments, "--output",
             tmp_path / "one.json")
    with pytest.raises(UserError, match="none.txt: No such file"):
        call("eval_linear", "--weights", weights, *arguments, "--subset", tmp_path / "none.txt")


@pytest.mark.parametrize("protocol, make, classes", [("places205", put_places, 4),
                                                     ("inaturalist2018", put_inaturalist, 3)])
def test_linear_on_places_and_inaturalist(tmp_path, weights, call, protocol, make, classes):
    data = make(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--protocol", protocol)
    out = call("eval_linear", *arguments, "--num-classes", classes, "--epochs", 2,
               "--batch-size", 8, "--lr", 0.05)
    assert f"protocol {protocol} (mhead_8xb32-steplr" in out
    assert "| Feature5 |" in out.replace(" " * 2, " ")
    match = f"which has {classes}: give other --data, or --num-classes {classes}"
    with pytest.raises(UserError, match=match):
        call("eval_linear", *arguments)


def test_svm_on_voc07(tmp_path, weights, call):
    data = put_voc(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--shots", 1, 2, "--maps",
                 "feature2", "feature5")
    out = start("eval_svm", *arguments, "--output", tmp_path / "two.json", processes=2)
    call("eval_svm", *arguments, "--output", tmp_path / "one.json", "--features-cache",
         tmp_path / "cache")
    one, two = results_of(tmp_path / "one.json"), results_of(tmp_path / "two.json")
    assert one["results"].keys() == two["results"].keys() == {"Best Layer", "SVM", "k=1", "k=2"}
    assert one["results"].pop("Best Layer") == two["results"].pop("Best Layer")
    assert one["results"] == pytest.approx(two["results"], abs=0.01)
    assert one["results"]["SVM"] > 20 and one["train_images_used"] == 66  # chance is about 15
    assert all(one["low_shot"][k]["standard_deviation"] > 0 for k in ("k=1", "k=2"))
    assert set(one["full"]) == {"feature2", "feature5"}
    assert set(one["full"]["feature2"]["classes"]) == set(VOC_CLASSES)
    assert "Best Layer" in out and "published" not in out
    # The published form of the low-shot targets.
    os.makedirs(tmp_path / "targets")
    for sample in range(1, 6):
        column = np.repeat([1, 0, -1], [1, 19, 46])
        generator = np.random.default_rng(sample)
        chosen = np.stack([generator.permutation(column) for _ in range(20)], axis=1)
        np.save(tmp_path / "targets" / f"train_targets_sample{sample}_k1.npy",
                chosen.astype(np.int32))
    out = call("eval_svm", *arguments[:-3], "--maps", "feature5", "--shots", 1,
               "--low-shot-targets", tmp_path / "targets")
    assert "published low-shot samples" in out
    with pytest.raises(UserError, match="train_targets_sample1_k2.npy is missing"):
        call("eval_svm", *arguments, "--low-shot-targets", tmp_path / "targets")


def test_all_three_on_shapes(weights, tmp_path, call, monkeypatch):
    """The built-in set, of which a few images are enough here."""
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (300, 0), "val": (100, 1)})
    monkeypatch.chdir(tmp_path)  # no data/imagenet here: without --data it is shapes
    assert "No --data: evaluating on shapes." in call("eval_knn", "--weights", weights, "--k", 10)
    out = call("eval_linear", "--weights", weights, "--data", "shapes", "--epochs", 2)
    assert "protocol short (a short form of imagenet-multihead)" in out
    assert "not the recipe's: epochs 2" in out
    out = call("eval_svm", "--weights", weights, "--data", "shapes", "--maps", "feature4",
               "--train-images", 250)
    assert "each class against the rest on shapes" in out and "k=8" in out
    assert "too few images for low-shot k = 16, 32, 64, 96" in out


def test_a_checkpoint_of_a_run_is_as_good_as_its_backbone(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data", train=4, val=3)
    model = ODC("narrow", True, num_clusters=3)
    model.backbone.load_state_dict(torch.load(weights, weights_only=True))
    checkpoint.save(tmp_path / "checkpoint.pth", dict(
        program="odc train", arch="narrow", small_stem=True, backbone=model.backbone.state_dict(),
        neck=model.neck.state_dict(), head=model.head.state_dict(), settings={"data": "shapes"}))
    for file in (weights, tmp_path / "checkpoint.pth"):
        call("eval_knn", "--weights", file, "--data", data, *SMALL, "--k", 3, "--output",
             tmp_path / f"{len(str(file))}.json")
    found = [results_of(path)["results"] for path in tmp_path.glob("*.json")]
    assert len(found) == 2 and found[0] == found[1]


def test_unreadable_val_images_are_left_out(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data", val=40)
    broken = f"{data}/val/n00000001/val_5.JPEG"
    with open(broken, "r+b") as file:
        file.truncate(100)
    knn = ("eval_knn", "--weights", weights, "--data", data, *SMALL, "--k", 3, 7)
    linear = ("eval_linear", "--weights", weights, "--data", data, *SMALL, "--epochs", 2,
              "--batch-size", 8)
    svm = ("eval_svm", "--weights", weights, "--data", data, *SMALL, "--maps", "feature3",
           "--shots", 1)
    cache = ("--features-cache", tmp_path / "cache")
    start(*knn, "--output", tmp_path / "knn-two.json", processes=2)
    with pytest.warns(UserWarning, match="val_5.JPEG' cannot be read"):
        assert "1 of 120 val images cannot be read; they are left out" in call(
            *knn, "--output", tmp_path / "knn.json", *cache)
        call(*svm, "--output", tmp_path / "svm.json", *cache)
        call(*knn, "--output", tmp_path / "knn-cache.json", *cache)
        out = call(*linear, "--output", tmp_path / "linear.json")
    assert out.count("1 of 120 val images cannot be read; they are left out") == 1
    assert "holds the finished run" in call(*linear, "--output", tmp_path / "linear.json")
    os.remove(broken)
    call(*knn, "--output", tmp_path / "knn-without.json")
    call(*svm, "--output", tmp_path / "svm-without.json")
    call(*linear, "--output", tmp_path / "linear-without.json")
    found = {path.stem: results_of(path) for path in tmp_path.glob("*.json")}
    assert {name: content["unreadable_val_images"] for name, content in found.items()} == {
        "knn": 1, "knn-cache": 1, "knn-two": 1, "svm": 1, "linear": 1, "knn-without": 0,
        "svm-without": 0, "linear-without": 0}
    for name in ("knn", "knn-cache", "knn-two"):
        assert found[name]["results"] == found["knn-without"]["results"]
    for part in ("results", "full", "low_shot"):
        assert found["svm"][part] == found["svm-without"][part]
    assert found["linear"]["history"] == found["linear-without"]["history"]


def test_unreadable_training_images_do_not_vote(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data", train=101, val=5)
    broken = f"{data}/train/n00000001/train_5.JPEG"
    open(broken, "w").close()
    knn = ("eval_knn", "--weights", weights, "--data", data, *SMALL)
    svm = ("eval_svm", "--weights", weights, "--data", data, *SMALL, "--maps", "feature3",
           "--shots")
    start(*knn, "--k", 300, "--output", tmp_path / "two.json", processes=2)
    with pytest.warns(UserWarning, match="train_5.JPEG' cannot be read"):
        call(*knn, "--k", 300, "--output", tmp_path / "one.json")
        call(*svm, "--output", tmp_path / "svm.json")
    os.remove(broken)
    call(*knn, "--k", 300, "--output", tmp_path / "without.json")
    call(*svm, "--output", tmp_path / "svm-without.json")
    found = {path.stem: results_of(path)["results"] for path in tmp_path.glob("*.json")}
    assert found["one"] == found["two"] == found["without"]
    assert found["svm"] == found["svm-without"]
    with pytest.warns(UserWarning, match="1.JPEG' cannot be read"):
        few = put_imagenet(tmp_path / "200", classes=2, train=100, val=2)
        open(f"{few}/train/n00000000/train_1.JPEG", "w").close()
        assert "k = 10, 20, 100\n" in call(*knn[:4], few, *SMALL)  # not 200 of 199
    assert "k=200" in call(*knn) and "k=200" not in call(
        "eval_knn", "--weights", weights, "--data", put_imagenet(tmp_path / "few"), *SMALL)


def test_another_subset_of_images_in_memory_does_not_continue(tmp_path, weights, call, monkeypatch):
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (40, 0), "val": (20, 1)})
    images = (open_dataset("shapes").labels == 0).nonzero()[:, 0].tolist()  # of one class
    for name, chosen in (("a", images[:2]), ("b", images[2:4])):
        (tmp_path / name).write_text("\n".join(map(str, chosen)))
    arguments = ("eval_linear", "--weights", weights, "--data", "shapes", *SMALL, "--epochs", 1,
                 "--batch-size", 2, "--output", tmp_path / "x.json", "--subset")
    call(*arguments, tmp_path / "a")
    assert "holds the finished run" in call(*arguments, tmp_path / "a")
    with pytest.raises(UserError, match="holds a run with train images"):
        call(*arguments, tmp_path / "b")


@pytest.mark.parametrize("script, more", [
    ("eval_knn", ["--k", 3, "--batch-size", 64]),
    ("eval_linear", ["--epochs", 8, "--batch-size", 4, "--lr", 0.05]),
    ("eval_svm", ["--maps", "feature3", "--shots"])])
def test_transparent_images_are_laid_on_the_background(tmp_path, weights, call, script, more):
    """White images that differ in their transparency alone are all the same on white."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(24):
            pixels = np.full((32, 32, 4), 255, np.uint8)
            pixels[:, :: 2 + i % 2, 3] = generator.integers(0, 100, (32, 1))
            folder = tmp_path / "data" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = ("--weights", weights, "--data", tmp_path / "data", *SMALL, *more)
    assert "their transparency is dropped" in call(script, *arguments)
    found = {}
    for background in ("white", "black"):
        out = call(script, *arguments, "--background", background, "--output", tmp_path / "a.json",
                   *(["--features-cache", tmp_path / "cache"] if script != "eval_linear" else []))
        assert "transparency" not in out
        found[background] = results_of(tmp_path / "a.json")["results"]
        for file in tmp_path.glob("a.*"):
            file.unlink()
    assert found["white"] != found["black"]


# --- mistakes ------------------------------------------------------------------------------------


def put_folder(root, split, labels=True):
    for k in range(2):
        for i in range(2):
            folder = f"{root}/{split}/{f'class{k}/' if labels else ''}"
            put_image(f"{folder}{k}{i}.png", k, np.random.default_rng(i))


@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_svm"])
def test_mistakes_of_all_scripts(tmp_path, weights, call, script):
    def mistake(*arguments):
        with pytest.raises(UserError) as error:
            call(script, *arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    data = put_imagenet(tmp_path / "data", train=2, val=2)
    assert "--weights" in mistake("--data", data)
    assert "No such file" in mistake("--weights", tmp_path / "absent.pth", "--data", data)
    assert "does not exist" in mistake("--weights", weights, "--data", tmp_path / "absent")
    assert "resnet50" in mistake("--weights", weights, "--data", data, "--arch", "resnet50")
    good = ("--weights", weights, "--data", data)
    assert "writable" in mistake(*good, "--output", tmp_path / "no" / "a.json")
    for folder in (tmp_path, ".", "/", "results/"):
        assert "must be a file" in mistake(*good, "--output", folder)
    assert "CUDA" in mistake(*good, "--device", "cpu", "--amp", "fp16")
    put_folder(tmp_path / "no_val", "train")
    assert "val" in mistake("--weights", weights, "--data", tmp_path / "no_val")
    for split in ("train", "val"):
        put_folder(tmp_path / "unlabelled", split, labels=False)
    assert "no labels" in mistake("--weights", weights, "--data", tmp_path / "unlabelled")
    for split, other in (("train", 5), ("val", 4)):  # as many classes, but not the same ones
        names = [f"train_val2018/{split}{i}.jpg" for i in range(4)]
        for name in names:
            put_image(f"{tmp_path}/birds/{name}", 0, np.random.default_rng(0))
        open(f"{tmp_path}/birds/{split}2018.json", "w").write(json.dumps(dict(
            images=[dict(id=i, file_name=name) for i, name in enumerate(names)],
            annotations=[dict(image_id=i, category_id=[0, other][i % 2]) for i in range(4)])))
    message = mistake("--weights", weights, "--data", tmp_path / "birds")
    assert "class 1 is '5' in the train split (2 classes) and '4' in the val split (2)" in message
    for split, order in (("train", "ab"), ("val", "ba")):
        path = tmp_path / "birds" / f"{split}2018.json"
        content = json.loads(path.read_text())
        content["categories"] = [dict(id=i, name=n) for i, n in zip((0, 4), order)]
        for note in content["annotations"]:
            note["category_id"] = min(note["category_id"], 4)
        path.write_text(json.dumps(content))
    message = mistake("--weights", weights, "--data", tmp_path / "birds")
    assert "class 0 is 'a' in the train split (2 classes) and 'b' in the val split" in message


STARTS = """
import importlib, os, sys
from odc.runtime import launch
script, option, values = sys.argv[1], sys.argv[2], sys.argv[3:5]
value = values[int(os.environ["RANK"])]
sys.argv = [script, *sys.argv[5:]] + [option, value] * (value != "none")
launch.run_program(importlib.import_module(script).main)
"""


@pytest.mark.parametrize("script, option, values", [
    ("eval_knn", "--weights", None), ("eval_knn", "--batch-size", ("2", "30")),
    ("eval_linear", "--seed", ("0", "1")), ("eval_linear", "--output", ("o.json", "none")),
    ("eval_knn", "--features-cache", ("none", "cache"))])
def test_processes_with_different_arguments_or_weights(tmp_path, weights, script, option, values):
    """They would end in a number that is nobody's, or wait for each other for ever."""
    data = put_imagenet(tmp_path / "data")
    arguments = ["--data", data, *map(str, SMALL)]
    if option == "--weights":
        state = torch.load(weights, weights_only=True)
        torch.save({**state, "conv1.weight": state["conv1.weight"] * 2}, tmp_path / "other.pth")
        values = (weights, str(tmp_path / "other.pth"))
    else:
        arguments += ["--weights", weights]
    (tmp_path / "starts.py").write_text(STARTS)
    port = str(free_port())
    call = [sys.executable, str(tmp_path / "starts.py"), script, option, *values, *arguments]
    running = [subprocess.Popen(
        call, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
        for rank in range(2)]
    try:
        errors = "".join(process.communicate(timeout=120)[1] for process in running)
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [2, 2]
    assert "error: The processes have different arguments or weights" in errors


def test_results_of_two_names_with_dots_do_not_share_a_checkpoint(tmp_path, weights, call):
    data = put_imagenet(tmp_path / "data", train=4, val=2)
    for lr in (0.01, 0.05):
        call("eval_linear", "--weights", weights, "--data", data, *SMALL, "--epochs", 1,
             "--lr", lr, "--output", tmp_path / f"lr{lr}")
    assert sorted(path.name for path in tmp_path.glob("lr*")) == [
        "lr0.01", "lr0.01.checkpoint.pth", "lr0.05", "lr0.05.checkpoint.pth"]


def test_mistakes_of_one_script(tmp_path, weights, call):
    imagenet = put_imagenet(tmp_path / "data", train=2, val=2)
    voc = put_voc(tmp_path / "voc", 20, 20)
    with pytest.raises(UserError, match="--k 200: the bank has only 6 images"):
        call("eval_knn", "--weights", weights, "--data", imagenet, "--k", 5, 200)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: File exists"):
        call("eval_knn", "--weights", weights, "--data", imagenet, "--features-cache",
             tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: it must be a file"):
        call("eval_knn", "--weights", weights, "--data", imagenet, "--output", tmp_path / "pipe")
    for script in ("eval_knn", "eval_linear"):
        with pytest.raises(UserError, match="several classes an image.*eval_svm.py"):
            call(script, "--weights", weights, "--data", voc)
    os.remove(f"{voc}/VOCdevkit/VOC2007/JPEGImages/test0003.jpg")
    with pytest.raises(UserError, match="test0003.jpg does not exist"):
        call("eval_svm", "--weights", weights, "--data", voc)
    match = "class 'n00000000' of .*train has 2 of the 6 images.*--train-images"
    with pytest.raises(UserError, match=match):
        call("eval_svm", "--weights", weights, "--data", imagenet, *SMALL, "--shots")
    with pytest.raises(UserError, match="--train-images 7: .*train has only 6"):
        call("eval_svm", "--weights", weights, "--data", imagenet, *SMALL,
             "--train-images", 7)
    with pytest.raises(UserError, match="--batch-size|not a whole number"):
        call("eval_linear", "--weights", weights, "--data", imagenet, "--batch-size", 0)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran.txt",)


def test_unfit_weights_are_one_sentence_and_exit_code_2(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save({"state_dict": Malicious()}, tmp_path / "malicious.pth")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    torch.save({"features.0.weight": torch.ones(3)}, tmp_path / "other.pth")
    for file, script, processes, word in (("malicious.pth", "eval_svm", 1, "system"),
                                          ("vit.pth", "eval_knn", 2, "Vision"),
                                          ("other.pth", "eval_linear", 1, "no ResNet")):
        done = subprocess.run(
            command(script, "--weights", file, "--data", "shapes", "--device", "cpu",
                    processes=processes),
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and word in errors[0]
        assert not os.path.exists(tmp_path / "ran.txt")
        if processes == 1:
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
            assert "Traceback" not in done.stderr
        else:
            assert done.returncode != 0 and "exitcode  : 2" in done.stderr  # torchrun's report


@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_svm"])
def test_help_fits_80_columns(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).make_parser().parse_args()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for group in ("data:", "network:", "run:", "--weights", "--output"):
        assert group in text


def test_signal_stops_and_the_same_command_continues(tmp_path, weights):
    data = put_imagenet(tmp_path / "data")
    arguments = ("--weights", weights, "--data", data, *SMALL, "--batch-size", 4, "--epochs", 4,
                 "--output", tmp_path / "a.json")
    running = subprocess.Popen(command("eval_linear", *arguments), cwd=ROOT, env=environment(),
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in running.stdout:
        if line.startswith("epoch 1/"):
            running.send_signal(signal.SIGTERM)
            break
    rest = running.stdout.read()
    assert running.wait(60) == 128 + signal.SIGTERM, rest
    assert not os.path.exists(tmp_path / "a.json")
    out = start("eval_linear", *arguments)
    assert "Continuing" in out and "epoch 1/" not in out
    start("eval_linear", *arguments[:-1], tmp_path / "b.json")
    first, second = (results_of(tmp_path / name) for name in ("a.json", "b.json"))
    assert first["history"] == second["history"]


def test_version_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_knn", "--version"])
    with pytest.raises(SystemExit):
        importlib.import_module("eval_knn").make_parser().parse_args()
    assert odc.__version__ in capsys.readouterr().out
