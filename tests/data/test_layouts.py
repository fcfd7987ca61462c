"""Every published set is recognised by its files, and read as torchvision reads it."""

import os

import numpy as np
import pytest
import torch
import torchvision

from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, file_names
from tests.layouts import (made_up, put_cifar10, put_cifar100, put_fashion_mnist, put_files,
                           put_imagenet_lists, put_inaturalist, put_places, put_stl10, put_text,
                           put_voc, voc_target)


def names(opened):
    return [opened.name_of(i) for i in range(len(opened))]


def both(root):
    return open_dataset(str(root)), open_dataset(str(root), "val")


@pytest.mark.parametrize("put, name, files, train_labels, val_labels, classes", [
    (put_imagenet_lists, "imagenet", ["n02/b c.JPEG", "n01/a.JPEG", "n03/d.JPEG"],  # in their order
     [0, 2, 4], [0, 2], ["0", "1", "2", "3", "4"]),
    (put_places, "places205", [f"a/abbey/train{i}.jpg" for i in range(4)],
     [0, 1, 2, 3], [0, 1], ["0", "1", "2", "3"]),
    (put_inaturalist, "inaturalist2018",
     [f"train_val2018/Plantae/7477/train{i}.jpg" for i in range(3)],
     [2, 1, 0], [1, 0], ["plant 0", "plant 1", "plant 2"]),
])
def test_lists(tmp_path, put, name, files, train_labels, val_labels, classes):
    put(tmp_path)
    train, val = both(tmp_path)
    assert train.name == val.name == name and names(train) == files
    assert train.labels.tolist() == train_labels and val.labels.tolist() == val_labels
    assert train.classes == val.classes == classes
    assert [opened.load(1).size for opened in (train, val)] == [(8, 6)] * 2


def test_imagenet_lists_without_labels(tmp_path):
    put_files(tmp_path, "train/b c.JPEG")
    put_text(tmp_path / "meta" / "train.txt", ["b c.JPEG"])
    train = open_dataset(str(tmp_path))
    assert train.labels is None and names(train) == ["b c.JPEG"]


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc07(tmp_path, capsys, given):
    put_voc(tmp_path)
    train, held = both(tmp_path / given)
    assert train.name == "voc07" and train.labels is None and len(train.classes) == 20
    assert names(held) == ["JPEGImages/test0.jpg", "JPEGImages/test1.jpg"]
    assert train.targets.tolist() == [[voc_target(i, k) for k in range(20)] for i in range(3)]
    assert torch.equal(held.targets, train.targets[:2]) and train.targets.dtype == torch.int8
    assert capsys.readouterr().out == ""
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir()
    both(tmp_path / given)
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith("VOC2007: of VOC2007, VOC2012 this folder alone is read.")


@pytest.mark.parametrize("put, name, reader", [
    (put_cifar10, "cifar10", torchvision.datasets.CIFAR10),
    (put_cifar100, "cifar100", torchvision.datasets.CIFAR100)])
def test_cifar(tmp_path, monkeypatch, put, name, reader):
    put(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    for given in ("", reader.base_folder):
        for opened in both(tmp_path / given):
            reference = reader(str(tmp_path), train=opened.split == "train")
            assert opened.name == name and opened.classes == reference.classes
            assert opened.labels.tolist() == reference.targets
            assert all(np.array_equal(opened.load(i), reference[i][0]) for i in range(len(opened)))


@pytest.mark.parametrize("given", ["", "stl10_binary"])
def test_stl10(tmp_path, monkeypatch, given):
    put_stl10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for opened, part in zip(both(tmp_path / given), ("train", "test")):
        reference = torchvision.datasets.STL10(str(tmp_path), split=part)
        assert opened.name == "stl10" and opened.labels.tolist() == reference.labels.tolist()
        assert all(np.array_equal(opened.load(i), reference[i][0]) for i in range(len(reference)))


def test_stl10_with_unlabelled_images_only(tmp_path):
    put_stl10(tmp_path, [("unlabeled", 4)])
    (tmp_path / "stl10_binary" / "unlabeled_y.bin").unlink()  # the real set has none
    opened = open_dataset(str(tmp_path))
    assert len(opened) == 4 and opened.labels is None and opened.load(3).size == (96, 96)


@pytest.mark.parametrize("folder, zipped, name", [
    ("fashion", True, "fashion-mnist"), ("FashionMNIST/raw", False, "fashion-mnist"),
    ("raw", True, "mnist")])  # other sets in these files have numbers for classes
def test_mnist_files(tmp_path, folder, zipped, name):
    root = tmp_path / "pictures"
    put_fashion_mnist(root / folder, zipped)
    train, held = both(root / folder if folder == "fashion" else root)
    assert train.name == name and len(held) == 3
    assert train.labels.tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 9, 0, 0]
    assert train.classes[9] == held.classes[9] == ("9" if name == "mnist" else "Ankle boot")
    assert np.array_equal(np.asarray(held.load(2))[:, :, 1], made_up(3, 28, 28, seed=3)[2])


def test_names_are_kept_as_they_are():
    given = ["a.jpg", "", "ünïcødé/图片.png", "line\nbreak", os.fsdecode(b"latin\xe9")]
    kept = ImageSet("folder", "train", "here", names=file_names(iter(given)))
    assert [kept.name_of(i) for i in range(len(kept))] == given


def test_fingerprint_changes_with_names_order_number_and_split_alone():
    def fingerprint(*given, split="train", root="here"):
        return ImageSet("folder", split, root, names=file_names(given)).fingerprint

    assert fingerprint("a", "b") == fingerprint("a", "b", root="moved/elsewhere")
    given = ["abc", "ab", "acb", "abcd", ("ab", "c"), ("a", "bc")]
    others = {fingerprint(*names) for names in given} | {fingerprint(*"abc", split="val")}
    assert len(others) == 7
