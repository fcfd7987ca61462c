"""Every layout that users have is recognised, by its files, and read as torchvision reads it."""

import builtins
import os

import numpy as np
import pytest
import torch
import torchvision

from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.data.images import ImageSet, Names
from tests.layouts import (made_up, put_cifar10, put_cifar100, put_class_folders,
                           put_fashion_mnist, put_image, put_imagenet_lists, put_inaturalist,
                           put_places, put_stl10, put_text, put_voc,
                           trust_cifar)

FASHION = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist


def names(opened):
    return [opened.name_of(i) for i in range(len(opened))]


def colour(opened, i):
    return opened.load(i).getpixel((0, 0))


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_imagenet_folders(tmp_path, val):
    put_class_folders(tmp_path / "train")
    # Its numbers are still those of train.
    put_class_folders(tmp_path / val, classes=["n01443537"], count=2)
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert (train.name, train.split) == ("imagenet", "train")
    assert (held.name, held.split) == ("imagenet", "val")
    expected = [f"{c}/{c}_{i}.JPEG" for c in ("n01440764", "n01443537") for i in range(3)]
    assert names(train) == expected
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and held.labels.tolist() == [1, 1]
    assert train.classes == held.classes == ["n01440764", "n01443537"]
    reference = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert train.labels.tolist() == reference.targets and train.classes == reference.classes
    paths = [os.path.join(train.root, name) for name in names(train)]
    assert paths == [path for path, _ in reference.samples]
    assert train.labels.dtype == torch.int64 and train.targets is None


def test_class_folders_with_folders_below(tmp_path):
    """As Tiny ImageNet has them: train/CLASS/images/FILE, and a val folder without labels."""
    for name in ("n01443537", "n01629819"):
        put_image(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
        put_text(tmp_path / "train" / name / f"{name}_boxes.txt", "n01443537_0.JPEG 0 10 63 58")
    put_image(tmp_path / "val" / "images" / "val_0.JPEG")
    put_text(tmp_path / "val" / "val_annotations.txt", "val_0.JPEG n01443537 0 32 44 62")
    train = open_dataset(str(tmp_path))
    assert train.labels.tolist() == [0, 1]
    assert names(train)[0] == "n01443537/images/n01443537_0.JPEG"


def test_train_and_val_of_ones_own(tmp_path):
    put_class_folders(tmp_path / "train", ["zebra", "ant"])
    put_class_folders(tmp_path / "val", ["ant", "zebra"], 1)
    held = open_dataset(str(tmp_path), "val")
    assert held.name == "folder" and held.classes == ["ant", "zebra"]
    assert held.labels.tolist() == [0, 1]
    put_class_folders(tmp_path / "val", ["yak"], 1)
    with pytest.raises(UserError, match="yak is a class that the train split does not have"):
        open_dataset(str(tmp_path), "val")


def test_train_and_val_without_labels(tmp_path):
    put_image(tmp_path / "train" / "a.jpg")
    put_image(tmp_path / "val" / "b.jpg")
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert train.labels is held.labels is train.classes is None
    assert (names(train), names(held)) == (["a.jpg"], ["b.jpg"])


def test_folders_named_like_the_files_of_a_data_set(tmp_path):
    for name in ("meta", "data_batch_1", "cats", "train2018.json"):
        put_image(tmp_path / name / "a.png")
    opened = open_dataset(str(tmp_path))
    assert opened.name == "folder" and len(opened) == len(opened.classes) == 4


def test_a_class_that_is_called_train(tmp_path, capsys):
    for name in ("cats", "planes", "train"):
        put_image(tmp_path / name / "a.png")
    assert len(open_dataset(str(tmp_path))) == 1
    assert "only the folder train is read" in (said := capsys.readouterr().out)
    assert "2 others, such as 'cats'" in said
    put_image(tmp_path / "val" / "a.png")
    open_dataset(str(tmp_path))
    assert not capsys.readouterr().out


def test_folder_of_class_folders(tmp_path):
    put_class_folders(tmp_path, ["cat", "dog"])
    (tmp_path / "empty").mkdir()
    put_text(tmp_path / "README.txt", "ours")
    opened = open_dataset(str(tmp_path))
    assert opened.name == "folder" and opened.classes == ["cat", "dog"]
    assert opened.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="has no val split"):
        open_dataset(str(tmp_path), "val")


@pytest.mark.parametrize("files", [
    ["b.jpg", "a.png", "c.JPEG"],
    ["2023/a.jpg", "2023/may/b.jpg", "2024/c.jpg"],
    ["a.jpg", "x/b.jpg", "y/c.jpg"],
    ["only/a.jpg", "only/b.jpg"],
])
def test_images_without_labels(tmp_path, files):
    for name in files:
        put_image(tmp_path / name)
    opened = open_dataset(str(tmp_path))
    assert opened.name == "folder" and opened.labels is None and opened.classes is None
    assert sorted(names(opened)) == sorted(files)
    assert all(opened.load(i).size == (8, 6) for i in range(len(opened)))


def test_what_is_no_image_is_left_out(tmp_path):
    put_image(tmp_path / "a.jpg")
    for name in (".hidden.jpg", "._a.jpg", "notes.txt", "a.jpg.part", "Thumbs.db"):
        put_text(tmp_path / name, "")
    put_image(tmp_path / ".cache" / "b.jpg")
    put_image(tmp_path / "folder.jpg" / "c.jpg")  # a folder that is called like an image
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    assert names(open_dataset(str(tmp_path))) == ["a.jpg", "folder.jpg/c.jpg"]


def test_links(tmp_path):
    put_image(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "x" / "round").symlink_to(tmp_path / "data")  # a circle
    opened = open_dataset(str(tmp_path / "data"))
    assert names(opened) == ["folder/a.jpg", "x/linked.jpg"]


def test_images_in_other_formats_are_counted_in_one_line(tmp_path, capsys):
    put_image(tmp_path / "a.jpg")
    assert len(open_dataset(str(tmp_path))) == 1 and capsys.readouterr().out == ""
    for name in ("b.HEIC", "x/c.heif", "x/y/d.avif", "e.CR2", "f.txt", ".g.heic"):
        put_text(tmp_path / name, "")
    assert names(open_dataset(str(tmp_path))) == ["a.jpg"]
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: 4 HEIC, AVIF or raw files are passed over")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match="no images found"):
        open_dataset(str(tmp_path))


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
def test_voc07(tmp_path, given):
    put_voc(tmp_path)
    train, held = open_dataset(str(tmp_path / given)), open_dataset(str(tmp_path / given), "val")
    assert train.name == "voc07" and train.labels is None and len(train.classes) == 20
    assert train.classes == sorted(train.classes)
    assert names(held) == ["JPEGImages/000001.jpg", "JPEGImages/000002.jpg"]
    expected = [[1 if (i + k) % 3 == 0 else 0 if (i + k) % 5 == 0 else -1 for k in range(20)]
                for i in range(3)]
    assert train.targets.tolist() == expected and train.targets.dtype == torch.int8
    assert held.targets.tolist() == expected[:2]


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


def test_opening_looks_at_no_image(tmp_path, monkeypatch):
    """Only the folders are listed, or a million files would take minutes."""
    put_class_folders(tmp_path, ["cat", "dog"])
    touched = []
    for module, name in ((builtins, "open"), (os, "open"), (os, "stat"), (os, "lstat")):
        def noted(path, *args, real=getattr(module, name), **options):
            touched.append(str(path))
            return real(path, *args, **options)
        monkeypatch.setattr(module, name, noted)
    assert len(open_dataset(str(tmp_path))) == 6
    assert touched and not any(path.endswith(".JPEG") for path in touched)
