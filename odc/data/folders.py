"""Folders of images: which files are read, which are passed over, and what gives them labels."""

import collections
import os
import re

import torch

from odc.data.images import ImageSet, Names
from odc.distributed import print_main
from odc.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm")
# Folders of the splits, in any case; of several the first counts.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
# Where file servers and operating systems keep thumbnails and deleted files.
SYSTEM_FOLDERS = {"@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot",
                  "$recycle.bin", "recycler", "system volume information", "lost+found",
                  "__macosx", "__pycache__"}


def image_folders(root, split, exclude=()):
    """The ImageSet of a split: all images in its folder, or in root if no folder is named so.

    The images below each folder there share a label, the same in both splits; in root itself only
    if every image is CLASS/IMAGE, as it may be any folder of pictures. exclude: see `open_dataset`.
    """
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    folders = {name.lower(): name for name in names if os.path.isdir(os.path.join(root, name))}
    train, val = (next((folders[name] for name in spellings if name in folders), None)
                  for spellings in (TRAIN_FOLDERS, VAL_FOLDERS))
    folder = train if split == "train" else val
    if folder is None and (val or split == "val"):
        missing = (f"the folder {os.path.join(root, split)} is missing" if train or val else
                   "give a folder that holds train/ and val/")
        raise UserError(f"{root} has no {split} split: {missing}.")
    walk = _Walk(os.path.join(root, folder) if folder else root, exclude)
    train_walk = _Walk(os.path.join(root, train), exclude) if train and split == "val" else walk
    classes, reason = train_walk.classes(nested=folder is not None)
    opened = ImageSet("folder", split, walk.root, walk.names)
    if classes and not walk.images_in[""]:
        opened.labels, opened.classes = walk.labels(classes), classes
        if all(re.fullmatch(r"n\d{8}", name) for name in classes):  # WordNet ids
            opened.name = "imagenet"
    if split == "train":
        beside = [name for name in names if name not in (train, val)] if folder else []
        _print_what_is_read(root, train, val, beside, walk.passed_over, reason)
    return opened


def _print_what_is_read(root, train, val, beside, passed_over, reason):
    """Say in one line, if there is anything to say, what people may not expect."""
    facts = [f"{split} is {name}/" for split, name in (("train", train), ("val", val)) if name]
    facts += [f"not read beside it: {beside[0]} ({len(beside)} in all)"] if beside else []
    counts = [f"{what} ({count})" for what, count in passed_over.items() if count]
    facts += [f"passed over: {', '.join(counts)}"] if counts else []
    facts += [f"no labels, as {reason}"] if reason else []
    if facts:
        print_main(f"{root}: {'; '.join(facts)}.")


class _Walk:
    """The images in a folder and below it, each folder once.

    names: of the images, relative to root, sorted folder by folder. images_in: a Counter of the
    images in root itself (""), and in and below each folder there. passed_over: a Counter of all
    else but hidden files. Only links are looked at, as millions of files must be listed fast.
    """

    def __init__(self, root, exclude):
        self.root, self.real_root = root, os.path.realpath(root)
        self.images_in, self.passed_over = collections.Counter(), collections.Counter()
        self.names = Names(self._walk(set(map(os.path.realpath, exclude)) - {self.real_root}))
        self.passed_over["folders without images"] = [*self.images_in.values()][1:].count(0)

    def classes(self, nested):
        """The folders that have a label, or None; and why there are none, if one may wonder.

        nested: whether images may lie in folders below these.
        """
        direct = self.images_in[""]
        classes = [name for name, count in self.images_in.items() if name and count]
        reason = ("" if not classes else f"{direct} images lie outside of its folders" if direct
                  else "there is only one folder" if len(classes) == 1
                  else "there are folders in folders"
                  if not nested and (self.names.block == ord("/")).sum() > len(self.names) else "")
        return None if reason else classes, reason

    def labels(self, classes):
        """int64 [N], the position in classes of each image's folder."""
        number = {name: k for k, name in enumerate(classes)}
        folders = [name for name, count in self.images_in.items() if count]
        if unknown := sorted(set(folders) - number.keys()):
            raise UserError(f"{os.path.join(self.root, unknown[0])} is a class that the train "
                            "split does not have: rename it or take it away.")
        counts = torch.tensor([self.images_in[name] for name in folders], dtype=torch.int64)
        return torch.tensor([number[name] for name in folders]).repeat_interleave(counts)

    def _walk(self, read):
        """Yield the names. read: real paths of folders that are not to be read, or no more."""
        waiting = [""]  # the folders to come, relative to root, each with a slash at its end
        while waiting:
            below = waiting.pop()
            folder, images, folders = os.path.join(self.root, below), [], []
            real = os.path.realpath(folder)
            if real in read or (below and _holds_a_run(folder)):
                self.passed_over["folders of runs, or reached twice"] += 1
                continue
            read.add(real)
            try:
                with os.scandir(folder) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError:
                if not below:
                    raise
                self.passed_over["folders that cannot be opened"] += 1
                continue
            for entry in entries:
                kind = self._kind(entry)
                if kind == "image":
                    images.append(below + entry.name)
                elif kind == "folder":
                    folders.append(below + entry.name + "/")
                elif kind != "hidden":
                    self.passed_over[kind] += 1
            self.images_in[below.split("/")[0]] += len(images)
            yield from images
            waiting += reversed(folders)

    def _kind(self, entry):
        """Of an os.DirEntry: "folder", "image", "hidden", or how to call what is passed over."""
        name = entry.name.lower()
        if name.startswith("."):
            return "hidden"
        if name in SYSTEM_FOLDERS:
            return "system folders"
        try:
            kind = "folder" if entry.is_dir() else "image" if entry.is_file() else None
        except OSError:  # a link to itself
            kind = None
        if kind is None:
            return "broken links and special files"
        if kind == "image" and not name.endswith(EXTENSIONS):
            end = os.path.splitext(name)[1]
            return f"{end} files" if end else "files without an extension"
        if entry.is_symlink():
            before, _, below = os.path.realpath(entry.path).partition(self.real_root + "/")
            image = kind == "folder" or below.lower().endswith(EXTENSIONS)
            if not before and image and "/." not in f"/{below}":  # it is walked without the link
                return "links to images here"
        return kind


def _holds_a_run(folder):
    """Whether train.py has written there."""
    return os.path.isfile(os.path.join(folder, "checkpoint.pth")) and any(
        os.path.exists(os.path.join(folder, name)) for name in ("memory", "log.jsonl"))
