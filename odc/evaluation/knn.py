"""Weighted nearest-neighbour classification (Wu et al., CVPR 2018), exact, with the bank split over the processes."""

import torch

from odc.runtime import program
from odc.errors import UserError

from odc import distributed

QUERY_BLOCK, BANK_BLOCK = 512, 8192  # rows multiplied at a time
NONE = -(2**63)  # the key of nothing, below all others
_LAST = 2**32 - 1


def knn_predict(queries, bank, labels, num_classes, ks=(10, 20, 100, 200), temperature=0.07):
    """Classify every query by its k most similar bank rows, which vote with weight exp(similarity / temperature).

    queries: [Q, D] float, L2-normalised, the same on every process. bank: [n, D], L2-normalised, and labels: [n] int64
    in 0..num_classes-1: this process's rows; in rank order they make up the bank.
    Returns {k: [Q, min(5, num_classes)] int64}: the classes with the most votes, best first, -1 where no neighbour voted
    for another one. Of equally similar rows those with the lowest bank index count, of classes with equal votes the
    lowest wins.
    Raises UserError if a k is larger than the bank or a feature is not finite, Interrupted on a signal. A collective.
    """
    similarities, neighbour_labels = nearest_neighbours(queries, bank, labels, max(ks))
    predictions = {k: [] for k in ks}
    for s, y in zip(similarities.double().split(QUERY_BLOCK), neighbour_labels.split(QUERY_BLOCK)):
        weights = torch.exp((s - s[:, :1]) / temperature)  # relative to the best, so that no temperature overflows
        votes = weights.new_zeros(len(s), num_classes)
        done = 0
        for k in sorted(ks):
            votes.scatter_add_(1, y[:, done:k], weights[:, done:k])
            done = k
            keys = _keys(votes.float(), torch.arange(num_classes, device=votes.device))
            keys = keys.topk(min(5, num_classes)).values
            predictions[k].append(torch.where(_values(keys) > 0, _indices(keys), -1))
    return {k: torch.cat(blocks) if blocks else _indices(queries.new_zeros(0, min(5, num_classes), dtype=torch.int64))
            for k, blocks in predictions.items()}


def nearest_neighbours(queries, bank, labels, k):
    """The k bank rows with the largest inner product for every query: similarities [Q, k] and labels [Q, k].

    Arguments and errors as `knn_predict`. Best first, the lowest bank index first among equals, on every process.
    """
    shards = distributed.all_gather_uneven_rows(torch.tensor([len(bank)]))
    size, offset = int(shards.sum()), int(shards[: distributed.rank()].sum())
    if not 1 <= k <= size:
        raise UserError(f"--k {k}: the bank has {size} images; choose at most {size}.")
    finite = bool(torch.isfinite(queries.sum()))

    # A key holds a similarity and a bank index in one integer: the largest keys are the neighbours, no two are equal.
    best = torch.full((len(queries), k), NONE, device=queries.device)
    products = queries.new_empty(QUERY_BLOCK, BANK_BLOCK, dtype=torch.float32)
    for start in range(0, int(shards.max()), BANK_BLOCK):
        program.check_signals()
        rows = bank[start : start + BANK_BLOCK].float()
        finite = finite and bool(torch.isfinite(rows.sum()))
        for first in range(0, len(queries), QUERY_BLOCK):
            some = queries[first : first + QUERY_BLOCK].float()
            similarities = _multiply(some, rows, products)
            best[first : first + len(some)] = _merge(best[first : first + len(some)], similarities, offset + start)
    if distributed.any_process(not finite):
        raise UserError("The features hold values that are not finite: check the weights.")

    # Every process now has the best of its own rows: merge them, then fetch the labels from where the rows are.
    keys = distributed.all_gather_uneven_rows(best.T.contiguous()).T.topk(k).values
    indices = _indices(keys) - offset
    here = (indices >= 0) & (indices < len(bank))
    neighbour_labels = torch.zeros_like(indices)
    neighbour_labels[here] = labels.to(indices.device)[indices[here]]
    return _values(keys), distributed.all_reduce(neighbour_labels)


def _multiply(queries, rows, products):
    """[q, D] x [r, D] -> [q, r]. All products have one shape: rounding then does not depend on where a bank is cut."""
    q, r = len(queries), len(rows)
    if q < QUERY_BLOCK:
        queries = torch.cat([queries, queries.new_zeros(QUERY_BLOCK - q, queries.shape[1])])
    if r < BANK_BLOCK:
        rows = torch.cat([rows, rows.new_zeros(BANK_BLOCK - r, rows.shape[1])])
    return torch.mm(queries, rows.T, out=products)[:q, :r]


def _merge(best, similarities, first_index):
    """The k largest keys [q, k] of those in best [q, k] and of similarities [q, r] with rows first_index + 0..r-1."""
    k = best.shape[1]
    # Only what beats the k-th best can enter: after the first blocks hardly anything, found in one pass.
    floor = torch.where(best[:, -1] == NONE, -torch.inf, _values(best[:, -1]))
    if k <= similarities.shape[1] and bool((best[:, 0] == NONE).all()):
        kth = similarities.topk(k).values[:, -1]
        floor = torch.nextafter(kth, torch.full_like(kth, -torch.inf))
    query, column = (similarities > floor[:, None]).nonzero(as_tuple=True)
    if len(query) == 0:
        return best
    counts = torch.bincount(query, minlength=len(best))
    position = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    entering = best.new_full((len(best), int(counts.max())), NONE)
    entering[query, position] = _keys(similarities[query, column], first_index + column)
    return torch.cat([best, entering], 1).topk(k).values


def _keys(values, indices):
    """int64 that order as (value, then the lower index): float32 values, indices in 0..2^32-1."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    return ordered * 2**32 + (_LAST - indices)


def _values(keys):
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def _indices(keys):
    return _LAST - (keys & _LAST)
