"""report.html: the page of a run, one file that needs nothing beside itself.

    python -m odc.outputs.report out

It shows the curves of log.jsonl and, once there are clusters, all of them: a map, a card for each
cluster, near-duplicates and outliers. Python writes the numbers as JSON and the thumbnails as
sprite sheets; report.template.html beside this file lays them out.
"""

import base64
import csv
import dataclasses
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from odc.clusters import Clustering
from odc.data.images import ImageSet, Names
from odc.data.datasets import open_dataset
from odc.data.loader import default_workers
from odc.distributed import print_main
from odc.errors import UserError
from odc.outputs import curves, gallery
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import Parser
from odc.runtime.checkpoint import write_atomically

IMAGES = 10_000  # a page shows all images up to so many, above that a sample of each cluster
CENTRAL, EDGE = 8, 4  # images that a card shows, from both ends of its cluster
NEAR, PAIRS, OUTLIERS = 5, 24, 48  # neighbours of a cluster, near-duplicate pairs, outliers
TILES = 16  # images in a row and in a column of a sprite sheet


def save(folder, dataset=None, clustering=None, unreadable=(), workers=0, without_pictures=""):
    """Write report.html into the folder of a run; main process only. Raises UserError.

    dataset, clustering: an ImageSet and its Clustering; without both the page has curves alone.
    without_pictures: the sentence that says why thumbnails are missing.
    """
    records = curves.read_log(folder / "log.jsonl")
    # The clusters are those of the last record with a silhouette; the curves may go on after it.
    of_clusters = [record for record in records if clustering and "silhouette" in record]
    last = next(iter((of_clusters or records)[-1:]), {})
    summary = f"epoch {last['epoch']}, step {last['step']:,}" if last else "no step yet"
    data, sheets = {}, ""
    if clustering is not None:
        rounded = clustering.similarity.round(decimals=4)  # as clusters.csv has it
        clustering = dataclasses.replace(clustering, similarity=rounded)
        earlier = earlier_sizes(folder, last.get("epoch", 0), len(clustering.centroids))
        data, shown = content(dataset, clustering, unreadable, earlier)
        summary += f" · {len(clustering.labels):,} images in {len(data['clusters']):,} clusters"
        data["pictures"] = not without_pictures
        if without_pictures:
            data["notes"].append(f"There are no pictures: {without_pictures}")
        else:
            sheets = sprite_sheets(dataset, shown, workers)
    parts = dict(title=html.escape(folder.resolve().name), summary=summary, sheets=sheets,
                 curves=curves.charts(records), data=json.dumps(data).replace("<", "\\u003c"))
    template = Path(__file__).with_name("report.template.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda marker: parts[marker[1]], template)
    write_atomically(folder / "report.html",
                     lambda file: file.write(page.encode("utf-8", errors="replace")))


def content(dataset, clustering, unreadable, earlier=None):
    """(what the page says, a dict for JSON; the images that it shows, a list of indices).

    earlier: (epoch, sizes int64 [K]) from which clusters have grown, or None.
    """
    described = gallery.describe(clustering, dataset.labels, unreadable)
    order = described.sizes.argsort(descending=True, stable=True).tolist()
    present = [k for k in order if described.sizes[k]]
    N = len(clustering.labels)
    per_cluster = N if N <= IMAGES else max(4, IMAGES // len(present))
    shown, records = [], []
    for k, near, place in zip(present, *neighbours_and_map(clustering.centroids[present])):
        images = sample(described.members[k].tolist(), per_cluster)
        record = dict(id=k, size=int(described.sizes[k]), first=len(shown), count=len(images),
                      tightness=round(float(described.tightness[k]), 4), place=place,
                      near=[present[n] for n in near],
                      caption=gallery.caption(described, k, dataset.classes))
        if dataset.labels is not None:
            record.update(purity=float(described.purity[k]), main=int(described.main_class[k]))
        if earlier:
            record["growth"] = record["size"] - int(earlier[1][k])
            record["caption"] += f" · {record['growth']:+,} since epoch {earlier[0]}"
        records.append(record)
        shown += images
    num_readable, notes = int(described.sizes.sum()), []
    if len(shown) < num_readable:
        notes.append(f"This page shows {len(shown):,} of {num_readable:,} images: of each cluster "
                     "the central ones, those at its edge, and some between.")
    if N > num_readable:
        notes.append(f"{N - num_readable:,} images cannot be read.")
    if clustering.features is None:
        notes.append("Near-duplicates are left out: features.npy is missing.")
    pairs = near_duplicates(clustering.features, described.members)
    readable = np.concatenate(described.members)
    least_similar = clustering.similarity[readable].argsort(stable=True)[:OUTLIERS]
    outliers = readable[least_similar.numpy()].tolist()
    shown += sorted({*outliers, *(i for pair in pairs for i in pair[1:])}.difference(shown))
    position = {image: n for n, image in enumerate(shown)}
    labels, classes = [], []
    if dataset.labels is not None:
        labels = dataset.labels[shown].tolist()
        classes = dataset.classes or [f"class {k}" for k in range(int(dataset.labels.max()) + 1)]
    data = dict(
        clusters=records, notes=notes, classes=classes, outliers=[position[i] for i in outliers],
        pairs=[dict(similarity=score, images=[position[i], position[j]]) for score, i, j in pairs],
        images=dict(path=[dataset.name_of(i).encode("utf-8", "replace").decode() for i in shown],
                    label=labels, cluster=clustering.labels[shown].tolist(),
                    similarity=[round(s, 4) for s in clustering.similarity[shown].tolist()]))
    return data, shown


def sample(images, count):
    """`count` of a cluster's images in their order: both ends, and evenly spaced ones between."""
    if len(images) <= count:
        return images
    central, edge = min(CENTRAL, count - count // 3), min(EDGE, count // 3)
    between = np.linspace(central, len(images) - edge - 1, count - central - edge).astype(int)
    return images[:central] + [images[n] for n in between] + images[len(images) - edge :]


def neighbours_and_map(centroids):
    """For each centroid [K, d] the most similar others, and its place on the two principal
    components, scaled to -1..1: two lists of K lists."""
    unit = F.normalize(centroids)
    nearest = torch.cat([(part @ unit.T).topk(min(NEAR + 1, len(unit))).indices
                         for part in unit.split(1024)])
    near = [[other for other in row if other != n][:NEAR] for n, row in enumerate(nearest.tolist())]
    centred = unit - unit.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    places = F.pad(centred @ axes.T, (0, 2 - len(axes)))
    places = places / places.abs().max().clamp(min=1e-9)
    return near, [[round(x, 3), round(y, 3)] for x, y in places.tolist()]


def near_duplicates(features, members):
    """Images and the most similar one of their cluster, [(similarity, i, j)], the best first.

    features: unit rows [N, d], or None. members: for each cluster its images. An image is in one
    pair at most: many copies of one image do not fill the list.
    """
    pairs = []
    for images in members if features is not None else []:
        rows = torch.as_tensor(features[images])
        for start in range(0, len(images), 1024):
            scores = rows[start : start + 1024] @ rows.T
            scores.diagonal(start).fill_(-1)  # an image and itself
            best, column = scores.max(1)
            pairs += zip(best.tolist(), images[start : start + 1024].tolist(),
                         images[column.numpy()].tolist())
        pairs = sorted(pairs, reverse=True)[: 50 * PAIRS]
    found, seen = [], set()
    for score, i, j in pairs:
        if score > 0 and len(found) < PAIRS and seen.isdisjoint((i, j)):
            found.append((score, i, j))
            seen.update((i, j))
    return found


def sprite_sheets(dataset, shown, workers=0):
    """CSS rules .sheet0, .sheet1, ...: the thumbnails of images, TILES x TILES in a picture."""
    side = 96 if len(shown) <= IMAGES / 4 else 64 if len(shown) <= IMAGES * 1.1 else 32
    pictures = gallery.thumbnails(dataset, shown, side, workers)
    rules = []
    for n, start in enumerate(range(0, len(shown), TILES**2)):
        tiles = np.full((TILES**2, side, side, 3), gallery.GRAY, np.uint8)
        tiles[: len(shown) - start] = pictures[start : start + TILES**2]
        sheet = tiles.reshape(TILES, TILES, side, side, 3).swapaxes(1, 2)
        file = io.BytesIO()
        Image.fromarray(sheet.reshape(TILES * side, -1, 3)).save(file, "WEBP", quality=70)
        code = base64.b64encode(file.getvalue()).decode()
        rules.append(f".sheet{n} {{ background-image: url(data:image/webp;base64,{code}) }}")
    return "\n".join(rules)


def earlier_sizes(folder, epoch, K):
    """(epoch, cluster sizes int64 [K]) of the last labels_epoch_*.npy before an epoch, or None."""
    copies = {int(number): path for path in folder.glob("labels_epoch_*.npy")
              if (number := path.stem.rpartition("_")[2]).isdecimal()}
    before = [number for number in copies if number < epoch]
    if not before:
        return None
    return max(before), np.bincount(np.load(copies[max(before)]), minlength=K)


def read_clustering(folder):
    """(file names, Clustering, unreadable images) from what a run has left. Raises UserError."""
    table = folder / "clusters.csv"
    try:
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))[1:]
        labels = torch.tensor([int(row[1] or 0) for row in rows], dtype=torch.int64)
        similarity = torch.tensor([float(row[2] or 0) for row in rows])
        centroids = torch.from_numpy(np.load(folder / "centroids.npy"))
        path = folder / "features.npy"
        features = np.load(path, mmap_mode="r") if path.exists() else None
        if not rows or (features is not None and len(features) != len(rows)):
            raise ValueError
    except (ValueError, IndexError, EOFError):
        raise UserError(f"{table}, centroids.npy and features.npy there are not what one run of "
                        "train.py wrote; make them again by its command with --export-only."
                        ) from None
    unreadable = {i for i, row in enumerate(rows) if not row[1]}
    return [row[0] for row in rows], Clustering(labels, similarity, centroids, features), unreadable


def open_images(folder, names, data=None):
    """The ImageSet in which a run found these names. Raises UserError if it is gone or changed."""
    background = None
    if data is None:
        path = folder / "checkpoint.pth"
        if not path.exists():
            raise UserError(f"{path} is missing; name the images with --data.")
        settings = checkpoint.load(path)["settings"]
        data, background = settings["data"], settings["background"]
    dataset = open_dataset(data)
    if names != [dataset.name_of(i) for i in range(len(dataset))]:
        raise UserError(f"{data} holds other images than clusters.csv; name the run's images with "
                        "--data.")
    return dataset


def main(arguments=None):
    parser = Parser("Make report.html, the page of a run, from what the run has left.")
    parser.add_argument("folder", metavar="DIR", help="what train.py wrote, its --output")
    parser.add_argument("--data", metavar="PATH", help="its images (default: where they were)")
    args = parser.parse_args(arguments)
    folder = Path(args.folder)
    missing = [name for name in ("clusters.csv", "centroids.npy") if not (folder / name).exists()]
    if missing:
        save(folder)
        print_main(f"The page has curves alone: {folder / missing[0]} is missing.")
    else:
        names, clustering, unreadable = read_clustering(folder)
        try:
            dataset = open_images(folder, names, args.data)
            workers = default_workers(dataset.pixels is not None)
            save(folder, dataset, clustering, unreadable, workers)
        except UserError as error:
            dataset = ImageSet("folder", "train", "", names=Names(names))
            save(folder, dataset, clustering, unreadable, without_pictures=str(error))
            print_main(f"The page has no pictures: {error}")
    print_main(f"Done: {folder / 'report.html'}")


if __name__ == "__main__":
    launch.run_program(main)
