"""Copies and foreign pictures planted in a folder: how many a run finds.

    python -m tests.benchmarks.pictures plant /usr/share/tuxpaint/stamps planted
    python train.py --data planted/images --output out
    python -m tests.benchmarks.pictures score planted out

Five changed copies each of a hundred pictures, and 20 pictures of noise, windows, one colour or
text. Originals with equal pixels count as copies; pairs of other originals, for eyes to judge, are
counted as false and listed.
"""

import collections
import csv
import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from odc.data.datasets import open_dataset

KINDS = ("resized", "encoded", "brighter", "cropped", "flipped")


def copy_of(image, kind, chance):
    """A changed copy, and the JPEG quality that it is saved with."""
    width, height = image.size
    if kind == "resized":
        scale = chance.uniform(0.5, 0.7)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    elif kind == "brighter":
        image = ImageEnhance.Brightness(image).enhance(chance.choice((0.8, 1.2)))
    elif kind == "cropped":  # 5% of the width and of the height, from both sides
        left, top = chance.uniform(0, 0.05) * width, chance.uniform(0, 0.05) * height
        image = image.crop((round(left), round(top), round(left + 0.95 * width),
                            round(top + 0.95 * height)))
    elif kind == "flipped":
        image = ImageOps.mirror(image)
    return image, chance.randint(40, 60) if kind == "encoded" else 90


def foreign(n, chance):
    """One of 20 pictures: noise, windows of a screen, one colour, lines of text, in turn."""
    width, height = chance.randint(150, 400), chance.randint(150, 400)
    colour = tuple(chance.choices(range(256), k=3))
    if n % 4 == 0:
        return Image.fromarray(np.random.default_rng(n).integers(0, 256, (height, width, 3),
                                                                 np.uint8))
    image = Image.new("RGB", (width, height), colour if n % 4 == 2 else "white")
    draw = ImageDraw.Draw(image)
    for line in range(10, height - 12, 14) if n % 2 else ():
        if n % 4 == 3:
            draw.text((8, line), "".join(chance.choices("etaoin shrdlu", k=width // 7)), "black")
        else:  # a bar, a list beside a box
            draw.rectangle((0, 0, width, 18), fill=colour)
            draw.rectangle((4, line + 14, 60, line + 20), fill="gray")
            draw.rectangle((80, 40, width - 20, 60 + height // 3), outline="black")
    return image


def plant(source, target):
    """Write target/images and target/planted.json: {name: [original, kind]}."""
    chance, dataset, planted = random.Random(0), open_dataset(source), {}
    folder = Path(target, "images")
    folder.mkdir(parents=True)
    chosen = chance.sample(range(len(dataset)), min(100, len(dataset)))
    for i in range(len(dataset)):
        dataset.load(i).save(folder / f"{i:06d}.png")
    for i, kind in itertools.product(chosen, KINDS):
        image, quality = copy_of(dataset.load(i), kind, chance)
        image.save(folder / f"{i:06d}-{kind}.jpg", quality=quality)
        planted[f"{i:06d}-{kind}.jpg"] = [f"{i:06d}.png", kind]
    for n in range(20):
        foreign(n, chance).save(folder / f"foreign-{n:02d}.png")
    Path(target, "planted.json").write_text(json.dumps(planted))


def score(target, run):
    """Print what the run's duplicates.csv and page say of the planted pictures."""
    planted, pixels = json.loads(Path(target, "planted.json").read_text()), {}
    groups = collections.defaultdict(list)
    with open(Path(run, "duplicates.csv"), newline="") as file:
        for row in csv.DictReader(file):
            groups[row["group"]].append(row["path"])
            original, _ = planted.get(row["path"], [row["path"], None])
            image = Image.open(Path(target, "images", original))
            pixels[row["path"]] = image.size, image.tobytes()
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    false = [pair for pair in pairs if pixels[pair[0]] != pixels[pair[1]]]
    unknown = [pair for pair in false if not {*pair} & planted.keys()]
    found, count = set(map(frozenset, pairs)), len(planted) / len(KINDS)
    print(f"pairs {len(pairs)}, precision {1 - len(false) / max(1, len(pairs)):.3f}; of two "
          f"originals: {len(unknown)}, {unknown[:50]}")
    for kind in KINDS:
        hits = sum(frozenset((name, original)) in found
                   for name, (original, changed) in planted.items() if changed == kind)
        print(f"{kind}: recall {hits / count:.2f}")
    text = Path(run, "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    outliers = [data["images"]["path"][n] for n in data["outliers"]]
    print(f"foreign among {len(outliers)} outliers: {sum('foreign' in n for n in outliers)} of 20")


if __name__ == "__main__":
    what, first, second = sys.argv[1:]
    {"plant": plant, "score": score}[what](first, second)
