"""Weighted nearest-neighbour classification (Wu et al., CVPR 2018): exact, the bank split over W.

The neighbours are those of a search in double precision. It goes through tiles of bank rows and
queries, in three steps:

1. `odc.products` gives coarse scores of the tile, with a bound on their error.
2. Pairs that cannot be among a query's k best are dropped: their score lies further below than the
   bound. The k-th best similarity is at least the k-th of any k similarities. These are taken from
   the neighbours found so far and the largest scores, one of each GROUP.
3. The similarities of the other pairs are computed in double precision and rounded to float32.

Similarities that are equal as float32 numbers are ties, and the lower bank index comes first. So
the result depends on the queries and the bank alone, not on tiles, processes, threads or devices.

Letters: Q queries, n bank rows on this process.
"""

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import open_dataset
from odc.data.loader import readable
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import extract
from odc.products import CoarseScores, full_precision
from odc.runtime import launch

HELD_OUT_EVERY = 10  # without a val split, each 10th training image is held out of the bank
# Bank rows and queries of a tile: about 0.6 GB on a CPU, 3 GB on a GPU.
TILES = {"cpu": (131072, 256), "cuda": (131072, 2048)}
GROUP = 16  # scores of which the largest stands for all
PAIR_BLOCK = {"cpu": 2**17, "cuda": 2**26}  # numbers multiplied in double precision at a time


def pooled(maps):
    """The features that are compared: the last map's average, of unit length, [B, d] float32."""
    return F.normalize(maps[-1].float().mean((2, 3)))


def open_held_out(data, train):
    """The val split of the data whose train split is given, or None: then training images must do.

    Raises UserError if processes see different files. A collective.
    """
    try:
        val = open_dataset(data, "val")
    except UserError as error:
        val, reason = None, str(error)
    if not distributed.same_everywhere(val and (len(val), val.fingerprint)):
        raise UserError(f"{data}: the processes see different val splits there; give all machines "
                        "the same files.")
    if val is not None and (val.labels is None or val.classes != train.classes):
        val, reason = None, f"the val split of {data} does not have the same labels."
    if val is None:
        print_main(f"Nearest-neighbour accuracy: every {HELD_OUT_EVERY}th training image is held "
                   f"out ({reason.rstrip('.')}).")
    return val


def knn_accuracy(backbone, train, val, image_size, device, batch_size=64, workers=0):
    """Share of the held-out images whose class their 20 nearest training images tell, in 0..1.

    train: an ImageSet with labels. val: one with the same classes, or None: then every 10th image
    of `train` is held out, and is not in the bank. Unreadable images do not count. The backbone
    must be in eval mode. A collective.
    """

    def features(dataset, name):
        return extract(lambda images: pooled(backbone(images)), dataset,
                       evaluation_transform(image_size), backbone.out_channels[-1], device,
                       batch_size, workers, name=name)

    bank, rows = features(train, "bank"), torch.arange(len(train))[distributed.shard(len(train))]
    in_bank = readable(train)[rows]
    if val is None:
        held_out = rows % HELD_OUT_EVERY == 0
        in_bank &= ~held_out
        queries, images, asked = bank[held_out.to(device)], train, slice(None, None, HELD_OUT_EVERY)
    else:
        queries, images, asked = features(val, "held-out images"), val, slice(None)
    if not in_bank.all():  # else a copy would take as much memory again
        bank, rows = bank[in_bank.to(device)], rows[in_bank]
    queries = distributed.all_gather_uneven_rows(queries)
    k = min(20, int(distributed.all_reduce(torch.tensor(len(bank)))))
    predictions = knn_predict(queries, bank, train.labels[rows], len(train.classes), [k])[k]
    hits = predictions[:, 0].cpu() == images.labels[asked]
    return float(hits[readable(images)[asked]].double().mean())


def knn_predict(queries, bank, labels, num_classes, ks=(10, 20, 100, 200), temperature=0.07):
    """Classify every query by its k most similar bank rows, weighted exp(similarity / temperature).

    queries: [Q, d] float, unit rows, the same on every process. bank: [n, d], unit rows, and
    labels: [n] int64 in 0..num_classes-1: this process's part; in rank order they are the bank.
    Returns {k: [Q, min(5, num_classes)] int64}, the classes with the most votes, best first, the
    lower class first of equal ones, and -1 for classes without a vote. Raises UserError if a k is
    larger than the bank or a feature is not finite, Interrupted on a signal. A collective.
    """
    similarities, found = nearest_neighbours(queries, bank, labels, max(ks))
    predictions = {k: queries.new_full((len(queries), min(5, num_classes)), -1, dtype=torch.int64)
                   for k in ks}
    for start in range(0, len(queries), 512):
        rows = slice(start, start + 512)
        s, y = similarities[rows].double(), found[rows]
        weights = torch.exp((s - s[:, :1]) / temperature)  # relative to the best: no overflow
        votes = weights.new_zeros(len(s), num_classes)
        done = 0
        for k in sorted(ks):
            votes.scatter_add_(1, y[:, done:k], weights[:, done:k])
            done = k
            classes = votes.float().sort(dim=1, descending=True, stable=True).indices
            predictions[k][rows] = classes.where(votes.gather(1, classes) > 0, -1)[:, :5]
    return predictions


def nearest_neighbours(queries, bank, labels, k):
    """The k most similar bank rows of every query: similarities and labels, both [Q, k].

    Best first. Arguments and errors as `knn_predict`; the result is the same on every process.
    """
    sizes = distributed.all_gather_rows(torch.tensor([len(bank)]))
    offset = int(sizes[: distributed.rank()].sum())
    if not 1 <= k <= int(sizes.sum()):
        raise UserError(f"--k {k}: the bank has {int(sizes.sum())} images; choose less.")
    num_rows, num_queries = TILES[queries.device.type]
    finite = bool(queries.sum().isfinite())
    similarities = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, int(sizes.max()), num_rows):
        rows = bank[start : start + num_rows].float()
        finite = finite and bool(rows.sum().isfinite())
        coarse = CoarseScores(rows, GROUP) if finite and len(rows) else None
        for first in range(0, len(queries), num_queries):
            launch.check_signals()
            if coarse:
                tile = slice(first, first + num_queries)
                best = similarities[tile], indices[tile]
                _search(queries[tile].float(), rows, coarse, start, best)
    if distributed.any_process(not finite):
        raise UserError("The features hold values that are not finite: check the weights.")

    # Merge the neighbours of all processes, and fetch the labels from where the rows are.
    similarities, indices = (distributed.all_gather_rows(best.T.contiguous()).T
                             for best in (similarities, indices + offset))
    similarities, indices = _first(similarities, indices, k)
    here = (indices >= offset) & (indices < offset + len(bank))
    found = torch.zeros_like(indices)
    found[here] = labels.to(indices.device)[indices[here] - offset]
    return similarities, distributed.all_reduce(found)


def _first(similarities, indices, k):
    """The first k by similarity, [q, m] -> [q, k]; equal ones keep their order."""
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], indices.gather(1, order[:, :k])


@full_precision()
def _search(queries, rows, coarse, start, best):
    """Update the neighbours of some queries by bank rows `start` and following.

    best: (similarities, indices), [q, k], changed in place.
    """
    scores, error = coarse(queries)
    offset = queries.double() @ coarse.mean.double()  # similarities less offset are near the scores

    def bound(score):  # with twice the rounding to half precision: the threshold is rounded, too
        ties = 2.0**-22 * (score + offset).abs()  # are decided by the index
        return 1.02 * error + 2.04 * coarse.unit * score.abs() + ties

    k = best[0].shape[1]
    largest = scores.view(GROUP, -1, len(queries)).amax(0).T.double()
    largest = largest.topk(min(k, largest.shape[1]), sorted=False).values.T
    least = torch.cat([largest - bound(largest), best[0].T - offset])
    least = least.topk(k, dim=0, sorted=False).values.amin(0)  # the k-th best is no less
    close = scores > (least - bound(least)).to(scores.dtype)
    if int(close.sum()) > close.numel() // 16:  # a product in double precision is faster
        for piece, part in enumerate(rows.split(4096)):
            similarities = (queries.double() @ part.double().T).float()
            indices = torch.arange(len(part), device=rows.device) + start + 4096 * piece
            _update(best, similarities, indices.expand_as(similarities))
        return

    row, query = close.nonzero(as_tuple=True)  # bank rows ascending
    found = torch.empty(len(row), device=rows.device)
    size = PAIR_BLOCK[rows.device.type] // rows.shape[1]
    for r, q, out in zip(row.split(size), query.split(size), found.split(size)):
        products = rows.index_select(0, r).double().mul_(queries.index_select(0, q).double())
        out.copy_(products.sum(1))
    query, order = query.sort(stable=True)
    row, found = row[order], found[order]
    counts = query.bincount(minlength=len(queries))
    position = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[query]
    similarities = found.new_full((len(queries), int(counts.max())), -torch.inf)
    indices = row.new_zeros(similarities.shape)
    similarities[query, position], indices[query, position] = found, row + start
    _update(best, similarities, indices)


def _update(best, similarities, indices):
    """Let [q, m] similarities, by ascending indices, compete with the best [q, k], in place."""
    both = [torch.cat(pair, dim=1) for pair in zip(best, (similarities, indices))]
    for old, new in zip(best, _first(*both, best[0].shape[1])):
        old.copy_(new)
