"""Groups of images that are copies of each other, over all clusters."""

import collections
import functools
import os

import numpy as np
import torch
from PIL import Image

from odc.data.augmentation import resize_exact
from odc.data.images import FORMATS
from odc.data.loader import evaluation_batches

BITS, REACH = 6, 16  # bits that may differ; images with the same quarter of a hash to compare with
BLOCK, NEAREST = 2048, 4  # images compared by features, and candidates that each has there
PAIRS = 20_000  # the most similar candidates that are looked at
# Least correlations of small pictures of copies: gray, colours, and gray if the features agree.
SAME, SAME_COLOURS, ALIKE = 0.99, 0.98, 0.9


def find_groups(dataset, clustering, workers=0):
    """(lists of (image, width, height, bytes, similarity, found); the features' least similarity).

    The first image of a group is the largest, the others are similar to it: `found` is "hash" for
    the correlation of small pictures, "features" for the cosine. Raises UserError.
    """
    features, labels, near = clustering.features, clustering.labels, collections.defaultdict(set)
    some = np.linspace(0, len(labels) - 1, BLOCK).astype(int)
    rows = torch.as_tensor(features[some])  # of different clusters, hardly any pair is a copy
    others = (rows @ rows.T)[labels[some, None] != labels[some]]
    least = max(0.9, float(others.quantile(0.9999))) if len(others) else 0.9
    for _, i, j in np.unique(np.concatenate([*candidates(clustering, least)]), axis=0)[:PAIRS]:
        near[int(i)].add(int(j))
        near[int(j)].add(int(i))
    sizes = {i: size_of(dataset, i) for i in near}
    images = sorted(near, key=lambda i: (-sizes[i][0] * sizes[i][1], -sizes[i][2], i))
    batches = evaluation_batches(dataset, np.array(images, int), functools.partial(
        resize_exact, size=16, resize=64), 64, workers)
    small = dict(zip(images, (pixels.float() for batch in batches for pixels in batch.images)))

    def likeness(i, j):
        gray, other = small[i].mean(0), small[j].mean(0)
        same, cosine = correlation(gray, other), float(features[i] @ features[j])
        if same >= SAME and correlation(small[i], small[j]) >= SAME_COLOURS:
            return same, "hash"
        alike = cosine >= least and max(same, correlation(gray.flip(1), other)) >= ALIKE
        return (cosine, "features") if alike else None

    groups, taken = [], set()
    for first in images:
        group, queue = {first: (1.0, "")}, [first] if first not in taken else []
        while queue:  # along the candidates; all are like the first one, so there are no chains
            for other in near[queue.pop()] - taken - group.keys():
                if found := likeness(first, other):
                    group[other] = found
                    queue.append(other)
        if len(group) > 1:
            groups.append([(image, *sizes[image], *found) for image, found in group.items()])
            taken |= group.keys()
    return groups, least


def candidates(clustering, least):
    """Yield arrays [n, 3]: a distance, and two images that may be copies. Not all are compared."""
    hashes = clustering.hashes.numpy()
    for quarter in hashes.view(np.uint16).reshape(-1, 4).T:  # up to 3 unequal bits leave one equal
        order = np.lexsort((hashes, quarter))
        for step in range(1, REACH + 1):
            a, b = order[:-step], order[step:]
            a, b = np.stack([a, b])[:, (quarter[a] == quarter[b]) & (quarter[a] > 0)]
            bits = np.unpackbits((hashes[a] ^ hashes[b]).view(np.uint8)).reshape(-1, 64)
            found = np.stack([bits.sum(1, dtype=int), a, b], 1)
            yield found[found[:, 0] <= BITS]
    for images in clustering.members():
        # Copies are about equally similar to the centroid.
        for block in np.split(images, range(BLOCK, len(images), BLOCK)):
            rows = torch.as_tensor(clustering.features[block])
            best = (rows @ rows.T).fill_diagonal_(-1).topk(min(NEAREST, len(block)))
            row, column = (best.values >= least).nonzero().numpy().T
            distance = 64 * (1 - best.values[row, column].numpy())
            yield np.stack([distance.astype(int), block[row], block[best.indices[row, column]]], 1)


def correlation(a, b):
    """Of pixels 0..255; near 0 if one picture has a single colour, as noise is not compared."""
    (aa, ab), (_, bb) = torch.cov(torch.stack([a.flatten(), b.flatten()]))
    return float(ab / (aa.clamp(min=16) * bb.clamp(min=16)).sqrt())


def size_of(dataset, i):
    """Width, height and bytes of an image's file; 0 bytes in memory."""
    if dataset.pixels is not None:
        return *dataset.pixels.shape[2:0:-1], 0
    path = os.path.join(dataset.root, dataset.name_of(i))
    with Image.open(path, formats=FORMATS) as image:
        return *image.size, os.path.getsize(path)
