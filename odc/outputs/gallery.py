"""clusters.png: what the clusters look like, a row of images for each of some telling ones."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from odc.data.augmentation import evaluation_transform
from odc.data.loader import evaluation_batches
from odc.runtime.checkpoint import write_atomically

ROWS, COLUMNS = 5, 12  # clusters in a section, images of a cluster
SIDE, GAP, MARGIN = 56, 2, 28  # pixels: an image, between two, around a section
CAPTION, HEADING = 20, 34  # heights of the lines of text
ROW = CAPTION + SIDE + 10
WIDTH, HEIGHT = COLUMNS * (SIDE + GAP) - GAP, HEADING + ROWS * ROW
INK, FADED, PAPER, GRAY = (30, 30, 34), (120, 120, 128), (255, 255, 255), 225


@dataclass
class Description:
    """What there is to say of K clusters; unreadable images do not count."""

    members: list  # K int64 arrays of images, the most similar to the centroid first
    sizes: torch.Tensor  # int64 [K]
    tightness: torch.Tensor  # [K], mean similarity of the images, 0 for an empty cluster
    purity: torch.Tensor | None = None  # [K], share of the most frequent class; None without labels
    main_class: torch.Tensor | None = None  # [K], that class


def describe(clustering, classes=None, unreadable=()):
    """The Description of `odc.clusters.Clustering`. classes: int64 [N] or None."""
    K = len(clustering.centroids)
    order = np.lexsort((-clustering.similarity.numpy(), clustering.labels.numpy()))
    order = order[~np.isin(order, list(unreadable))] if unreadable else order
    labels = clustering.labels[order]
    sizes = labels.bincount(minlength=K)
    tightness = labels.bincount(clustering.similarity[order].double(), K) / sizes.clamp(min=1)
    members = np.split(order, sizes.cumsum(0)[:-1])
    if classes is None:
        return Description(members, sizes, tightness)
    num_classes = int(classes.max()) + 1
    # Only the pairs that exist: a table of all clusters and classes may be large.
    pairs, counts = (labels * num_classes + classes[order]).unique(return_counts=True)
    cluster, of_class = pairs // num_classes, pairs % num_classes
    most = torch.zeros_like(sizes).scatter_reduce(0, cluster, counts, "amax")
    wins = counts == most[cluster]
    main_class = torch.zeros_like(sizes).scatter_reduce(
        0, cluster[wins], of_class[wins], "amin", include_self=False)
    return Description(members, sizes, tightness, most / sizes.clamp(min=1), main_class)


def choose(described, seed=0):
    """[(heading, [cluster, ...])]: the largest, purest (or loosest), tightest and random clusters.

    Clusters of a few images are pure and tight by chance: where enough others exist, only those
    count that fill a row. The random ones depend on the seed alone, so that the sheets of one run
    show the same clusters as they change.
    """
    sizes = described.sizes
    present = sizes.argsort(descending=True, stable=True)[: int((sizes > 0).sum())]
    full = present[sizes[present] >= COLUMNS]
    if len(full) < ROWS:
        full = present

    def best(values):  # of equal values the larger cluster
        return full[values[full].argsort(descending=True, stable=True)[:ROWS]].tolist()

    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    second = (("Loosest", best(-described.tightness)) if described.purity is None
              else ("Purest", best(described.purity)))
    return [("Largest", present[:ROWS].tolist()), second, ("Tightest", best(described.tightness)),
            ("Random", order[sizes[order] > 0][:ROWS].tolist())]


def draw(dataset, clustering, unreadable=(), title="", seed=0):
    """The sheet as a `PIL.Image`; a row has the images that are most similar to the centroid."""
    described = describe(clustering, dataset.labels, unreadable)
    sheet = Image.new("RGB", (2 * WIDTH + 3 * MARGIN, 3 * MARGIN + HEADING + 2 * HEIGHT), PAPER)
    pen = ImageDraw.Draw(sheet)

    def write(x, y, black, gray="", size=13):
        pen.text((x, y), black, INK, ImageFont.load_default(size))
        x += pen.textlength(f"{black}  ", ImageFont.load_default(size))
        pen.text((x, y), gray, FADED, ImageFont.load_default(min(size, 14)))

    write(MARGIN, MARGIN, f"{len(described.sizes):,} clusters of {len(clustering.labels):,} images",
          title, 22)
    for place, (name, chosen) in enumerate(choose(described, seed)):
        x = MARGIN + place % 2 * (WIDTH + MARGIN)
        y = MARGIN + HEADING + MARGIN // 2 + place // 2 * (HEIGHT + MARGIN)
        write(x, y, name, size=18)
        for row, cluster in enumerate(chosen):
            top = y + HEADING + row * ROW
            write(x, top, str(cluster), caption(described, cluster, dataset.classes))
            pictures = thumbnails(dataset, described.members[cluster][:COLUMNS], SIDE)
            for column, pixels in enumerate(pictures):
                sheet.paste(Image.fromarray(pixels), (x + column * (SIDE + GAP), top + CAPTION))
    return sheet


def caption(described, cluster, classes=None):
    """What there is to say of a cluster, as text. classes: their names, or None."""
    size, tightness = int(described.sizes[cluster]), float(described.tightness[cluster])
    words = [f"{size:,} image{'s' if size != 1 else ''}", f"tightness {tightness:.2f}"]
    if described.purity is not None:
        main_class = int(described.main_class[cluster])
        name = classes[main_class] if classes else f"class {main_class}"
        words.append(f"{float(described.purity[cluster]):.0%} {name[:40]}")
    return " · ".join(words)


def thumbnails(dataset, images, side, workers=0):
    """uint8 [n, side, side, 3]: the middle of each image [n]; gray where one cannot be read."""
    parts, images = [], torch.as_tensor(images)
    for batch in evaluation_batches(dataset, images, evaluation_transform(side), 256, workers):
        batch.images[batch.failed >= 0] = GRAY
        parts.append(batch.images.permute(0, 2, 3, 1))
    return torch.cat(parts).numpy()


def save(path, *arguments, **options):
    """`draw` into a PNG file, all of it or nothing; main process only. Raises UserError."""
    sheet = draw(*arguments, **options)
    write_atomically(path, lambda file: sheet.save(file, "PNG", optimize=True))
