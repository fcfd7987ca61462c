"""What `--data` may be: `open_dataset` recognises a layout by what lies in the folder.

    shapes                                        the built-in set, no folder at all
    VOCdevkit/VOC2007, VOC2007                    PASCAL VOC 2007; train is its trainval, val its test
    trainvalsplit_places205                       Places205
    train2018.json, val2018.json                  iNaturalist 2018
    meta/train.txt, meta/val.txt                  ImageNet with lists: a path (and a label) a line
    cifar-10-batches-py, cifar-100-python, stl10_binary, FashionMNIST/raw or the folder itself
                                                  the files that torchvision's datasets read; val is their test
    train/, val/ (or validation/, test/)          class folders, or images without labels; ImageNet if all are wnids
    any folder                                    images; labelled if each lies in one of several folders: CLASS/IMAGE
"""

import os
import re

import torch

from odc import distributed
from odc.data import arrays
from odc.data import lists
from odc.data import shapes
from odc.errors import UserError
from odc.data.images import BadImage, ImageSet, Names

__all__ = ["BadImage", "ImageSet", "check_same_images", "open_dataset"]

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
              ".pbm")
VAL_FOLDERS = ("val", "validation", "test")


def open_dataset(data, split="train"):
    """Open one split of a set of images, without reading an image.

    data: a folder, or the word "shapes". split: "train" or "val".
    Returns an `ImageSet`. Raises UserError for a path that is missing, empty, damaged or without this split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r}: only train and val exist.")
    if data == "shapes":
        count, seed = shapes.SPLITS[split]
        images, labels = shapes.draw_shapes(count, seed)
        return ImageSet("shapes", split, "shapes", pixels=images.numpy(), labels=labels, classes=list(shapes.FORMS))
    root = os.path.expanduser(data)
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"{data} {what}: --data takes a folder of images or the word shapes.")
    try:
        opened = _open_folder(root, split)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}; --data must be readable.") from None
    if len(opened) == 0:
        raise UserError(f"{opened.root}: no images found; the names of images end in {' '.join(EXTENSIONS)}.")
    return opened


def check_same_images(*image_sets):
    """Raise UserError if the processes do not all have the same images and labels. A collective."""
    for images in image_sets:
        if not distributed.same_everywhere((len(images), images.labelled_fingerprint)):
            raise UserError(f"{images.root}: the processes see different images or labels there; give all machines the "
                            "same files.")


def _open_folder(root, split):
    for recognise in (lists.voc07, lists.places205, lists.inaturalist2018, lists.imagenet_lists,
                      arrays.cifar10, arrays.cifar100, arrays.stl10, arrays.fashion_mnist):
        opened = recognise(root, split)
        if opened is not None:
            return opened
    folders = {s: os.path.join(root, s) for s in ("train", *VAL_FOLDERS) if os.path.isdir(os.path.join(root, s))}
    if not folders:
        if split == "val":
            raise UserError(f"{root} has no val split: give a folder that holds train/ and val/.")
        return image_folder(root, split)
    val_folder = next((folders[s] for s in VAL_FOLDERS if s in folders), None)
    folder = folders.get("train") if split == "train" else val_folder
    if folder is None:
        raise UserError(f"{root} has no {split} split: the folder {os.path.join(root, split)} is missing.")
    # Both splits number the classes as the train split does.
    return image_folder(folder, split, classes=_listing(folders.get("train", folder), "")[1])


def image_folder(root, split, classes=None):
    """All images in a folder and below it, sorted by path.

    classes: names of the folders directly below root whose images share a label; None where that is to be found out:
    labels are then given if every image lies directly in one of several such folders.
    """
    direct, folders = _listing(root, "")
    counts = []  # images in and below each folder

    def paths():
        yield from direct
        for folder in folders:
            count = 0
            for path in _paths_below(root, folder):
                count += 1
                yield path
            counts.append(count)

    opened = ImageSet("folder", split, root, names=Names(paths()))
    if classes is None:
        classes = [folder for folder, count in zip(folders, counts) if count > 0]
        slashes = int((opened.names.block == ord("/")).sum())
        if slashes != len(opened):  # one in each path?
            return opened
    if direct or not folders or len(classes) < 2:
        return opened
    number = {name: k for k, name in enumerate(classes)}
    for folder, count in zip(folders, counts):
        if count > 0 and folder not in number:
            raise UserError(f"{os.path.join(root, folder)} is a class that the train split does not have: rename it or "
                            "take it away.")
    numbers = torch.tensor([number.get(folder, 0) for folder in folders])
    opened.labels = numbers.repeat_interleave(torch.tensor(counts))
    opened.classes = classes
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        opened.name = "imagenet"
    return opened


def _listing(root, under):
    """Images and folders directly in root/under, sorted, as paths relative to root; hidden ones are left out.

    One scan without a look at any file, as millions must be listed fast: a link with an image's name counts as one.
    """
    images, folders = [], []
    with os.scandir(os.path.join(root, under)) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS) and (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                images.append(name)
            elif entry.is_dir():
                folders.append(name)
    prefix = under + "/" if under else ""
    return [prefix + name for name in sorted(images)], [prefix + name for name in sorted(folders)]


def _paths_below(root, under, parents=()):
    """Yield the images in root/under and below; a link back to a folder above it is not followed again."""
    status = os.stat(os.path.join(root, under))
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    images, folders = _listing(root, under)
    yield from images
    for folder in folders:
        yield from _paths_below(root, folder, (*parents, identity))
