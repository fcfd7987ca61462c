"""Weighted nearest-neighbour classification (Wu et al., CVPR 2018), the bank split over processes.

Letters: Q queries, n bank rows on this process.
"""

import contextlib

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import open_dataset
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import extract
from odc.runtime import launch

TEMPERATURE = 0.07  # a neighbour of similarity s votes with weight exp(s / TEMPERATURE)
QUERIES, ROWS = 256, 65536  # of a tile: 64 MB of similarities
GROUP = 64  # neighbouring bank rows, of which the most similar stands for all


def pooled(maps):
    """The features that are compared: the last map's average, of unit length, [B, d] float32."""
    return F.normalize(maps[-1].float().mean((2, 3)))


def open_held_out(data, train):
    """The bank and the queries, two ImageSets with the same classes; a collective.

    train: the train split of the data, with labels. The queries are the val split, or every 10th
    training image if there is none. Raises UserError if processes see different files.
    """
    try:
        val, reason = open_dataset(data, "val"), "its val split does not have the same labels"
    except UserError as error:
        val, reason = None, str(error).rstrip(".")
    if not distributed.same_everywhere(val and val.fingerprint):
        raise UserError(f"{data}: the processes see different val splits there; give all machines "
                        "the same files.")
    if val is not None and val.labels is not None and val.classes == train.classes:
        return train, val
    print_main(f"Nearest-neighbour accuracy: every 10th training image is held out ({reason}).")
    return (train.take([i for i in range(len(train)) if i % 10]),
            train.take(list(range(0, len(train), 10))))


def knn_accuracy(backbone, bank, queries, image_size, device, workers=0,
                 autocast=contextlib.nullcontext()):
    """Share of the queries whose class their 20 nearest images in the bank tell, in 0..1.

    bank, queries: of `open_held_out`. backbone: in eval mode; it runs under autocast, the search
    must not. A collective.
    """
    def forward(images):
        with autocast:
            return pooled(backbone(images))

    features, questions = (
        extract(forward, images, evaluation_transform(image_size), backbone.out_channels[-1],
                device, workers=workers, name=name, unreadable_share=share)
        for images, name, share in ((bank, "bank", 0), (queries, "held-out images", 0.01)))
    labels, k = bank.labels[distributed.shard(len(bank))], min(20, len(bank))
    predictions = knn_predict(distributed.all_gather_uneven_rows(questions), features, labels,
                              len(bank.classes), [k])[k]
    return float((predictions[:, 0].cpu() == queries.labels).double().mean())


def knn_predict(queries, bank, labels, num_classes, ks=(10, 20, 100, 200)):
    """Classify every query by its k most similar bank rows, weighted exp(similarity / TEMPERATURE).

    queries: [Q, d] float32, unit rows, the same on every process. bank: [n, d], unit rows, and
    labels: [n] int64 in 0..num_classes-1: this process's part; in rank order they are the bank.
    Returns {k: [Q, min(5, num_classes)] int64}, the classes with the most votes, best first, the
    lower class first of equal ones, and -1 for classes without a vote. Raises UserError if a k is
    larger than the bank or a feature is not finite, Interrupted on a signal. A collective.
    """
    similarities, found = nearest_neighbours(queries, bank, labels, max(ks))
    predictions = {k: [] for k in ks}
    for s, y in zip(similarities.split(QUERIES), found.split(QUERIES)):
        for k in ks:
            weights = torch.exp(s[:, :k].double() / TEMPERATURE)
            votes = weights.new_zeros(len(s), num_classes).scatter_add_(1, y[:, :k], weights)
            classes = votes.float().sort(dim=1, descending=True, stable=True).indices[:, :5]
            predictions[k].append(classes.where(votes.gather(1, classes) > 0, -1))
    return {k: torch.cat(blocks) for k, blocks in predictions.items()}


def nearest_neighbours(queries, bank, labels, k):
    """The k most similar bank rows of every query: similarities float32 and labels, both [Q, k].

    Best first, the lowest bank index first of equal ones; the scores are float32, see
    `nearest_centroids`. Arguments and errors as `knn_predict`; the same on every process.
    """
    sizes = distributed.all_gather_rows(torch.tensor([len(bank)]))
    offset, labels = int(sizes[: distributed.rank()].sum()), labels.to(bank.device)
    if not 1 <= k <= int(sizes.sum()):
        raise UserError(f"--k {k}: the bank has {int(sizes.sum())} images; choose less.")
    if distributed.any_process(not (queries.sum() + bank.sum()).isfinite()):
        raise UserError("The features hold values that are not finite: check the weights.")
    blocks = []
    for some in queries.split(QUERIES):
        launch.check_signals()
        best = some.new_full((len(some), k), -torch.inf, dtype=torch.float64)
        found = torch.zeros_like(best, dtype=torch.int64)
        for start in range(0, len(bank), ROWS):
            keys, index = _search(some, bank[start : start + ROWS], offset + start, k)
            best, found = _first(k, (best, keys), (found, labels[index - offset]))
        best, found = (distributed.all_gather_rows(x.T.contiguous()).T for x in (best, found))
        blocks.append(_first(k, (best,), (found,)))
    best, found = map(torch.cat, zip(*blocks))
    return best.float(), found


def _search(queries, rows, offset, k):
    """Keys and bank indices of the k best of some rows, the first of which has index `offset`.

    topk promises no order of equal numbers. So a key is a similarity less 2^-52 times the index:
    that orders equal float32 similarities of unit rows, and no others. topk is slow, too: it is
    asked only for the k groups of rows with the largest maxima. The k best lie there.
    """
    scores = queries.new_full((len(queries), -(-len(rows) // GROUP) * GROUP), -torch.inf)
    torch.mm(queries, rows.T, out=scores[:, : len(rows)])
    groups = scores.unflatten(1, (-1, GROUP))
    places = torch.arange(scores.shape[1], device=rows.device).view(-1, GROUP) + offset
    maxima = groups.amax(2).double() - places[:, 0] * 2.0**-52
    chosen = maxima.topk(min(k, maxima.shape[1]), sorted=False).indices
    index = places[chosen].flatten(1)  # [q, k * GROUP]
    keys = scores.gather(1, index - offset).double() - index * 2.0**-52
    return _first(min(k, len(rows)), (keys,), (index,))


def _first(k, keys, values):
    """The k largest of several keys [q, m], and their values: both [q, k]."""
    keys, order = torch.cat(keys, dim=1).topk(k)
    return keys, torch.cat(values, dim=1).gather(1, order)
