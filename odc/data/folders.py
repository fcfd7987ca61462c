"""Folders of images: which files are read, which are passed over, and what gives them labels."""

import collections
import os
import re

import numpy as np
import torch

from odc.data.images import ImageSet, file_names
from odc.distributed import print_main
from odc.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm")
# Folders of the splits, in any case; of several the first counts.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
# Thumbnails and deleted files of file servers and operating systems.
SYSTEM_FOLDERS = {"@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot",
                  "$recycle.bin", "recycler", "system volume information", "lost+found",
                  "__macosx", "__pycache__"}


def image_folders(root, split, exclude=()):
    """The ImageSet of a split: all images in its folder, or in root if no folder is named so.

    The images below each folder there share a label; in root, which may hold any pictures, only if
    all are CLASS/IMAGE. For train, a line says what people may not expect.
    """
    names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    folders = {name.lower(): name for name in names if os.path.isdir(os.path.join(root, name))}
    train, val = (next((folders[name] for name in spellings if name in folders), None)
                  for spellings in (TRAIN_FOLDERS, VAL_FOLDERS))
    folder = train if split == "train" else val
    if folder is None and (val or split == "val"):
        raise UserError(f"{root} has no {split} split: give a folder that holds train/ and val/.")
    walk = _Walk(os.path.join(root, folder or ""), exclude)
    classes_of = _Walk(os.path.join(root, train), exclude) if train and split == "val" else walk
    reason = classes_of.why_no_labels(nested=folder is not None)
    opened = ImageSet("folder", split, walk.root, walk.names)
    if classes_of.classes and not reason and not walk.images_in[""]:
        opened.classes, opened.labels = classes_of.classes, walk.labels(classes_of.classes)
        if all(re.fullmatch(r"n\d{8}", name) for name in opened.classes):  # WordNet ids
            opened.name = "imagenet"
    facts = [f"{kind} is {name}/" for kind, name in (("train", train), ("val", val)) if name]
    if folder and (beside := [name for name in names if name not in (train, val)]):
        facts.append(f"not read beside it: {beside[0]} ({len(beside)} in all)")
    if counts := [f"{what} ({count})" for what, count in (+walk.passed_over).items()]:
        facts.append(f"passed over: {', '.join(counts)}")
    if reason:
        facts.append(f"no labels, as {reason}")
    if facts and split == "train":
        print_main(f"{root}: {'; '.join(facts)}.")
    return opened


class _Walk:
    """The images below a folder. images_in counts those in it ("") and below each folder there."""

    def __init__(self, root, exclude):
        self.root, self.real_root = root.rstrip("/") or "/", os.path.realpath(root)
        self.read = set(map(os.path.realpath, exclude)) - {self.real_root}
        self.images_in, self.passed_over = collections.Counter(), collections.Counter()
        self.names = file_names(self._images_below(""))
        self.classes = [name for name, count in self.images_in.items() if name and count]
        self.passed_over["folders without images"] = [*self.images_in.values()][1:].count(0)

    def why_no_labels(self, nested):
        """The reason, or "". nested: whether images may lie in folders below the classes."""
        if self.images_in[""] and self.classes:
            return f"{self.images_in['']} images lie outside of its folders"
        if len(self.classes) == 1:
            return "there is only one folder"
        in_folders = np.char.count(self.names, b"/").sum() > len(self.names)
        return "there are folders in folders" if in_folders and not nested else ""

    def labels(self, classes):
        """int64 [N], the position in classes of each image's folder."""
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(f"{self.root}/{unknown[0]} is a class that the train split does not "
                            "have: rename it or take it away.")
        pairs = [(classes.index(name), self.images_in[name]) for name in self.classes]
        numbers, counts = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
        return numbers.repeat_interleave(counts)

    def _images_below(self, below):
        """Yield names. below: a folder relative to root, with a slash at its end, or ""."""
        folder = os.path.join(self.root, below)
        real = os.path.realpath(folder)
        of_a_run = os.path.isfile(f"{real}/checkpoint.pth") and os.path.isfile(f"{real}/log.jsonl")
        if real in self.read or below and of_a_run:
            self.passed_over["folders of runs, or reached twice"] += 1
            return
        self.read.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if not below:
                raise
            self.passed_over["folders that cannot be opened"] += 1
            return
        kinds = {entry.name: self._kind(entry) for entry in entries if entry.name[0] != "."}
        images = [below + name for name, kind in kinds.items() if kind == "image"]
        self.images_in[below.split("/")[0]] += len(images)
        self.passed_over.update(kind for kind in kinds.values() if kind not in ("image", "folder"))
        yield from images
        for name, kind in kinds.items():
            if kind == "folder":
                yield from self._images_below(f"{below}{name}/")

    def _kind(self, entry):
        """Of an os.DirEntry: "folder", "image", or how to call what is passed over."""
        name = entry.name.lower()
        try:
            kind = "folder" if entry.is_dir() else "image" if entry.is_file() else None
        except OSError:  # a link to itself
            kind = None
        if kind is None:
            return "broken links and special files"
        if name in SYSTEM_FOLDERS:
            return "system folders"
        if kind == "image" and not name.endswith(EXTENSIONS):
            return f"{os.path.splitext(name)[1] or 'other'} files"
        if entry.is_symlink():
            before, _, below = os.path.realpath(entry.path).partition(self.real_root + "/")
            image = kind == "folder" or below.lower().endswith(EXTENSIONS)
            if not before and image and "/." not in f"/{below}":  # it is walked without the link
                return "links to images here"
        return kind
