"""Duplicates and outliers that a run finds, against copies and foreign pictures planted in a folder.

    python -m tests.benchmarks.pictures plant /usr/share/tuxpaint/stamps planted
    python train.py --data planted/images --output out
    python -m tests.benchmarks.pictures score planted out

plant writes the folder's pictures, as RGB on white, five changed copies each of a hundred of them,
and 20 pictures of other kinds. score reads duplicates.csv and the lists on the page. Originals
with equal pixels count as copies of each other; other pairs of two originals are listed as unknown,
for eyes to judge, and count as false.
"""

import argparse
import collections
import csv
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from odc.data.datasets import open_dataset

KINDS = ("resized", "encoded", "brighter", "cropped", "flipped")


def copy_of(image, kind, chance):
    """A changed copy, and the options that it is saved with."""
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
    return image, dict(quality=chance.randint(40, 60) if kind == "encoded" else 90)


def foreign(n, chance):
    """One of 20 pictures: noise, windows of a screen, one colour, or lines of text."""
    size = chance.randint(150, 400), chance.randint(150, 400)
    if n % 4 == 0:
        noise = np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8)
        return Image.fromarray(noise)
    colour = tuple(chance.choices(range(256), k=3))
    image = Image.new("RGB", size, colour if n % 4 == 2 else "white")
    draw, (width, height) = ImageDraw.Draw(image), size
    for line in range(10, height - 12, 14):
        if n % 4 == 1:  # a window: a bar, a list beside it, boxes
            draw.rectangle((0, 0, width, 18), fill=colour)
            draw.rectangle((4, line + 14, 60, line + 20), fill="gray")
            draw.rectangle((80, 40, width - 20, 60 + height // 3), outline="black")
        elif n % 4 == 3:
            draw.text((8, line), "".join(chance.choices("etaoin shrdlu", k=width // 7)), "black")
    return image


def plant(source, target, originals=100, seed=0):
    """Write target/images and target/planted.json: {name: [original, kind]}."""
    chance, dataset, planted, images = random.Random(seed), open_dataset(source), {}, {}
    folder = Path(target, "images")
    folder.mkdir(parents=True)
    for i in range(len(dataset)):
        images[f"{i:06d}.png"] = dataset.load(i)
        images[f"{i:06d}.png"].save(folder / f"{i:06d}.png")
    for original in chance.sample(sorted(images), min(originals, len(images))):
        for kind in KINDS:
            copy, options = copy_of(images[original], kind, chance)
            name = f"{original[:6]}-{kind}.jpg"
            copy.save(folder / name, **options)
            planted[name] = [original, kind]
    for n in range(20):
        foreign(n, chance).save(folder / f"foreign-{n:02d}.png")
    Path(target, "planted.json").write_text(json.dumps(planted))


def score_duplicates(planted, groups, folder):
    """{measure: value} of groups, lists of names."""
    source = {}
    for name in {name for group in groups for name in group}:
        original = planted.get(name, [name])[0]
        pixels = Image.open(folder / original)
        source[name] = (pixels.size, pixels.tobytes())
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    true = {pair for pair in pairs if source[pair[0]] == source[pair[1]]}
    false = [pair for pair in pairs if pair not in true]
    unknown = [pair for pair in false if not {*pair} & planted.keys()]
    found = {frozenset(pair) for pair in pairs}
    counts = collections.Counter(kind for name, (original, kind) in planted.items()
                                 if frozenset((name, original)) in found)
    number = len(planted) / len(KINDS)
    return dict(pairs=len(pairs), precision=len(true) / max(1, len(pairs)), unknown=unknown,
                false=sorted(set(false) - set(unknown)),
                recall={kind: round(counts[kind] / number, 3) for kind in KINDS})


def read_run(run):
    """(the groups of duplicates.csv, the names in the page's list of outliers)."""
    groups = collections.defaultdict(list)
    with open(Path(run, "duplicates.csv"), newline="") as file:
        for row in csv.DictReader(file):
            groups[row["group"]].append(row["path"])
    text = Path(run, "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    return list(groups.values()), [data["images"]["path"][n] for n in data["outliers"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plant", "score"))
    parser.add_argument("source", help="plant: a folder of pictures; score: that of plant")
    parser.add_argument("target", help="plant: a new folder; score: the output of a run")
    arguments = parser.parse_args()
    if arguments.what == "plant":
        return plant(arguments.source, arguments.target)
    planted = json.loads(Path(arguments.source, "planted.json").read_text())
    groups, outliers = read_run(arguments.target)
    for name, value in score_duplicates(planted, groups,
                                        Path(arguments.source, "images")).items():
        print(f"{name}: {value}")
    print(f"foreign pictures among {len(outliers)} outliers: "
          f"{sum('foreign' in name for name in outliers)} of 20")


if __name__ == "__main__":
    main()
