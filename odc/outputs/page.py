"""report.html: the page of a run, one file with the curves of log.jsonl and all clusters.

Python writes the numbers as JSON and the thumbnails as sprite sheets; page.template.html beside
this file draws them. What comes from the log is a number, and the script enters all other text as
text. The page's policy lets the browser run no other script.
"""

import base64
import contextlib
import hashlib
import html
import io
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from odc.data.augmentation import clustering_transform
from odc.data.loader import evaluation_batches
from odc.runtime.checkpoint import write_atomically
from odc.runtime.log import read_record

POINTS = 400  # of a longer curve, about so many are drawn
IMAGES = 10_000  # a page shows all images up to so many, above that a sample of each cluster
CENTRAL, EDGE = 8, 4  # images that a card shows, from both ends of its cluster
NEAR, OUTLIERS = 5, 48  # neighbours of a cluster, outliers
COPIES = 1000  # images in groups of duplicates on a page that shows a sample
SAMPLE, AXES, NEIGHBOUR = 4096, 128, 20  # for outliers: images, main directions, which neighbour
TILES = 16  # images in a row and in a column of a sprite sheet


def write_page(folder, dataset=None, clustering=None, workers=0, note=""):
    """Write report.html into the folder of a run; process 0 only. Raises UserError.

    clustering: with the features of all images, or none. Without one, only the curves are new.
    """
    records, data, sheets = read_log(folder / "log.jsonl"), {}, ""
    summary = "epoch {epoch}, step {step:,}".format(**records[-1]) if records else "no step yet"
    if clustering is not None:
        data, shown = contents(dataset, clustering)
        in_memory = dataset.pixels is not None
        data["root"] = "" if in_memory else quote(os.path.relpath(dataset.root, folder))
        data["note"] = f"{len(dataset):,} images in {len(data['clusters']):,} clusters{note}"
        sheets = sprite_sheets(dataset, shown, workers)
    elif (folder / "report.html").exists():
        with contextlib.suppress(Exception):  # no page of ours: only curves
            text = (folder / "report.html").read_text(encoding="utf-8")
            sheets = "\n".join(re.findall(r"^\.sheet\d+ { [^}]+ }$", text, re.MULTILINE))
            data = json.loads(re.search('id="data">(.*?)</script>', text, re.DOTALL)[1])
    summary += " · " * ("note" in data) + html.escape(data.get("note", ""))
    data["curves"] = curves(records)
    template = Path(__file__).with_name("page.template.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    parts = dict(title=html.escape(folder.resolve().name), summary=summary, sheets=sheets,
                 script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
                 data=json.dumps(data).replace("<", "\\u003c"))
    page = re.sub(r"\{\{(\w+)\}\}", lambda marker: parts[marker[1]], template)
    page = page.encode("utf-8", errors="replace")
    write_atomically(folder / "report.html", lambda file: file.write(page))


def read_log(path):
    """The records of a log.jsonl, [{name: number}], without what else people may have put there."""
    records = []
    for line in path.read_bytes().splitlines():
        record = {name: value for name, value in (read_record(line) or {}).items()
                  if type(value) in (int, float) and abs(value) < 1e15}  # nor a NaN
        if all(type(record.get(name)) is int for name in ("epoch", "step")):
            records.append(record)
    return records


def curves(records):
    """{name: [(step, value), ...]} of all that the log has; about POINTS of a longer curve."""
    found = {}
    for record in records:
        for name, value in record.items():
            found.setdefault(name, []).append((record["step"], value))
    return {name: [*points[: -1 : 1 + len(points) // POINTS], points[-1]]
            for name, points in found.items() if name not in ("epoch", "step")}


def contents(dataset, clustering):
    """(what the page says, a dict for JSON; the images that it shows, a list of indices)."""
    records, members = cluster_records(dataset, clustering)
    per_cluster = len(dataset) if len(dataset) <= IMAGES else max(4, IMAGES // len(records))
    shown = []
    for record in records:
        images = sample(members[record["id"]].tolist(), per_cluster)
        record.update(first=len(shown), count=len(images))
        shown += images
    groups, least = clustering.duplicates
    copies = [i for group in groups for i, *_ in group[1:]]
    outliers = [] if clustering.features is None else far_images(clustering.features, copies)
    if len(dataset) > IMAGES:
        groups = groups[: np.cumsum([len(group) for group in groups]).searchsorted(COPIES)]
    shown += sorted({*outliers, *(i for group in groups for i, *_ in group)}.difference(shown))
    position, names = {image: n for n, image in enumerate(shown)}, list(map(dataset.name_of, shown))
    data = dict(
        clusters=records, outliers=[position[i] for i in outliers],
        classes=[] if dataset.labels is None else dataset.classes,
        groups=[[(position[i], *facts) for i, *facts in group] for group in groups], least=least,
        images=dict(path=[name.encode("utf-8", "replace").decode() for name in names],
                    file=[quote(os.fsencode(name)) for name in names],
                    label=[] if dataset.labels is None else dataset.labels[shown].tolist(),
                    cluster=clustering.labels[shown].tolist(),
                    similarity=[round(s, 4) for s in clustering.similarity[shown].tolist()]))
    return data, shown


def far_images(features, copies):
    """OUTLIERS images that are far from their 20th neighbour; features: unit rows [N, d].

    Not from the first, as foreign pictures come in handfuls. Distances are in the set's
    main directions, as in others every image is alone, and to a sample; `copies` do not count.
    """
    images, distances = np.setdiff1d(np.arange(len(features)), copies), []
    some = np.linspace(0, len(images) - 1, min(len(images), SAMPLE)).astype(int)
    sample = torch.as_tensor(features[images[some]])
    axes = torch.linalg.eigh((sample.T @ sample).double())[1][:, -AXES:].float()
    for block in np.split(images, range(SAMPLE, len(images), SAMPLE)):
        rows = torch.cdist(torch.as_tensor(features[block]) @ axes, sample @ axes)
        nearest = rows.topk(min(NEIGHBOUR + 1, len(some)), largest=False)  # the image itself, too
        distances.append(nearest.values[:, -1])
    return images[torch.cat(distances).argsort(descending=True)[:OUTLIERS].numpy()].tolist()


def cluster_records(dataset, clustering):
    """(a dict for each cluster with images, largest first; images of all K, the nearest first)."""
    members, similarity = clustering.members(), clustering.similarity.double()
    sizes = clustering.labels.bincount(minlength=len(clustering.centroids))
    present = [k for k in sizes.argsort(descending=True, stable=True).tolist() if sizes[k]]
    records, unit = [], F.normalize(clustering.centroids)
    for k, near, place in zip(present, *neighbours_and_map(clustering.centroids[present])):
        size, tightness = len(members[k]), float(similarity[members[k]].mean())
        record = dict(id=k, size=size, tightness=round(tightness, 4), place=place,
                      near=[present[n] for n in near],
                      nearest=float(unit[k] @ unit[present[near[0]]]) if near else 1.0,
                      caption=f"{size:,} image{'s' * (size != 1)} · tightness {tightness:.2f}")
        if dataset.labels is not None:
            counts = dataset.labels[members[k]].bincount()
            record["main"], record["purity"] = int(counts.argmax()), int(counts.max()) / size
            name = dataset.classes[record["main"]][:40]
            record["caption"] += f" · {record['purity']:.0%} {name}"
        records.append(record)
    return records, members


def sample(images, count):
    """`count` of a cluster's images in their order: both ends, and evenly spaced ones between."""
    if len(images) <= count:
        return images
    central, edge = min(CENTRAL, count - count // 3), min(EDGE, count // 3)
    between = np.linspace(central, len(images) - edge - 1, count - central - edge).astype(int)
    return images[:central] + [images[n] for n in between] + images[len(images) - edge :]


def neighbours_and_map(centroids):
    """For each centroid [K, d], the most similar others and its place by PCA, -1..1: two lists."""
    unit = F.normalize(centroids)
    nearest = torch.cat([(part @ unit.T).topk(min(NEAR + 1, len(unit))).indices
                         for part in unit.split(1024)])
    near = [[other for other in row if other != n][:NEAR] for n, row in enumerate(nearest.tolist())]
    centred = unit - unit.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    places = F.pad(centred @ axes.T, (0, 2 - len(axes)))
    places = places / places.abs().max().clamp(min=1e-9)
    return near, [[round(x, 3), round(y, 3)] for x, y in places.tolist()]


def sprite_sheets(dataset, shown, workers=0):
    """CSS rules .sheet0, .sheet1, ...: the thumbnails of images, TILES x TILES in a picture."""
    side = 96 if len(shown) <= IMAGES / 4 else 64 if len(shown) <= IMAGES * 1.1 else 32
    rules = []
    for n, batch in enumerate(evaluation_batches(
            dataset, torch.tensor(shown), clustering_transform(side, dataset.whole_images),
            TILES**2, workers)):
        tiles = torch.zeros(TILES**2, 3, side, side, dtype=torch.uint8)
        tiles[: len(batch.images)] = batch.images
        sheet = tiles.view(TILES, TILES, 3, side, side).permute(0, 3, 1, 4, 2)  # rows of tiles
        sheet = Image.fromarray(sheet.reshape(TILES * side, TILES * side, 3).numpy())
        sheet.save(file := io.BytesIO(), "WEBP", quality=70)
        code = base64.b64encode(file.getvalue()).decode()
        rules.append(f".sheet{n} {{ background-image: url(data:image/webp;base64,{code}) }}")
    return "\n".join(rules)
