"""Sets whose images lie in a few large files: CIFAR-10, CIFAR-100, STL-10 and Fashion-MNIST, as torchvision reads them.

Each function takes a folder and a split and returns an ImageSet, or None if the folder does not hold such a set.
Raises UserError for files that are damaged or missing.
"""

import codecs
import gzip
import math
import os
import pickle
import zlib

import numpy as np
import torch

from odc.errors import UserError
from odc.data.images import ImageSet

FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot"]


def cifar10(root, split):
    """`cifar-10-batches-py`: pickles of rows of 3 x 32 x 32 bytes."""
    folder = _first_with(root, ("", "cifar-10-batches-py"), ("data_batch_1", "test_batch"))
    if folder is None:
        return None
    files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar("cifar10", split, folder, files, "labels", "batches.meta", "label_names")


def cifar100(root, split):
    """`cifar-100-python`: the same, in one file a split."""
    folder = _first_with(root, ("", "cifar-100-python"), ("meta",))
    if folder is None:
        return None
    files = ["train" if split == "train" else "test"]
    return _cifar("cifar100", split, folder, files, "fine_labels", "meta", "fine_label_names")


def stl10(root, split):
    """`stl10_binary`: 96 x 96, column by column; train is the unlabelled images where only these are there."""
    folder = _first_with(root, ("", "stl10_binary"), ("train_X.bin", "test_X.bin", "unlabeled_X.bin"))
    if folder is None:
        return None
    stem = "train" if split == "train" else "test"
    if split == "train" and not os.path.exists(os.path.join(folder, "train_X.bin")):
        stem = "unlabeled"
    path = _required(folder, f"{stem}_X.bin", split)
    if os.path.getsize(path) == 0 or os.path.getsize(path) % (3 * 96 * 96):
        raise UserError(f"{path} is damaged: its size is not a multiple of one image's; download it again.")
    # Mapped, not read: the unlabelled images take 2.7 GB.
    pixels = np.memmap(path, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    opened = ImageSet("stl10", split, folder, pixels=pixels)
    if stem != "unlabeled":
        labels = np.fromfile(_required(folder, f"{stem}_y.bin", split), np.uint8)
        opened.labels = torch.from_numpy(labels.astype(np.int64)) - 1  # they are 1..10 in the file
        names = os.path.join(folder, "class_names.txt")
        opened.classes = open(names).read().split() if os.path.exists(names) else [str(k) for k in range(10)]
    return _checked(opened, path)


def fashion_mnist(root, split):
    """Four IDX files, gzipped or not, in `FashionMNIST/raw` or in the folder itself."""
    stem = "train" if split == "train" else "t10k"
    names = [f"{s}-images-idx3-ubyte{end}" for s in ("train", "t10k") for end in ("", ".gz")]
    folder = _first_with(root, ("", "raw", "FashionMNIST/raw"), names)
    if folder is None:
        return None
    pixels, path = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3, split)
    labels, _ = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1, split)
    opened = ImageSet("fashion-mnist", split, folder, pixels=pixels, labels=torch.from_numpy(labels.astype(np.int64)),
                      classes=list(FASHION_CLASSES))
    return _checked(opened, path)


def _first_with(root, folders, names):
    """The first of the folders below root that holds one of the named files, or None."""
    for folder in (os.path.join(root, f) if f else root for f in folders):
        if any(os.path.isfile(os.path.join(folder, name)) for name in names):
            return folder
    return None


def _required(folder, name, split):
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the {split} split needs it.")
    return path


def _checked(opened, path):
    """The set, if each image has one label that is the number of a class."""
    labels, classes = opened.labels, opened.classes
    if labels is not None:
        if len(labels) != len(opened):
            raise UserError(f"{path} holds {len(opened)} images, but its label file {len(labels)} labels; "
                            "download both again.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise UserError(f"{path}: a label is not among the {len(classes)} classes; download the files again.")
    return opened


def _cifar(name, split, folder, files, labels_key, meta_file, names_key):
    pixels, labels = [], []
    for path in (_required(folder, file, split) for file in files):
        content = _read_pickle(path)
        try:
            pixels.append(np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += list(content[labels_key])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} does not hold the images and labels of {name}; download it again.") from None
    meta = os.path.join(folder, meta_file)
    classes = list(_read_pickle(meta)[names_key]) if os.path.exists(meta) else [str(k) for k in range(max(labels) + 1)]
    opened = ImageSet(name, split, folder, pixels=np.ascontiguousarray(np.concatenate(pixels)),
                      labels=torch.tensor(labels, dtype=torch.int64), classes=classes)
    return _checked(opened, folder)


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, lists and texts, and nothing that could run a program."""

    def find_class(self, module, name):
        allowed = {
            "_reconstruct": np.zeros(0).__reduce__()[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": codecs.encode,
        }
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _read_pickle(path):
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise UserError(f"{path} is damaged or not a CIFAR file ({error}); download it again.") from None


def _read_idx(folder, name, dimensions, split):
    """An IDX file: two zero bytes, type 8 (bytes), the number of dimensions, each as 4 bytes, then the values."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        path = _required(folder, name + ".gz", split)
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is damaged: it cannot be decompressed; install it again.") from None
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != math.prod(shape):
        raise UserError(f"{path} is damaged: it is not a whole IDX file of bytes; install it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), path
