"""Every layout that users have is recognised, by its files, and read as torchvision reads it."""

import os

import numpy as np
import pytest
import torch
import torchvision

from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, Names
from tests.layouts import (made_up, put_cifar10, put_cifar100, put_fashion_mnist,
                           put_imagenet_lists, put_inaturalist, put_places, put_stl10, put_voc,
                           trust_cifar)

FASHION = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist


def names(opened):
    return [opened.name_of(i) for i in range(len(opened))]


def colour(opened, i):
    return opened.load(i).getpixel((0, 0))


# --- lists ---------------------------------------------------------------------------------------


def test_imagenet_lists(tmp_path):
    put_imagenet_lists(tmp_path)
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert train.name == held.name == "imagenet"
    assert names(train) == ["n02/b c.JPEG", "n01/a.JPEG", "n03/d.JPEG"]  # in the order of the list
    assert train.labels.tolist() == [0, 2, 4] and held.labels.tolist() == [0, 2]
    assert len(train.classes) == len(held.classes) == 5
    assert colour(held, 1)[0] > 60


def test_imagenet_lists_without_labels(tmp_path):
    put_imagenet_lists(tmp_path, labels=False)
    train = open_dataset(str(tmp_path))
    assert train.labels is None and names(train)[0] == "n02/b c.JPEG"


def test_places205(tmp_path):
    put_places(tmp_path)
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert train.name == "places205"
    assert train.labels.tolist() == [0, 1, 2, 3] and held.labels.tolist() == [0, 1]
    assert len(train.classes) == len(held.classes) == 4
    assert names(held) == ["a/abbey/val0.jpg", "a/abbey/val1.jpg"]
    assert abs(colour(train, 3)[0] - 150) < 3


def test_inaturalist2018(tmp_path):
    put_inaturalist(tmp_path)
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert train.name == "inaturalist2018"
    assert train.labels.tolist() == [2, 1, 0] and held.labels.tolist() == [1, 0]
    assert train.classes == held.classes == ["plant 0", "plant 1", "plant 2"]
    assert abs(colour(train, 2)[0] - 100) < 3


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc07(tmp_path, capsys, given):
    put_voc(tmp_path)
    train, held = open_dataset(str(tmp_path / given)), open_dataset(str(tmp_path / given), "val")
    assert train.name == "voc07" and train.labels is None and len(train.classes) == 20
    assert train.classes == sorted(train.classes)
    assert names(held) == ["JPEGImages/000001.jpg", "JPEGImages/000002.jpg"]
    expected = [[1 if (i + k) % 3 == 0 else 0 if (i + k) % 5 == 0 else -1 for k in range(20)]
                for i in range(3)]
    assert train.targets.tolist() == expected and train.targets.dtype == torch.int8
    assert held.targets.tolist() == expected[:2]
    assert capsys.readouterr().out == ""
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir()
    open_dataset(str(tmp_path / given), "val")
    open_dataset(str(tmp_path / given))
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith("VOC2007: this folder alone is read, not VOC2012 beside it.")


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, monkeypatch, given):
    put_cifar10(tmp_path)
    trust_cifar(monkeypatch, tmp_path)
    for split in ("train", "val"):
        opened = open_dataset(str(tmp_path / given), split)
        reference = torchvision.datasets.CIFAR10(str(tmp_path), train=split == "train")
        assert opened.name == "cifar10"
        assert len(opened) == len(reference) == (20 if split == "train" else 4)
        assert opened.labels.tolist() == reference.targets and opened.classes == reference.classes
        assert all(np.array_equal(opened.load(i), reference[i][0]) for i in range(len(opened)))


@pytest.mark.parametrize("given", ["", "cifar-100-python"])
def test_cifar100(tmp_path, monkeypatch, given):
    put_cifar100(tmp_path)
    trust_cifar(monkeypatch, tmp_path)
    train, held = open_dataset(str(tmp_path / given)), open_dataset(str(tmp_path / given), "val")
    assert train.name == held.name == "cifar100" and len(train.classes) == 100
    assert train.labels.tolist() == [0, 9, 18, 27, 36, 45] and held.labels.tolist() == [0, 9, 18]
    pixels = made_up(3, 3072, seed=3)[1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(held.load(1)), pixels)


class Stl10WithoutChecksums(torchvision.datasets.STL10):
    def _check_integrity(self):
        return True


@pytest.mark.parametrize("given", ["", "stl10_binary"])
def test_stl10(tmp_path, given):
    put_stl10(tmp_path)
    for split in ("train", "val"):
        opened = open_dataset(str(tmp_path / given), split)
        part = "train" if split == "train" else "test"
        reference = Stl10WithoutChecksums(str(tmp_path), split=part)
        assert opened.name == "stl10" and opened.labels.tolist() == reference.labels.tolist()
        assert all(np.array_equal(opened.load(i), reference[i][0]) for i in range(len(reference)))


def test_stl10_with_unlabelled_images_only(tmp_path):
    put_stl10(tmp_path, [("unlabeled", 4)])
    (tmp_path / "stl10_binary" / "unlabeled_y.bin").unlink()  # the real set has none
    opened = open_dataset(str(tmp_path))
    assert len(opened) == 4 and opened.labels is None and opened.load(3).size == (96, 96)


@pytest.mark.parametrize("folder, zipped", [
    ("fashion", True), ("FashionMNIST/raw", False), ("FashionMNIST/raw", True)])
def test_fashion_mnist(tmp_path, folder, zipped):
    put_fashion_mnist(tmp_path / folder, zipped)
    root = str(tmp_path / folder) if folder == "fashion" else str(tmp_path)
    train, held = open_dataset(root), open_dataset(root, "val")
    assert train.name == "fashion-mnist" and len(held) == 12
    assert train.labels.tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 9, 0, 0]
    assert train.classes[9] == held.classes[9] == "Ankle boot"
    image = np.asarray(held.load(2))
    assert image.shape == (28, 28, 3)
    assert np.array_equal(image[:, :, 1], made_up(12, 28, 28, seed=12)[2])


def test_other_sets_in_mnists_files_have_numbers_for_classes(tmp_path):
    root = tmp_path / "pictures"  # pytest names the folder above after the test
    put_fashion_mnist(root / "raw", first_labels=[5, 0, 4, 1])  # MNIST's own
    opened = open_dataset(str(root))
    assert opened.name == "mnist" and opened.classes == list("0123456789") and len(opened) == 13


@pytest.mark.skipif(not os.path.isdir(FASHION), reason="needs Debian's dataset-fashion-mnist")
def test_debians_fashion_mnist():
    train, held = open_dataset(FASHION), open_dataset(FASHION, "val")
    assert (len(train), len(held)) == (60000, 10000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert held.labels.bincount().tolist() == [1000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert train.load(0).size == (28, 28) and np.asarray(train.load(0)).mean() > 20


# --- names and fingerprints ----------------------------------------------------------------------


def test_names_are_kept_as_they_are():
    given = ["a.jpg", "", "ünïcødé/图片.png", "with space.jpg", "line\nbreak.jpg",
             os.fsdecode(b"latin\xe9"), "z" * 300]
    kept = Names(iter(given))
    assert len(kept) == len(given) and [kept[i] for i in range(len(given))] == given


def test_fingerprint_changes_with_names_order_number_and_split_alone(tmp_path):
    def fingerprint(*given, split="train", root="here"):
        return ImageSet("folder", split, root, names=Names(given)).fingerprint

    same = fingerprint("a", "b", "c")
    assert same == fingerprint("a", "b", "c", root="moved/elsewhere") and len(same) == 16
    others = [fingerprint("a", "b"), fingerprint("a", "c", "b"), fingerprint("a", "b", "c", "d"),
              fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("a", "b", "x"),
              fingerprint("a", "b", "c", split="val")]
    assert same not in others and len(set(others)) == len(others)
    assert open_dataset("shapes").fingerprint != open_dataset("shapes", "val").fingerprint
