"""What `--data` may be: `open_dataset` recognises a data set by the files in the folder.

    shapes                              the built-in set, no folder at all
    VOCdevkit/VOC2007, VOC2007          PASCAL VOC 2007; train is its trainval, val its test
    trainvalsplit_places205             Places205
    train2018.json, val2018.json        iNaturalist 2018
    meta/train.txt, meta/val.txt        ImageNet with lists: a path (and a label) in each line
    cifar-10-batches-py, cifar-100-python, stl10_binary, FashionMNIST/raw
                                        the files of torchvision's data sets; val is their test
    train/, val/, or any other folder   images; CLASS/IMAGE gives labels: see folders.py

`LAYOUTS` has a function of a folder and a split for each. It returns an ImageSet, and raises
UserError for files that are damaged or missing.
"""

import contextlib
import functools
import glob
import gzip
import json
import os

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from odc import distributed
from odc.data import shapes
from odc.data.folders import EXTENSIONS, image_folders
from odc.data.images import ImageSet, Names
from odc.errors import UserError

VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
               "sofa", "train", "tvmonitor"]


def open_dataset(data, split="train", exclude=()):
    """Open one split of a data set. No image is read, but for the small ones of CIFAR etc.

    data: a folder, or the word "shapes". split: "train" or "val". exclude: absolute paths of
    folders that are not walked, such as --output. For train, process 0 prints in one line what is
    read and what is passed over, where people may expect something else.
    Returns an `ImageSet`. Raises UserError if the path or this split is missing, empty or damaged.
    """
    if data == "shapes":
        images, labels = shapes.draw_shapes(*shapes.SPLITS[split])
        return ImageSet("shapes", split, "shapes", pixels=images.numpy(), labels=labels,
                        classes=list(shapes.FORMS))
    root = os.path.expanduser(data)
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"{data} {what}: --data takes a folder of images or the word shapes.")
    places = ((layout, os.path.join(root, place) if place else root, marks)
              for layout, places, marks in LAYOUTS for place in places)
    try:
        opened = next((layout(folder, split) for layout, folder, marks in places
                       if any(os.path.isfile(os.path.join(folder, mark.format(s)))
                              for mark in marks for s in ("train", "val"))), None)
        if opened is None:
            opened = image_folders(root, split, exclude)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}; "
                        "--data must be readable.") from None
    if len(opened) == 0:
        raise UserError(f"{opened.root}: no images found; the names of images end in "
                        f"{' '.join(EXTENSIONS)}.")
    if (labels := opened.labels) is not None:
        if len(labels) != len(opened):
            raise UserError(f"{opened.root}: {len(opened)} images, but {len(labels)} labels for "
                            f"the {split} split; download the files again.")
        if labels.min() < 0 or labels.max() >= len(opened.classes):
            raise UserError(f"{opened.root}: the {split} split has labels outside of its "
                            f"{len(opened.classes)} classes; download the files again.")
    return opened


def check_same_images(*image_sets):
    """Raise UserError if the processes do not all have the same images and labels. A collective."""
    for images in image_sets:
        if not distributed.same_everywhere((len(images), images.fingerprint)):
            raise UserError(f"{images.root}: the processes see different images or labels there; "
                            "give all machines the same files.")


# --- images named in lists -----------------------------------------------------------------------

def text_list(name, pattern, images, root, split):
    """pattern: the lists of train and val. images: the folder that their paths are relative to."""
    path = _required(split, root, pattern.format(split))
    names, labels = _read_list(path)
    opened = ImageSet(name, split, os.path.join(root, images.format(split)), names, labels=labels)
    if labels is not None:
        # The lists do not name the classes. The train list has an image of each class.
        train = os.path.join(root, pattern.format("train"))
        train_labels = _read_list(train)[1] if split == "val" and os.path.isfile(train) else None
        largest = max(int(found.max()) for found in (labels, train_labels) if found is not None)
        opened.classes = [str(k) for k in range(largest + 1)]
    return _check_images(opened, path)


def _read_list(path):
    """Names and labels (int64 [N], or None) of a list: a path, or a path and a label, in each line.

    A label is a number of at most six digits. All lines have one, or none has.
    """
    names, labels = [], []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(map(str.strip, file), 1):
            if not line:
                continue
            name, *label = line.rsplit(maxsplit=1)
            has_label = bool(label) and label[0].isdecimal() and len(label[0]) <= 6
            if names and has_label != bool(labels):
                expected = "a path and a label" if labels else "a path alone"
                raise UserError(f"{path}, line {number}: {line[:80]!r} should be {expected}, as "
                                "the lines before it.")
            names.append(name if has_label else line)
            labels += map(int, label) if has_label else []
    return Names(names), torch.tensor(labels) if labels else None


def inaturalist2018(root, split):
    path = _required(split, root, f"{split}2018.json")
    with _whole(path), open(path, encoding="utf-8") as file:
        content = json.load(file)
        names = Names(image["file_name"] for image in content["images"])
        category_of = {note["image_id"]: note["category_id"] for note in content["annotations"]}
        classes = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        classes = classes or {category: str(category) for category in category_of.values()}
        number = {category: k for k, category in enumerate(sorted(classes))}
        labels = [number[category_of[image["id"]]] for image in content["images"]]
    return _check_images(ImageSet(
        "inaturalist2018", split, root, names, labels=torch.tensor(labels),
        classes=[classes[category] for category in sorted(classes)]), path)


def voc07(folder, split):
    main, stem = os.path.join(folder, "ImageSets/Main"), "trainval" if split == "train" else "test"

    def rows(name):
        path = _required(split, main, f"{name}.txt")
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return [line.split() for line in file if line.strip()]

    ids = [words[0] for words in rows(stem)]
    images = os.path.join(folder, "JPEGImages")
    if missing := {f"{name}.jpg" for name in ids} - set(os.listdir(images)):
        raise UserError(f"{os.path.join(images, min(missing))} does not exist, though {stem}.txt "
                        f"names it ({len(missing)} of {len(ids)} are missing): unpack them there.")
    others = glob.glob(os.path.join(glob.escape(folder), os.pardir, "VOC20[01][0-9]"))
    if split == "train" and (others := {os.path.basename(path) for path in others} - {"VOC2007"}):
        distributed.print_main(f"{folder}: this folder alone is read, not "
                               f"{', '.join(sorted(others))} beside it.")
    targets = torch.empty(len(ids), len(VOC_CLASSES), dtype=torch.int8)
    for k, name in enumerate(VOC_CLASSES):
        target_of = dict(words for words in rows(f"{name}_{stem}") if len(words) == 2)
        if target_of.keys() != set(ids) or not {"1", "-1", "0"}.issuperset(target_of.values()):
            raise UserError(f"{name}_{stem}.txt in {main} must give each image of {stem}.txt 1, -1 "
                            "or 0: unpack the list again.")
        targets[:, k] = torch.tensor([int(target_of[i]) for i in ids])
    return ImageSet("voc07", split, folder, Names(f"JPEGImages/{name}.jpg" for name in ids),
                    targets=targets, classes=list(VOC_CLASSES))


def _check_images(opened, path):
    """The set. Raises UserError if its list is empty, or three of its images are not there."""
    if len(opened) == 0:
        raise UserError(f"{path} is empty: it should name images.")
    some = [opened.name_of(i) for i in (0, len(opened) // 2, len(opened) - 1)]
    if not any(os.path.lexists(os.path.join(opened.root, name)) for name in some):
        raise UserError(f"{os.path.join(opened.root, some[0])} does not exist, though {path} "
                        f"names it: put the images below {opened.root}.")
    return opened


# --- all images in a few large files -------------------------------------------------------------

def cifar(name, reader, folder, split):
    here = type(name, (reader,), {"base_folder": ""})  # the files lie in `folder` itself
    try:  # it compares checksums first, as these pickles could run a program
        opened = here(folder, train=split == "train")
    except RuntimeError:
        raise UserError(f"{folder}: a file of {name} is missing or damaged; download the set "
                        "again.") from None
    return ImageSet(name, split, folder, pixels=opened.data, labels=torch.tensor(opened.targets),
                    classes=list(opened.classes))


def stl10(folder, split):
    """train is the unlabelled images if only these are there.

    They take 2.7 GB, so they are mapped; torchvision's reader would copy them into each process.
    """
    labelled = os.path.exists(os.path.join(folder, "train_X.bin"))
    stem = "test" if split == "val" else "train" if labelled else "unlabeled"
    path = _required(split, folder, f"{stem}_X.bin")
    with _whole(path):  # column by column
        pixels = np.memmap(path, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    opened = ImageSet("stl10", split, folder, pixels=pixels)
    if stem != "unlabeled":
        labels = np.fromfile(_required(split, folder, f"{stem}_y.bin"), np.uint8)
        opened.labels = torch.from_numpy(labels).long() - 1  # they are 1..10 in the file
        path = _required(split, folder, "class_names.txt")
        with _whole(path), open(path, encoding="utf-8") as file:
            opened.classes = file.read().split()
    return opened


def fashion_mnist(folder, split):
    """Fashion-MNIST, or another set in the files of MNIST: the name of the folder decides.

    The files may be gzipped, as Debian has them; torchvision's reader does not open those.
    """
    stem = os.path.join(folder, "train" if split == "train" else "t10k")
    pixels = _read_idx(f"{stem}-images-idx3-ubyte", 3, split)
    labels = torch.tensor(_read_idx(f"{stem}-labels-idx1-ubyte", 1, split)).long()
    name, classes = "fashion-mnist", list(FashionMNIST.classes)
    if "fashion" not in os.path.abspath(folder).lower():
        name, classes = "mnist", [str(k) for k in range(10)]
    return ImageSet(name, split, folder, pixels=pixels, labels=labels, classes=classes)


def _read_idx(path, dimensions, split):
    """An IDX file of bytes: 4 bytes that name its type, 4 for each dimension, then the values."""
    path = path if os.path.isfile(path) else _required(split, path + ".gz")
    with _whole(path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        content = file.read()
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


# --- shared by the layouts -----------------------------------------------------------------------

def _required(split, *path):
    path = os.path.join(*path)
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the {split} split needs it.")
    return path


@contextlib.contextmanager
def _whole(path):
    """Turn whatever a reader raises for a damaged file into a sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, "errno", None):  # of the disk
            raise
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}: {error}); "
                        "download it again.") from None


LISTS, PLACES = "meta/{}.txt", "trainvalsplit_places205/{}_places205.csv"
PLACES_IMAGES = "data/vision/torralba/deeplearning/images256"
# What opens a layout, the folders below --data where it may lie, the files of which it has one; {}
# stands for train and val.
LAYOUTS = (
    (voc07, ["VOCdevkit/VOC2007", "VOC2007", ""], [
        "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"]),
    (functools.partial(text_list, "places205", PLACES, PLACES_IMAGES), [""], [PLACES]),
    (inaturalist2018, [""], ["{}2018.json"]),
    (functools.partial(text_list, "imagenet", LISTS, "{}"), [""], [LISTS]),
    (functools.partial(cifar, "cifar10", CIFAR10), ["", CIFAR10.base_folder], ["data_batch_1"]),
    (functools.partial(cifar, "cifar100", CIFAR100), ["", CIFAR100.base_folder], ["meta"]),
    (stl10, ["", "stl10_binary"], ["train_X.bin", "unlabeled_X.bin"]),
    (fashion_mnist, ["", "raw", "FashionMNIST/raw"], [
        f"{s}-images-idx3-ubyte{end}" for s in ("train", "t10k") for end in ("", ".gz")]),
)
