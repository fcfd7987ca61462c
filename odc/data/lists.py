"""Sets whose images are named in lists: ImageNet's meta folder, VOC2007, Places205 and iNaturalist 2018.

Each function takes a folder and a split and returns an ImageSet, or None if the folder does not hold such a set.
Raises UserError for lists that are damaged, missing, or do not match the images.
"""

import array
import json
import os

import numpy as np
import torch

from odc.errors import UserError
from odc.data.images import ImageSet, Names

MAX_LABEL = 1_000_000
VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]


def imagenet_lists(root, split):
    """ImageNet with `meta/train.txt`, `meta/val.txt`: a path and perhaps a label a line, below `train/`, `val/`."""
    lists = {s: os.path.join(root, "meta", f"{s}.txt") for s in ("train", "val")}
    return _open_list("imagenet", lists, {s: os.path.join(root, s) for s in lists}, split)


def places205(root, split):
    """Places205: `trainvalsplit_places205/train_places205.csv` and `val_places205.csv`, a path and a label a line."""
    lists = {s: os.path.join(root, "trainvalsplit_places205", f"{s}_places205.csv") for s in ("train", "val")}
    images = os.path.join(root, "data", "vision", "torralba", "deeplearning", "images256")
    return _open_list("places205", lists, dict.fromkeys(lists, images), split)


def _open_list(name, lists, folders, split):
    """lists, folders: for "train" and "val", a list file and the folder that its paths are relative to."""
    if not any(os.path.isfile(path) for path in lists.values()):
        return None
    if not os.path.isfile(lists[split]):
        raise UserError(f"{lists[split]} is missing: the {split} split needs it.")
    names, labels = _read_list(lists[split])
    opened = ImageSet(name, split, folders[split], names=names, labels=labels)
    if labels is not None:
        # The lists do not name the classes. The train list, which has an image of each, tells how many there are.
        classes = int(labels.max()) + 1
        if split == "val" and os.path.isfile(lists["train"]):
            train_labels = _read_list(lists["train"])[1]
            classes = max(classes, 0 if train_labels is None else int(train_labels.max()) + 1)
        opened.classes = [str(k) for k in range(classes)]
    return _checked(opened, lists[split])


def _read_list(path):
    """Names and labels int64 [N], or None, of a file with a path, and on all lines or none a label, a line."""
    labels = array.array("q")
    labelled = None

    def names():
        nonlocal labelled
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                line = line.strip()
                if not line:
                    continue
                name, *rest = line.rsplit(maxsplit=1)
                has_label = bool(rest) and rest[0].isdecimal() and len(rest[0]) < 10
                labelled = has_label if labelled is None else labelled
                if has_label != labelled:
                    raise UserError(f"{path}, line {number}: {line[:80]!r} should be a path"
                                    f"{' and a label' if labelled else ' alone'}, as the lines before it.")
                if has_label:
                    if int(rest[0]) > MAX_LABEL:
                        raise UserError(f"{path}, line {number}: the label {rest[0]} is larger than {MAX_LABEL:,}; labels "
                                        "count classes from 0.")
                    labels.append(int(rest[0]))
                yield name if has_label else line

    found = Names(names())
    if len(found) == 0:
        raise UserError(f"{path} is empty: it should name an image a line.")
    return found, torch.from_numpy(np.array(labels, np.int64)) if labelled else None


def _checked(opened, path):
    """The set, unless the images that its list names are elsewhere; a look at three of them tells."""
    some = [opened.name_of(i) for i in (0, len(opened) // 2, len(opened) - 1)]
    if not any(os.path.lexists(os.path.join(opened.root, name)) for name in some):
        raise UserError(f"{os.path.join(opened.root, some[0])} does not exist, though {path} names it: put the images "
                        f"below {opened.root}.")
    return opened


def inaturalist2018(root, split):
    """iNaturalist 2018: `train2018.json` and `val2018.json`, with images below `train_val2018/`."""
    lists = {s: os.path.join(root, f"{s}2018.json") for s in ("train", "val")}
    if not any(os.path.isfile(path) for path in lists.values()):
        return None
    path = lists[split]
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the {split} split needs it.")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        names = Names(image["file_name"] for image in content["images"])
        category_of = {note["image_id"]: note["category_id"] for note in content["annotations"]}
        named = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        named = named or {category: str(category) for category in category_of.values()}
        number = {category: k for k, category in enumerate(sorted(named))}
        labels = torch.tensor([number[category_of[image["id"]]] for image in content["images"]], dtype=torch.int64)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a whole list of iNaturalist ({reason}); download it again.") from None
    if len(names) == 0:
        raise UserError(f"{path} is empty: it should name images.")
    classes = [named[category] for category in sorted(named)]
    return _checked(ImageSet("inaturalist2018", split, root, names=names, labels=labels, classes=classes), path)


def voc07(root, split):
    """VOC2007: train is `ImageSets/Main/trainval.txt`, val is `test.txt`; targets from `<class>_trainval.txt` ..."""
    folders = [os.path.join(root, "VOCdevkit", "VOC2007"), os.path.join(root, "VOC2007"), root]
    folder = next((f for f in folders if os.path.isdir(os.path.join(f, "ImageSets", "Main"))), None)
    if folder is None:
        return None
    stem = "trainval" if split == "train" else "test"
    ids = [line.split()[0] for line in _voc_lines(folder, stem, split)]
    there = {entry.name for entry in os.scandir(os.path.join(folder, "JPEGImages"))}
    missing = [name for name in ids if f"{name}.jpg" not in there]
    if missing:
        path = os.path.join(folder, "JPEGImages", missing[0] + ".jpg")
        raise UserError(f"{path} does not exist, though {stem}.txt names it ({len(missing)} of {len(ids)} are missing);"
                        f" unpack the images of {stem} there.")
    row = {name: i for i, name in enumerate(ids)}
    targets = torch.empty(len(ids), len(VOC_CLASSES), dtype=torch.int8)
    for k, name in enumerate(VOC_CLASSES):
        found = {}
        for line in _voc_lines(folder, f"{name}_{stem}", split):
            words = line.split()
            if len(words) != 2 or words[0] not in row or words[1] not in ("1", "-1", "0"):
                raise UserError(f"{name}_{stem}.txt in {folder}/ImageSets/Main: {line!r} is not an image of {stem}.txt "
                                "and 1, -1 or 0; unpack the list again.")
            found[row[words[0]]] = int(words[1])
        if len(found) != len(ids):
            raise UserError(f"{name}_{stem}.txt in {folder}/ImageSets/Main names {len(found)} of the {len(ids)} images "
                            f"of {stem}.txt; unpack the list again.")
        targets[list(found), k] = torch.tensor(list(found.values()), dtype=torch.int8)
    return ImageSet("voc07", split, folder, names=Names(f"JPEGImages/{name}.jpg" for name in ids), targets=targets,
                    classes=list(VOC_CLASSES))


def _voc_lines(folder, stem, split):
    path = os.path.join(folder, "ImageSets", "Main", f"{stem}.txt")
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the {split} split needs it.")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [line.strip() for line in file if line.strip()]
