"""k-means of features that are split over the processes: Lloyd's iterations, exact, with two all-reduces each."""

import math

import torch
from tqdm import tqdm

from odc.runtime import program
from odc.errors import UserError

from odc import distributed
from odc.nearest import assign

BLOCK = 1024  # rows that are added to sums at a time: they stay in the caches


def kmeans(features, num_clusters, iterations=20, seed=0, progress=True, initial_centroids=None):
    """Lloyd's k-means over the rows of all processes (recipe: 20 iterations over all points, no subsampling).

    features: [n, d] float, this process's rows; in rank order they make up all N (see `distributed.shard`).
    initial_centroids: [K, d]; without them K distinct rows drawn from the seed, the same for any W.
    Returns labels [n] int64 of these rows and centroids [K, d] float32, the means over the labels. No cluster is empty:
    within the iterations an empty one restarts beside the largest, at the end it takes half of the largest. Stops early
    once no label changes. The result does not depend on W.
    Raises UserError if K > N or a feature is not finite, Interrupted on a signal. A collective.
    """
    K, d = num_clusters, features.shape[1]
    largest = features.abs().max().double() if len(features) else torch.zeros((), dtype=torch.float64)
    shards = distributed.all_gather_uneven_rows(torch.tensor([[len(features), float(largest)]], dtype=torch.float64))
    num_rows, largest = int(shards[:, 0].sum()), float(shards[:, 1].max())
    if not 1 <= K <= num_rows:
        raise UserError(f"--num-clusters {K}: there are {num_rows} images to cluster; choose between 1 and "
                                    f"{num_rows}.")
    if not math.isfinite(float(shards[:, 1].sum())):
        raise UserError("The features to cluster are not finite: start from other weights.")
    if initial_centroids is None:
        first = int(shards[: distributed.rank(), 0].sum())
        centroids = _draw_rows(features, first, num_rows, K, seed)
    else:
        centroids = initial_centroids.float().clone()

    # Sums hold multiples of 1/one that stay below 2^53 / one, so float64 adds them exactly: only rows that change their
    # cluster are added and subtracted, and the order in which processes, threads or atomics add does not matter.
    one = 2.0 ** (52 - math.ceil(math.log2(max(num_rows * largest, 1e-30))))
    sums = features.new_zeros(K + 1, d, dtype=torch.float64)
    labels = torch.full((len(features),), K, device=features.device)  # no cluster yet: the last row of sums, not used

    bar = tqdm(range(iterations), desc="k-means", disable=None if progress and distributed.is_main() else True)
    for _ in bar:
        program.check_signals()
        new_labels = assign(features, centroids)
        changed = _relabel(features, labels, new_labels, sums, one)
        counts = torch.cat([torch.bincount(labels, minlength=K), labels.new_tensor([changed])])
        *sizes, changed = distributed.all_reduce(counts).tolist()
        centroids = _means(sums, sizes, one)
        bar.set_postfix(changed=f"{changed / num_rows:.2%}", refresh=False)
        if changed == 0:
            break
        for empty, donor in _donors(list(sizes)):
            centroids[[donor, empty]] = _apart(centroids[donor])
    bar.close()

    if 0 in sizes:
        _fill_empty(features, labels, sums, sizes, one)
    return labels, _means(sums, sizes, one)


def _draw_rows(features, first, num_rows, num_clusters, seed):
    """K distinct rows of all N, drawn on every process alike; `first` is the index of this process's first row."""
    chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:num_clusters] - first
    here = (chosen >= 0) & (chosen < len(features))
    centroids = torch.zeros(num_clusters, features.shape[1], device=features.device)
    centroids[here.to(features.device)] = features[chosen[here].to(features.device)].float()
    return distributed.all_reduce(centroids)


def _relabel(features, labels, new_labels, sums, one):
    """Give rows their new labels, in place, and keep the sums [K + 1, d] up to date. Returns how many changed."""
    changed = (labels != new_labels).nonzero()[:, 0]
    for rows in changed.split(BLOCK if features.device.type == "cpu" else 2**20):
        moving = (features[rows].double() * one).round_()
        sums.index_add_(0, new_labels[rows], moving)
        sums.index_add_(0, labels[rows], moving, alpha=-1)
    labels.copy_(new_labels)
    return len(changed)


def _means(sums, sizes, one):
    """Centroids [K, d] from this process's sums [K + 1, d] and the sizes over all processes, K ints."""
    total = distributed.all_reduce(sums[:-1].clone())
    sizes = torch.tensor(sizes, dtype=torch.float64, device=sums.device).clamp(min=1)
    return (total / (sizes * one)[:, None]).float()


def _donors(sizes):
    """For every empty cluster in ascending order the then largest one, and half of its size moves: (empty, donor)."""
    for empty in [cluster for cluster, size in enumerate(sizes) if size == 0]:
        donor = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[empty] = sizes[donor] // 2
        sizes[donor] -= sizes[empty]
        yield empty, donor


def _apart(centroid):
    """Two centroids [2, d] beside one [d], along alternating signs."""
    step = torch.full_like(centroid, 2.0**-10)
    step[1::2] *= -1
    return torch.stack([centroid * (1 + step), centroid * (1 - step)])


def _fill_empty(features, labels, sums, sizes, one):
    """Give every empty cluster half of the then largest: labels and sums of this process and sizes change in place."""
    for empty, donor in _donors(sizes):
        mine = (labels == donor).nonzero()[:, 0]
        total = distributed.all_reduce(sums[donor].clone())
        centroid = (total / (one * (sizes[donor] + sizes[empty]))).float()
        moves = assign(features[mine], _apart(centroid)) == 1
        counts = distributed.all_gather_uneven_rows(torch.tensor([[len(mine), int(moves.sum())]]))
        num_rows, num_moving = counts.sum(0).tolist()
        if num_moving in (0, num_rows):  # rows that are alike: the later half
            position = torch.arange(len(mine), device=mine.device) + int(counts[: distributed.rank(), 0].sum())
            moves = position >= (num_rows + 1) // 2
            num_moving = num_rows // 2
        new_labels = labels.clone()
        new_labels[mine[moves]] = empty
        _relabel(features, labels, new_labels, sums, one)
        sizes[empty], sizes[donor] = num_moving, num_rows - num_moving
