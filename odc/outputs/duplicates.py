"""Groups of images that are copies of each other, over all clusters.

Candidates are images whose 64-bit difference hashes share a quarter, and near neighbours by the
features within blocks of a cluster: nothing compares all pairs. They are read again, and small
pictures of them decide.
"""

import os

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from odc.data.images import FORMATS
from odc.data.loader import evaluation_batches

BITS, REACH = 6, 16  # that hashes may differ in; images that one meets of each equal quarter
BLOCK, NEAREST = 2048, 4  # images compared by features, and candidates that each has there
PAIRS = 10_000  # candidates, at most
SIDE = 16  # of a small picture
# Least correlations of copies' small pictures: gray, colours, and gray if the features agree.
SAME, SAME_COLOUR, ALIKE = 0.99, 0.98, 0.9


def find_groups(dataset, clustering, workers=0):
    """([[(image, similarity, found), ...], ...], the features' least similarity of copies).

    The first image of a group has most pixels. Similarity is to that one: the correlation of gray
    pictures if `found` is "hash", the cosine if it is "features". Raises UserError.
    """
    least = threshold(clustering)
    pairs = [*hash_pairs(clustering.hashes.numpy()), *feature_pairs(clustering, least)]
    near = {}
    for i, j in np.concatenate(pairs)[:PAIRS].tolist():
        near.setdefault(i, set()).add(j)
        near.setdefault(j, set()).add(i)
    images = sorted(near, key=lambda i: (*(-n for n in size_of(dataset, i)), i))
    batches = evaluation_batches(dataset, torch.tensor(images, dtype=torch.int64), small_picture,
                                 64, workers)
    small = torch.cat([torch.empty(0, 4, SIDE, SIDE), *(batch.images for batch in batches)])
    shapes, colours = small[:, 0, 0, 0].log(), centred(small[:, 1:])
    gray, mirrored = centred(small[:, 1:].mean(1)), centred(small[:, 1:].mean(1).flip(2))
    features, row_of = torch.as_tensor(clustering.features[images]), {}
    row_of.update((image, row) for row, image in enumerate(images))

    def likeness(i, j):
        a, b = row_of[i], row_of[j]
        same, cosine = float(gray[a] @ gray[b]), float(features[a] @ features[b])
        if abs(shapes[a] - shapes[b]) > 0.1:
            return None
        if same >= SAME and colours[a] @ colours[b] >= SAME_COLOUR:
            return same, "hash"
        alike = cosine >= least and max(same, float(mirrored[a] @ gray[b])) >= ALIKE
        return (cosine, "features") if alike else None

    groups, taken = [], set()
    for first in images:
        group, queue, seen = [(first, 1.0, "")], [first], {first}
        while queue and first not in taken:  # along the candidates, but all are like the first one
            for other in sorted(near[queue.pop()] - seen - taken):
                seen.add(other)
                if found := likeness(first, other):
                    group.append((other, *found))
                    queue.append(other)
        if len(group) > 1:
            groups.append(group)
            taken.update(image for image, *_ in group)
    return groups, least


def threshold(clustering):
    """The features' least similarity of copies: of different clusters, hardly any pair has it."""
    some = np.linspace(0, len(clustering.labels) - 1, BLOCK).astype(int)
    rows, labels = torch.as_tensor(clustering.features[some]), clustering.labels[some]
    others = (rows @ rows.T)[labels[:, None] != labels]
    return max(ALIKE, float(others.quantile(0.9999))) if len(others) else ALIKE


def hash_pairs(hashes):
    """Yield arrays [n, 2] of pairs whose hashes, int64 [N], share a quarter, but one of zeros."""
    for quarter in hashes.view(np.uint16).reshape(-1, 4).T:
        order = np.lexsort((hashes, quarter))
        order = order[quarter[order] > 0]
        for step in range(1, REACH + 1):
            pairs = np.stack([order[:-step], order[step:]], 1)
            first, second = pairs[quarter[pairs[:, 0]] == quarter[pairs[:, 1]]].T
            different = (hashes[first] ^ hashes[second]).view(np.uint8).reshape(-1, 8)
            few = np.unpackbits(different, axis=1).sum(1) <= BITS
            yield np.stack([first[few], second[few]], 1)


def feature_pairs(clustering, least):
    """Yield arrays [n, 2] of pairs in one cluster whose similarity is at least `least`.

    Copies are about equally similar to the centroid, so they lie in one block.
    """
    for images in clustering.members():
        for start in range(0, len(images), BLOCK):
            block = images[start : start + BLOCK]
            rows = torch.as_tensor(clustering.features[block])
            near = (rows @ rows.T).fill_diagonal_(-1).topk(min(NEAREST, len(block)))
            row, column = (near.values >= least).nonzero().T.numpy()
            yield np.stack([block[row], block[near.indices[row, column].numpy()]], 1)


def small_picture(image):
    """float [4, SIDE, SIDE] of a `PIL.Image`: its width / height everywhere, then RGB."""
    pixels = TF.pil_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return torch.cat([torch.full((1, SIDE, SIDE), image.width / image.height), pixels])


def centred(pixels):
    """Rows of pixels 0..255 less their mean, of unit length; shorter ones if there is one colour.
    """
    rows = pixels.flatten(1) - pixels.flatten(1).mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=4 * rows.shape[1] ** 0.5)


def size_of(dataset, i):
    """(pixels, bytes, width, height) of an image's file; bytes are 0 in memory."""
    if dataset.pixels is not None:
        height, width = dataset.pixels.shape[1:3]
        return width * height, 0, width, height
    path = os.path.join(dataset.root, dataset.name_of(i))
    with Image.open(path, formats=FORMATS) as image:
        return image.width * image.height, os.path.getsize(path), *image.size
