"""clusters.png: what the clusters look like, a row of images for each of some telling ones."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from odc.runtime.checkpoint import write_atomically
from odc.data.images import BadImage

ROWS, COLUMNS = 5, 12  # clusters in a section, images of a cluster
SIDE, GAP, MARGIN = 56, 2, 28  # pixels: an image, between two, around a section
CAPTION, HEADING = 20, 34  # heights of the lines of text
WIDTH = COLUMNS * (SIDE + GAP) - GAP
HEIGHT = HEADING + ROWS * (CAPTION + SIDE + 10)
INK, FADED, PAPER = (30, 30, 34), (120, 120, 128), (255, 255, 255)


@dataclass
class Clusters:
    """What there is to say of K clusters: tensors [K]; purity and main_class are None without labels."""

    sizes: torch.Tensor  # int64
    similarity: torch.Tensor  # mean cosine of the images to the centroid, 0 for an empty cluster
    purity: torch.Tensor | None  # share of the images that have the most frequent class
    main_class: torch.Tensor | None  # that class, int64


def describe(labels, similarity, num_clusters, classes=None):
    """Clusters of images: labels int64 [N] in 0..K-1, similarity [N] to the own centroid, classes int64 [N] or None."""
    sizes = labels.bincount(minlength=num_clusters)
    mean = labels.bincount(similarity.double(), minlength=num_clusters) / sizes.clamp(min=1)
    if classes is None:
        return Clusters(sizes, mean, None, None)
    num_classes = int(classes.max()) + 1
    pairs, counts = (labels * num_classes + classes).unique(return_counts=True)  # never the whole table of K x classes
    cluster, of_class = pairs // num_classes, pairs % num_classes
    most = torch.zeros_like(sizes).scatter_reduce_(0, cluster, counts, "amax")
    wins = counts == most[cluster]
    main_class = torch.zeros_like(sizes).scatter_reduce_(0, cluster[wins], of_class[wins], "amin", include_self=False)
    return Clusters(sizes, mean, most / sizes.clamp(min=1), main_class)


def choose(clusters, seed=0, count=ROWS):
    """[(heading, [cluster, ...])]: the largest, the purest (or loosest), the tightest and random clusters.

    Clusters of a few images are pure and tight by chance: where enough others exist, only those count that fill a row.
    The random ones depend on the seed alone, so that sheets of one run show the same clusters as they change.
    """
    present = (clusters.sizes > 0).nonzero()[:, 0]
    full = (clusters.sizes >= COLUMNS).nonzero()[:, 0]
    if len(full) < count:
        full = present

    def best(among, values):
        order = clusters.sizes[among].argsort(descending=True, stable=True)  # of equal values the larger cluster
        among = among[order]
        return among[values[among].argsort(descending=True, stable=True)[:count]].tolist()

    order = torch.randperm(len(clusters.sizes), generator=torch.Generator().manual_seed(seed))
    drawn = order[clusters.sizes[order] > 0][:count].tolist()
    second = ("Loosest", best(full, -clusters.similarity))
    if clusters.purity is not None:
        second = ("Purest", best(full, clusters.purity))
    return [("Largest", best(present, clusters.sizes)), second, ("Tightest", best(full, clusters.similarity)),
            ("Random", drawn)]


def draw(dataset, labels, similarity, num_clusters, title="", seed=0):
    """The sheet as a `PIL.Image`.

    dataset: an ImageSet of N images. labels: int64 [N] on the CPU. similarity: [N], cosine to the own centroid; the
    images of a row are those with the largest.
    """
    clusters = describe(labels, similarity, num_clusters, dataset.labels)
    sections = choose(clusters, seed)
    top = MARGIN + HEADING
    sheet = Image.new("RGB", (2 * WIDTH + 3 * MARGIN, top + 2 * (HEIGHT + MARGIN)), PAPER)
    pen = ImageDraw.Draw(sheet)
    font, heading = ImageFont.load_default(22), f"{num_clusters:,} clusters of {len(labels):,} images   "
    pen.text((MARGIN, MARGIN), heading, INK, font)
    pen.text((MARGIN + pen.textlength(heading, font), MARGIN + 7), title, FADED, ImageFont.load_default(14))
    for place, (name, chosen) in enumerate(sections):
        x = MARGIN + place % 2 * (WIDTH + MARGIN)
        y = top + MARGIN // 2 + place // 2 * (HEIGHT + MARGIN)
        pen.text((x, y), name, INK, ImageFont.load_default(18))
        for row, cluster in enumerate(chosen):
            _draw_row(sheet, pen, x, y + HEADING + row * (CAPTION + SIDE + 10), cluster, clusters, dataset, labels,
                      similarity)
    return sheet


def _draw_row(sheet, pen, x, y, cluster, clusters, dataset, labels, similarity):
    font, number = ImageFont.load_default(13), f"{cluster}  "
    pen.text((x, y), number, INK, font)
    pen.text((x + pen.textlength(number, font), y), caption(cluster, clusters, dataset.classes), FADED, font)
    members = (labels == cluster).nonzero()[:, 0]
    order = similarity[members].argsort(descending=True, stable=True)
    for column, i in enumerate(members[order[:COLUMNS]].tolist()):
        sheet.paste(_thumbnail(dataset, i), (x + column * (SIDE + GAP), y + CAPTION))


def caption(cluster, clusters, class_names=None):
    """What stands above a row, after the cluster's number."""
    size = int(clusters.sizes[cluster])
    words = [f"{size:,} image{'s' if size != 1 else ''}", f"similarity {float(clusters.similarity[cluster]):.2f}"]
    if clusters.purity is not None:
        main_class = int(clusters.main_class[cluster])
        name = class_names[main_class] if class_names else f"class {main_class}"
        words.insert(1, f"{float(clusters.purity[cluster]):.0%} {name[:40]}")
    return " · ".join(words)


def _thumbnail(dataset, i):
    """Image i, its central square; a gray one with a cross if it cannot be read."""
    try:
        return ImageOps.fit(dataset.load(i), (SIDE, SIDE), Image.Resampling.LANCZOS)
    except BadImage:
        blank = Image.new("RGB", (SIDE, SIDE), (225, 225, 228))
        pen = ImageDraw.Draw(blank)
        pen.line((SIDE // 3, SIDE // 3, SIDE - SIDE // 3, SIDE - SIDE // 3), FADED, 2)
        pen.line((SIDE // 3, SIDE - SIDE // 3, SIDE - SIDE // 3, SIDE // 3), FADED, 2)
        return blank


def save(path, *arguments, **options):
    """`draw` into a PNG file, all of it or nothing; main process only. Raises UserError if it cannot be written."""
    sheet = draw(*arguments, **options)
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG", optimize=True))
