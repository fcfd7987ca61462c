"""What `--data` may be: LAYOUTS names the published sets, any other folder is one of images."""

import functools
import glob
import gzip
import json
import os
import re

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from odc import distributed
from odc.data import shapes
from odc.data.folders import EXTENSIONS, image_folders
from odc.data.images import ImageSet, file_names
from odc.errors import UserError

VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
               "sofa", "train", "tvmonitor"]


def open_dataset(data, split="train", exclude=()):
    """The `ImageSet` of a split, "train" or "val", of a folder or of "shapes".

    exclude: absolute paths of folders to skip. Raises UserError if the split is missing or damaged.
    """
    if data == "shapes":
        images, labels = shapes.draw_shapes(*shapes.SPLITS[split])
        return ImageSet("shapes", split, "shapes", pixels=images.numpy(), labels=labels,
                        classes=list(shapes.FORMS))
    root = os.path.expanduser(data)
    if not os.path.isdir(root):
        raise UserError(f"{data} does not exist or is no folder: --data takes one, or shapes.")
    layout, folder = next(
        ((layout, os.path.join(root, place)) for layout, places, marks in LAYOUTS
         for place in places if any(os.path.isfile(os.path.join(root, place, m)) for m in marks)),
        (functools.partial(image_folders, exclude=exclude), root))
    try:
        opened = layout(os.path.normpath(folder), split)
    except UserError:
        raise
    except Exception as error:  # whatever a reader raises
        raise UserError(f"{folder}: the {split} split cannot be read ({type(error).__name__}: "
                        f"{error}); --data must be complete and readable.") from error
    if len(opened) == 0:
        raise UserError(f"{opened.root}: no images found; their names end in {EXTENSIONS}.")
    N, labels, classes = len(opened), opened.labels, opened.classes
    if labels is not None and not (len(labels) == N and 0 <= labels.min()
                                   and labels.max() < len(classes)):
        raise UserError(f"{opened.root}: the labels of the {split} split do not fit its {N} images "
                        f"and {len(classes)} classes; download the files again.")
    return opened


def check_same_images(*image_sets):
    """Raise UserError if the processes do not all have the same images and labels. A collective."""
    for images in image_sets:
        if not distributed.same_everywhere((len(images), images.fingerprint)):
            raise UserError(f"{images.root}: the processes see different images or labels there; "
                            "give all machines the same files.")


def text_list(name, pattern, images, root, split):
    """pattern: the lists of train and val. images: the folder that their paths are relative to."""
    lists = [os.path.join(root, pattern.format(kind)) for kind in (split, "train")]
    names, labels = _read_list(lists[0])
    opened = ImageSet(name, split, os.path.join(root, images.format(split)), file_names(names))
    if labels:
        # The lists do not name the classes. The train list has an image of each class.
        every = [label for path in lists if os.path.isfile(path) for label in _read_list(path)[1]]
        opened.labels = torch.tensor(labels)
        opened.classes = [str(k) for k in range(max(every) + 1)]
    return opened


def _read_list(path):
    """Two lists, names and labels: all lines are a path and a label, or all a path."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [line.strip() for line in file if line.strip()]
    pairs = [re.fullmatch(r"(.+?)(?:\s+(\d{1,6}))?", line).groups() for line in lines]
    labels = [int(label) for _, label in pairs if label]
    if labels and len(labels) < len(pairs):
        raise UserError(f"{path}: {len(labels)} of its {len(pairs)} lines have a label: give all.")
    return [name for name, _ in pairs], labels


def inaturalist2018(root, split):
    with open(os.path.join(root, f"{split}2018.json"), encoding="utf-8") as file:
        content = json.load(file)
    classes = {category["id"]: str(category["name"]) for category in content["categories"]}
    number = {category: k for k, category in enumerate(sorted(classes))}
    category_of = {note["image_id"]: note["category_id"] for note in content["annotations"]}
    return ImageSet(
        "inaturalist2018", split, root, file_names(i["file_name"] for i in content["images"]),
        labels=torch.tensor([number[category_of[image["id"]]] for image in content["images"]]),
        classes=[classes[category] for category in number])


def voc07(folder, split):
    stem = "trainval" if split == "train" else "test"

    def words(name):
        with open(os.path.join(folder, "ImageSets/Main", f"{name}.txt")) as file:
            return file.read().split()

    ids, targets = words(stem), []
    for name in VOC_CLASSES:
        found = words(f"{name}_{stem}")
        target_of = dict(zip(found[::2], found[1::2]))
        targets.append([{"1": 1, "-1": -1, "0": 0}[target_of[i]] for i in ids])
    beside = sorted(glob.glob("VOC20*", root_dir=os.path.join(folder, "..")))
    if split == "train" and len(beside) > 1:
        distributed.print_main(f"{folder}: of {', '.join(beside)} this folder alone is read.")
    return ImageSet("voc07", split, folder, file_names(f"JPEGImages/{name}.jpg" for name in ids),
                    targets=torch.tensor(targets, dtype=torch.int8).T.contiguous(),
                    classes=list(VOC_CLASSES))


def cifar(name, reader, folder, split):
    # It compares checksums first, as these pickles could run a program.
    opened = type(name, (reader,), {"base_folder": ""})(folder, train=split == "train")
    return ImageSet(name, split, folder, pixels=opened.data, labels=torch.tensor(opened.targets),
                    classes=list(opened.classes))


def stl10(folder, split):
    """Mapped, as torchvision's reader would copy 2.7 GB of unlabelled images into each process."""
    labelled = split == "val" or os.path.exists(os.path.join(folder, "train_X.bin"))
    stem = os.path.join(folder, "test" if split == "val" else "train" if labelled else "unlabeled")
    pixels = np.memmap(f"{stem}_X.bin", np.uint8, mode="r")
    pixels = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored column by column
    opened = ImageSet("stl10", split, folder, pixels=pixels)
    if labelled:
        opened.labels = torch.from_numpy(np.fromfile(f"{stem}_y.bin", np.uint8)).long() - 1
        with open(os.path.join(folder, "class_names.txt"), encoding="utf-8") as file:
            opened.classes = file.read().split()
    return opened


def fashion_mnist(folder, split):
    """The files may be gzipped, as Debian has them; torchvision's reader does not open those."""
    stem = os.path.join(folder, "train" if split == "train" else "t10k")
    fashion = "fashion" in os.path.abspath(folder).lower()
    return ImageSet("fashion-mnist" if fashion else "mnist", split, folder,
                    pixels=_read_idx(f"{stem}-images-idx3-ubyte", 3),
                    labels=torch.tensor(_read_idx(f"{stem}-labels-idx1-ubyte", 1)).long(),
                    classes=FashionMNIST.classes if fashion else list("0123456789"))


def _read_idx(path, dimensions):
    """An IDX file of bytes: 4 for its type, 4 for each dimension, then the values."""
    with open(path, "rb") if os.path.isfile(path) else gzip.open(f"{path}.gz") as file:
        content = file.read()
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


PLACES = "trainvalsplit_places205/{}_places205.csv"
PLACES_IMAGES = "data/vision/torralba/deeplearning/images256"
# What opens a layout, the folders below --data where it may lie, the files of which it has one.
LAYOUTS = (
    (voc07, ["VOCdevkit/VOC2007", "VOC2007", ""], [
        "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"]),
    (functools.partial(text_list, "places205", PLACES, PLACES_IMAGES), [""], [
        PLACES.format("train"), PLACES.format("val")]),
    (inaturalist2018, [""], ["train2018.json", "val2018.json"]),
    (functools.partial(text_list, "imagenet", "meta/{}.txt", "{}"), [""], [
        "meta/train.txt", "meta/val.txt"]),
    (functools.partial(cifar, "cifar10", CIFAR10), ["", CIFAR10.base_folder], ["data_batch_1"]),
    (functools.partial(cifar, "cifar100", CIFAR100), ["", CIFAR100.base_folder], ["meta"]),
    (stl10, ["", "stl10_binary"], ["train_X.bin", "unlabeled_X.bin"]),
    (fashion_mnist, ["", "raw", "FashionMNIST/raw"], [
        f"{s}-images-idx3-ubyte{end}" for s in ("train", "t10k") for end in ("", ".gz")]),
)
