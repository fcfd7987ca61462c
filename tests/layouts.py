"""Every layout that users have, made small on disk."""

import gzip
import json
import pickle

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from odc.data.datasets import VOC_CLASSES
from odc.data.folders import EXTENSIONS


def put_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (10, 20, 30)).save(path, "JPEG")


def put_text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def put_files(root, *names):
    """Images; other files are empty, and a name that ends with a slash is an empty folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        elif name.lower().endswith(EXTENSIONS):
            put_image(root / name)
        else:
            put_text(root / name, [])


def put_imagenet_lists(root):
    lists = {"train": ["n02/b c.JPEG", "n01/a.JPEG", "n03/d.JPEG"], "val": ["v1.JPEG", "v2.JPEG"]}
    for split, files in lists.items():
        put_files(root / split, *files)
        lines = [f"{name} {2 * i}" for i, name in enumerate(files)]
        put_text(root / "meta" / f"{split}.txt", [*lines, ""])


def put_places(root):
    for split, count in (("train", 4), ("val", 2)):
        files = [f"a/abbey/{split}{i}.jpg" for i in range(count)]
        put_files(root / "data/vision/torralba/deeplearning/images256", *files)
        put_text(root / "trainvalsplit_places205" / f"{split}_places205.csv",
                 [f"{name} {i}" for i, name in enumerate(files)])


def put_inaturalist(root):
    for split, count in (("train", 3), ("val", 2)):
        files = [f"train_val2018/Plantae/7477/{split}{i}.jpg" for i in range(count)]
        put_files(root, *files)
        content = dict(images=[dict(id=70 + i, file_name=name) for i, name in enumerate(files)],
                       annotations=[dict(image_id=70 + i, category_id=count - 1 - i)
                                    for i in reversed(range(count))],
                       categories=[dict(id=k, name=f"plant {k}") for k in range(3)])
        put_text(root / f"{split}2018.json", [json.dumps(content)])


def voc_target(i, k):
    """1, 0 or -1 of image i and class k."""
    return 1 if (i + k) % 3 == 0 else 0 if (i + k) % 5 == 0 else -1


def put_voc(root, train=3, val=2):
    """An image has a bright stripe for each of its classes."""
    base = root / "VOCdevkit/VOC2007"
    (base / "JPEGImages").mkdir(parents=True)
    for stem, count in (("trainval", train), ("test", val)):
        targets = np.array([[voc_target(i, k) for k in range(20)] for i in range(count)])
        put_text(base / "ImageSets/Main" / f"{stem}.txt", [f"{stem}{i}" for i in range(count)])
        for k, label in enumerate(VOC_CLASSES):
            put_text(base / "ImageSets/Main" / f"{label}_{stem}.txt",
                     [f"{stem}{i} {target:2}" for i, target in enumerate(targets[:, k])])
        for i, row in enumerate(targets):
            pixels = made_up(40, 40, 3, seed=i) // 2
            pixels[(row == 1).repeat(2)] += 120
            Image.fromarray(pixels).save(base / "JPEGImages" / f"{stem}{i}.jpg")


def made_up(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def put_cifar10(root, reader=CIFAR10, key="labels"):
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    files = {reader.meta["filename"]: {reader.meta["key"]: [f"class {k}" for k in range(100)]}}
    for k, (name, _) in enumerate(reader.train_list + reader.test_list):
        files[name] = {"data": made_up(4, 3072, seed=k), key: [(i + k) % 10 for i in range(4)]}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))


def put_cifar100(root):
    put_cifar10(root, CIFAR100, "fine_labels")


def put_stl10(root, parts=(("train", 5), ("test", 3))):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, count in parts:
        made_up(count, 3 * 96 * 96, seed=count).tofile(folder / f"{name}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{k}" for k in range(10)))


def put_fashion_mnist(folder, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, labels in (("train", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 9, 0, 0]), ("t10k", [9, 2, 1])):
        count = len(labels)
        for kind, array in (("images-idx3", made_up(count, 28, 28, seed=count)),
                            ("labels-idx1", np.array(labels, np.uint8))):
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if zipped else ''}"
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = header + array.tobytes()
            path.write_bytes(gzip.compress(content) if zipped else content)
