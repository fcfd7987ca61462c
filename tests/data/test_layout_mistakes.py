"""A data set that is missing, incomplete or damaged gives one sentence with the path."""

import gzip
import os
import pickle

import pytest

from odc.data.datasets import open_dataset
from odc.errors import UserError
from tests.layouts import (made_up, put_cifar10, put_fashion_mnist, put_files, put_image,
                           put_imagenet_lists, put_inaturalist, put_places, put_stl10, put_voc,
                           trust_cifar)


def expect(sentence, data, split):
    with pytest.raises(UserError, match=sentence) as caught:
        open_dataset(str(data), split)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and str(data) in text


@pytest.mark.parametrize("files, split, sentence", [
    ([], "train", "no images found"),
    (["notes.txt"], "train", "no images found; the names of images end in .jpg"),
    (["train/cat/", "train/dog/"], "train", "train: no images found"),
    (["train/cat/a.jpg", "train/dog/b.jpg"], "val",
     "has no val split: the folder .*val is missing"),
    (["val/cat/a.jpg", "val/dog/b.jpg"], "train",
     "has no train split: the folder .*train is missing"),
    (["train/cat/a.jpg", "train/dog/b.jpg", "val/"], "val", "val: no images found"),
    (["a.jpg", "b.jpg"], "val", "has no val split: give a folder that holds train/ and val/"),
])
def test_folders(tmp_path, files, split, sentence):
    put_files(tmp_path, *files)
    expect(sentence, tmp_path, split)


class Malicious:
    """Unpickled without care, this makes a file."""

    def __reduce__(self):
        return os.system, ("touch odc-was-here",)


BATCH = "cifar-10-batches-py/test_batch"
CIFAR = "cifar-10-batches-py: a file of cifar10 is missing or damaged; download the set again"
LABELS = "train-labels-idx1-ubyte.gz"
PIXELS = "train-images-idx3-ubyte.gz"
MAIN = "VOCdevkit/VOC2007/ImageSets/Main"

# The layout, the file that is changed, to which bytes (None: taken away; a number: cut there), the
# split, the sentence.
DAMAGED = [
    (put_imagenet_lists, "meta/val.txt", None, "val", "val.txt is missing: the val split needs it"),
    (put_imagenet_lists, "meta/train.txt", b"\n", "train", "train.txt is empty"),
    (put_imagenet_lists, "meta/train.txt", b"a.jpg 0\n\nb.jpg\n", "train",
     "train.txt, line 3: 'b.jpg' should be a path and a label"),
    (put_imagenet_lists, "meta/val.txt", b"p.jpg 1\nq.jpg 0\n", "val",
     "val/p.jpg does not exist, though .*val.txt"),
    (put_places, "trainvalsplit_places205/val_places205.csv", None, "val",
     "val_places205.csv is missing"),
    (put_inaturalist, "val2018.json", None, "val", "val2018.json is missing"),
    (put_inaturalist, "train2018.json", 50, "train",
     "train2018.json is damaged or incomplete .JSONDecodeError"),
    (put_inaturalist, "train2018.json", b'{"images": 7}', "train", "train2018.json is damaged"),
    (put_inaturalist, "train2018.json", b'{"images": [], "annotations": []}', "train",
     "train2018.json is empty"),
    (put_voc, f"{MAIN}/test.txt", None, "val", "test.txt is missing: the val split needs it"),
    (put_voc, f"{MAIN}/cat_trainval.txt", b"000005 1\n000008 1\n", "train",
     "cat_trainval.txt in .* must give each image of trainval.txt 1, -1 or 0"),
    (put_voc, f"{MAIN}/dog_test.txt", b"000001 2\n000002 1\n", "val",
     "dog_test.txt in .* must give each image of test.txt 1, -1 or 0"),
    (put_voc, "VOCdevkit/VOC2007/JPEGImages/000007.jpg", None, "train",
     "000007.jpg does not exist.* .1 of 3 are missing"),
    (put_cifar10, "cifar-10-batches-py/data_batch_3", 99, "train", CIFAR),
    (put_cifar10, BATCH, pickle.dumps({"data": made_up(4, 3072), "labels": [0] * 4}), "val", CIFAR),
    (put_cifar10, BATCH, pickle.dumps(Malicious()), "val", CIFAR),
    (put_stl10, "stl10_binary/train_X.bin", 1000, "train", "train_X.bin is damaged"),
    (put_stl10, "stl10_binary/test_X.bin", None, "val", "test_X.bin is missing"),
    (put_stl10, "stl10_binary/class_names.txt", b"\xff\xfe", "train", "class_names.txt is damaged"),
    (put_stl10, "stl10_binary/train_y.bin", 1, "train", "5 images, but 1 labels"),
    (put_fashion_mnist, PIXELS, 900, "train", "ubyte.gz is damaged .*EOFError"),
    (put_fashion_mnist, PIXELS, b"<html>", "train", "ubyte.gz is damaged .*BadGzipFile"),
    (put_fashion_mnist, PIXELS, gzip.compress(b"abc"), "train", "ubyte.gz is damaged .*ValueError"),
    (put_fashion_mnist, LABELS, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 13, *range(13)])),
     "train", "labels outside of its 10 classes"),
    (put_fashion_mnist, LABELS, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 4, 5])), "train",
     "13 images, but 2 labels"),
]


@pytest.mark.parametrize("put, path, content, split, sentence", DAMAGED,
                         ids=[f"{row[1]}-{row[4]}" for row in DAMAGED])
def test_damaged_files(tmp_path, monkeypatch, put, path, content, split, sentence):
    monkeypatch.chdir(tmp_path)
    put(tmp_path)
    trust_cifar(monkeypatch, tmp_path)
    if isinstance(content, int):
        content = (tmp_path / path).read_bytes()[:content]
    (tmp_path / path).unlink()
    if content is not None:
        (tmp_path / path).write_bytes(content)
    expect(sentence, tmp_path, split)
    assert not os.path.exists("odc-was-here")


def test_path_that_is_not_a_folder(tmp_path):
    expect("nowhere does not exist: --data takes a folder", tmp_path / "nowhere", "train")
    put_image(tmp_path / "a.jpg")
    expect("a.jpg is not a folder", tmp_path / "a.jpg", "train")
