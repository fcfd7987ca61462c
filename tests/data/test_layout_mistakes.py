"""A data set that is missing, incomplete or damaged gives one sentence with the path."""

import gzip
import os
import pickle

import pytest

from odc.data.datasets import open_dataset
from odc.errors import UserError
from tests.layouts import (put_cifar10, put_fashion_mnist, put_files, put_imagenet_lists,
                           put_inaturalist, put_stl10, put_voc)


def expect(sentence, data, split):
    with pytest.raises(UserError, match=sentence) as caught:
        open_dataset(str(data), split)
    assert "\n" not in str(caught.value) and str(data) in str(caught.value)


NO_SPLIT = "has no (train|val) split: give a folder that holds train/ and val/"


@pytest.mark.parametrize("files, split, sentence", [
    (["notes.txt"], "train", "no images found; their names end in"),
    (["train/cat/", "train/dog/"], "train", "train: no images found"),
    (["train/cat/a.jpg", "train/dog/b.jpg"], "val", NO_SPLIT),
    (["val/cat/a.jpg", "val/dog/b.jpg"], "train", NO_SPLIT),
    (["train/cat/a.jpg", "train/dog/b.jpg", "val/"], "val", "val: no images found"),
    (["a.jpg", "b.jpg"], "val", NO_SPLIT),
])
def test_folders(tmp_path, files, split, sentence):
    put_files(tmp_path, *files)
    expect(sentence, tmp_path, split)


class Malicious:
    """Unpickled without care, this makes a file."""

    def __reduce__(self):
        return os.system, ("touch odc-was-here",)


BATCH = "cifar-10-batches-py/test_batch"
CIFAR = "cifar-10-batches-py: the .* split cannot be read .RuntimeError"
LABELS, PIXELS = "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"
MAIN, STL = "VOCdevkit/VOC2007/ImageSets/Main", "stl10_binary: the train split cannot be read"

# The layout, the file that is changed, to which bytes (None: taken away; a number: cut there), the
# split, the sentence.
DAMAGED = [
    (put_imagenet_lists, "meta/val.txt", None, "val", "FileNotFoundError.*meta/val.txt"),
    (put_imagenet_lists, "meta/train.txt", b"\n", "train", "train: no images found"),
    (put_imagenet_lists, "meta/train.txt", b"a.jpg 0\n\nb.jpg\n", "train",
     "train.txt: 1 of its 2 lines have a label"),
    (put_inaturalist, "train2018.json", 50, "train", "cannot be read .JSONDecodeError"),
    (put_voc, f"{MAIN}/test.txt", None, "val", "FileNotFoundError.*test.txt"),
    (put_voc, f"{MAIN}/cat_trainval.txt", b"trainval0 1\n", "train", "KeyError: 'trainval1'"),
    (put_cifar10, BATCH, pickle.dumps(Malicious()), "val", CIFAR),
    (put_stl10, "stl10_binary/train_X.bin", 1000, "train", f"{STL} .ValueError"),
    (put_stl10, "stl10_binary/train_y.bin", 1, "train", "the labels .* do not fit its 5 images"),
    (put_fashion_mnist, PIXELS, 900, "train", "cannot be read .EOFError"),
    (put_fashion_mnist, LABELS, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 13, *range(13)])),
     "train", "the labels .* do not fit its 13 images and 10 classes"),
]


@pytest.mark.parametrize("put, path, content, split, sentence", DAMAGED,
                         ids=[f"{row[1]}-{row[4]}" for row in DAMAGED])
def test_damaged_files(tmp_path, monkeypatch, put, path, content, split, sentence):
    monkeypatch.chdir(tmp_path)
    put(tmp_path)
    if isinstance(content, int):
        content = (tmp_path / path).read_bytes()[:content]
    (tmp_path / path).unlink()
    if content is not None:
        (tmp_path / path).write_bytes(content)
    expect(sentence, tmp_path, split)
    assert not os.path.exists("odc-was-here")
