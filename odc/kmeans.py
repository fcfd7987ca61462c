"""Spherical data, Euclidean k-means: Lloyd's iterations over features that are split over the processes."""

import torch
from tqdm import tqdm

from odc import distributed


def assign(features, centroids, inner_product=False):
    """The cluster of every row: [n, d], [K, d] -> int64 [n].

    The nearest centroid in Euclidean distance, or with inner_product the largest <feature, centroid> (odc.md 1.3).
    The lowest index wins ties. A row with a NaN gets some label in range.
    """
    offset = None if inner_product else centroids.square().sum(1) / 2
    labels = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for start in range(0, len(features), 1024):
        scores = features[start : start + 1024] @ centroids.T
        if offset is not None:
            scores -= offset
        labels[start : start + 1024] = scores.argmax(1)
    return labels


def kmeans(features, num_clusters, iterations=20, seed=0, progress=True, initial_centroids=None):
    """Lloyd's k-means on the rows of all processes: [n_local, d] here -> (int64 [n_local], float32 [K, d]).

    features: this process's rows, a contiguous shard (see `distributed.shard`) of all N. The initial centroids are K
    distinct rows drawn from the seed, or initial_centroids [K, d]. No cluster is empty at the end: an empty one takes
    half of a large one. Raises UserError if K > N.
    """
    d = features.shape[1]
    count = distributed.all_reduce(torch.tensor([len(features)]))
    num_rows = int(count)
    if num_clusters > num_rows:
        raise distributed.UserError(
            f"--num-clusters {num_clusters}: there are only {num_rows} images to cluster; choose at most {num_rows}."
        )
    if initial_centroids is None:
        chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:num_clusters]
        rows = distributed.shard(num_rows)
        here = (chosen >= rows.start) & (chosen < rows.stop)
        centroids = features.new_zeros(num_clusters, d)
        centroids[here.to(features.device)] = features[(chosen[here] - rows.start).to(features.device)]
        distributed.all_reduce(centroids)
    else:
        centroids = initial_centroids.clone()
    labels = None
    for _ in tqdm(range(iterations), desc="k-means", disable=None if progress and distributed.is_main() else True):
        distributed.check_signals()
        labels = assign(features, centroids)
        centroids = _means(features, labels, centroids)
    return labels, centroids


def _means(features, labels, centroids):
    K, d = centroids.shape
    sums = torch.zeros(K, d, dtype=torch.float64, device=features.device).index_add_(0, labels, features.double())
    sizes = torch.bincount(labels, minlength=K)
    distributed.all_reduce(sums)
    distributed.all_reduce(sizes)
    means = (sums / sizes[:, None].clamp(min=1)).float()
    return torch.where(sizes[:, None] > 0, means, centroids)
