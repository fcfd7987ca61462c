"""Folders of images: what is read, what has labels, and what the one line says."""

import os

import pytest
import torchvision

from odc.data.datasets import open_dataset
from odc.errors import UserError
from tests.layouts import put_files, put_image


def names(opened):
    return [opened.name_of(i) for i in range(len(opened))]


def read(root, capsys, **options):
    """The names that the train split has, and the line that says what is read."""
    found = names(open_dataset(str(root), **options))
    line = capsys.readouterr().out
    assert line.count("\n") == (line != "")
    return found, line.removeprefix(f"{root}: ").rstrip()


# --- splits and labels ---------------------------------------------------------------------------


def test_imagenet_folders(tmp_path):
    put_files(tmp_path, *(f"train/{c}/{i}.JPEG" for c in ("n01440764", "n01443537")
                          for i in range(3)), "val/n01443537/0.JPEG", "val/n01443537/1.JPEG")
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert train.name == held.name == "imagenet" and held.split == "val"
    reference = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert train.labels.tolist() == reference.targets and held.labels.tolist() == [1, 1]
    assert train.classes == held.classes == reference.classes
    assert [f"{train.root}/{name}" for name in names(train)] == [p for p, _ in reference.samples]


@pytest.mark.parametrize("files, train, val", [
    (["train/a.jpg", "val/b.jpg", "test/c.jpg"], "train", "val"),
    (["Training/a.jpg", "VALID/b.jpg", "Test/c.jpg"], "Training", "VALID"),
    (["TRAIN/a.jpg", "testing/b.jpg", "Validation/c.jpg"], "TRAIN", "Validation"),
    (["train/a.jpg", "Train/b.jpg", "test/c.jpg"], "train", "test"),
])
def test_spellings_of_splits(tmp_path, capsys, files, train, val):
    put_files(tmp_path, *files)
    line = read(tmp_path, capsys)[1]
    assert line.startswith(f"train is {train}/; val is {val}/")
    assert "not read beside it: " in line and "(1 in all)" in line
    assert open_dataset(str(tmp_path), "val").root == str(tmp_path / val)
    assert capsys.readouterr().out == ""  # it is said once, for train


def test_train_and_val_of_ones_own(tmp_path):
    """Folders may lie in folders there; a class without images is none, in either split."""
    put_files(tmp_path, "train/zebra/a.jpg", "train/ant/images/b.jpg", "train/ant/boxes.txt",
              "train/empty/", "val/ant/a.jpg", "val/zebra/b.jpg", "val/other/")
    train, held = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "val")
    assert held.name == "folder" and train.classes == held.classes == ["ant", "zebra"]
    assert train.labels.tolist() == held.labels.tolist() == [0, 1]
    put_image(tmp_path / "val" / "yak" / "c.jpg")
    with pytest.raises(UserError, match="yak is a class that the train split does not have"):
        open_dataset(str(tmp_path), "val")


def test_folder_of_class_folders(tmp_path):
    """Folders may be named like the files of published sets."""
    put_files(tmp_path, "meta/a.jpg", "data_batch_1/b.jpg", "train2018.json/c.jpg", "empty/")
    opened = open_dataset(str(tmp_path))
    assert opened.name == "folder" and opened.labels.tolist() == [0, 1, 2]
    assert opened.classes == ["data_batch_1", "meta", "train2018.json"]


@pytest.mark.parametrize("files, reason", [
    (["a.png", "b.jpg", "c.JPEG"], ""),
    (["2023/a.jpg", "2023/may/b.jpg", "2024/c.jpg"], "there are folders in folders"),
    (["a.jpg", "x/b.jpg", "y/c.jpg"], "1 images lie outside of its folders"),
    (["only/a.jpg", "only/b.jpg"], "there is only one folder"),
])
def test_images_without_labels(tmp_path, capsys, files, reason):
    put_files(tmp_path, *files)
    assert read(tmp_path, capsys) == (files, reason and f"no labels, as {reason}.")
    assert open_dataset(str(tmp_path)).labels is None


# --- what is passed over -------------------------------------------------------------------------


@pytest.mark.parametrize("files, count, what", [
    ([".hidden.jpg", "._a.jpg", ".cache/b.jpg", ".Trash-1000/c.jpg"], 0, ""),
    (["b.HEIC", "x/c.heic", "x/y/d.Heic", "x/e.jpg"], 3, ".heic files"),
    (["IMG_1234", "x/e.jpg", "x/f"], 2, "other files"),
    (["@eaDir/a.jpg/THUMB_M.jpg", "#recycle/b.jpg", "__MACOSX/c.jpg", "$RECYCLE.BIN/d.jpg",
      "lost+found/"], 5, "system folders"),
    (["empty/", "deep/er/notes.txt"], 2, "folders without images"),
    (["out/checkpoint.pth", "out/log.jsonl", "out/clusters.png", "x/run/checkpoint.pth", "x/e.jpg",
      "x/run/log.jsonl", "x/run/f.jpg"], 2, "folders of runs, or reached twice"),
])
def test_what_is_passed_over(tmp_path, capsys, files, count, what):
    put_files(tmp_path, "a.jpg", "folder.jpg/z.jpg", *files)
    found, line = read(tmp_path, capsys)
    assert found == ["a.jpg", "folder.jpg/z.jpg"] + ["x/e.jpg"] * ("x/e.jpg" in files)
    assert f"{what} ({count})" in line if count else "passed over" not in line


def test_excluded_folders(tmp_path, capsys):
    """--output lies among the pictures; or the pictures lie in --output itself."""
    put_files(tmp_path, "a/1.jpg", "b/2.jpg", "out/3.jpg")
    assert read(tmp_path, capsys, exclude=[str(tmp_path / "out")])[0] == ["a/1.jpg", "b/2.jpg"]
    put_files(tmp_path, "checkpoint.pth", "log.jsonl")
    assert len(read(tmp_path, capsys, exclude=[str(tmp_path)])[0]) == 3


def test_links(tmp_path, capsys):
    """Each folder is read once, by its own name if it has one here; no link leads round or away."""
    root = tmp_path / "data"
    put_files(tmp_path, "elsewhere/a.jpg", "elsewhere/deep/b.jpg", "data/x/c.jpg",
              "data/.blobs/d.jpg", "data/sha256")
    for link, target in {
            "folder": tmp_path / "elsewhere", "twice": tmp_path / "elsewhere" / "deep",
            "a_link": root / "x", "x/round": root, "x/self": "self", "self.jpg": "self.jpg",
            "hidden": root / ".blobs", "x/linked.jpg": tmp_path / "elsewhere" / "a.jpg",
            "x/again.jpg": root / "x" / "c.jpg", "blob.jpg": root / "sha256",
            "gone.jpg": "nowhere"}.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")  # opening it would wait for ever
    found, line = read(root, capsys)
    assert found == ["blob.jpg", "folder/a.jpg", "folder/deep/b.jpg", "hidden/d.jpg", "x/c.jpg",
                     "x/linked.jpg"]
    for words in ("broken links and special files (4)", "links to images here (2)",
                  "folders of runs, or reached twice (2)"):
        assert words in line


def test_a_locked_folder(tmp_path, capsys, monkeypatch):
    put_files(tmp_path, "ant/a.jpg", "bee/b.jpg", "locked/c.jpg")
    real = os.scandir

    def denied(path):  # the super-user, who may run this, is never denied
        if "/locked/" in path:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    found, line = read(tmp_path, capsys)
    assert found == ["ant/a.jpg", "bee/b.jpg"] and "folders that cannot be opened (1)" in line
    with pytest.raises(UserError, match="Permission denied.*; --data must be complete"):
        open_dataset(str(tmp_path / "locked"))


def test_opening_looks_at_no_image(tmp_path, monkeypatch):
    """Only the folders are listed, or a million files would take minutes."""
    put_files(tmp_path, "cat/a.JPEG", "dog/b.JPEG")
    touched = []
    for name in ("open", "stat", "lstat"):
        def noted(path, *args, real=getattr(os, name), **options):
            touched.append(str(path))
            return real(path, *args, **options)
        monkeypatch.setattr(os, name, noted)
    assert len(open_dataset(str(tmp_path))) == 2
    assert touched and not any(path.endswith(".JPEG") for path in touched)
