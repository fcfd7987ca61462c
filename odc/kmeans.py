"""k-means over the features of all processes, and the parts of it that the memory shares.

`kmeans` makes the initial clusters, `two_means` halves one cluster, and `ClusterSums` keeps the sum
of the features in each cluster while images move between clusters.
"""

import math

import torch
import torch.nn.functional as F

from odc import distributed
from odc.errors import UserError
from odc.nearest import nearest_centroids
from odc.runtime import launch
from odc.runtime.log import progress_bar


class ClusterSums:
    """The sums [K, d] of this process's features in each cluster, exact to the last bit.

    The sums are 64-bit integers in units of 1 / `one`. Integer addition has no rounding error, so
    a step adds and subtracts only what changed, and yet nothing drifts. The result depends neither
    on the number of processes nor on the order in which threads or a GPU's atomics add.

    num_rows: N, of all processes; no entry of a feature may exceed 1 in size. With N = 1.28 million
    a unit is 2^-41, far below the rounding of float32.
    """

    def __init__(self, num_clusters, dim, num_rows, device="cpu"):
        self.one = 2.0 ** (62 - math.ceil(math.log2(num_rows + 1)))
        self.values = torch.zeros(num_clusters, dim, dtype=torch.int64, device=device)

    def add(self, features, labels, sign=1):
        """Add features [n, d] to the sums of their clusters [n], or subtract them with sign=-1."""
        block = 1024 if features.device.type == "cpu" else max(1, 2**26 // features.shape[1])
        for part, own in zip(features.split(block), labels.split(block)):
            whole = (part.double() * self.one).round_().long()
            self.values.index_add_(0, own, whole, alpha=sign)

    def means(self, sizes, clusters=slice(None)):
        """The mean features [k, d] of some clusters over all processes; 0 for an empty one.

        sizes: int64 [K], of all clusters. A collective.
        """
        total = self.values[clusters]
        if distributed.world_size() > 1:
            total = distributed.all_reduce(total.clone())
        units = sizes[clusters, None].clamp(min=1).double() * self.one
        return total.float().mul_((1 / units).float())


def kmeans(features, num_clusters, iterations=20, seed=0, initial_centroids=None):
    """Lloyd's k-means (recipe: 20 iterations over all images, no subsampling).

    features: [n, d] float, unit rows of this process; in rank order they make up all N.
    initial_centroids: [K, d]; by default K distinct rows, drawn from the seed.
    Returns labels int64 [n] of these rows, and the centroids float32 [K, d] to which they are
    nearest, on any number of processes the same. No cluster is empty: an empty one takes half of
    the largest, so equal rows may lie in several clusters. Stops once no label changes.
    Raises UserError if K > N or a feature is not finite, Interrupted on a signal. A collective.
    """
    K = num_clusters
    shards = distributed.all_gather_rows(torch.tensor([len(features)]))
    num_rows, first_row = int(shards.sum()), int(shards[: distributed.rank()].sum())
    if not 1 <= K <= num_rows:
        raise UserError(f"--num-clusters {K}: there are {num_rows} images to cluster; choose "
                        f"between 1 and {num_rows}.")
    if distributed.any_process(not features.sum(dtype=torch.float32).isfinite()):
        raise UserError("The features to cluster are not finite: start from other weights.")
    centroids = initial_centroids
    if centroids is None:
        centroids = _draw_rows(features, first_row, num_rows, K, seed)

    sums = ClusterSums(K, features.shape[1], num_rows, features.device)
    labels = None
    bar = progress_bar(iterations + 1, "k-means", "iteration")
    for iteration in range(iterations + 1):
        launch.check_signals()
        new_labels = nearest_centroids(features, centroids)
        changed = slice(None) if labels is None else (labels != new_labels).nonzero()[:, 0]
        if labels is not None:
            sums.add(features[changed], labels[changed], sign=-1)
        sums.add(features[changed], new_labels[changed])
        labels = new_labels
        num_changed = labels.new_tensor([len(labels[changed])])
        counts = torch.cat([labels.bincount(minlength=K), num_changed])
        *sizes, num_changed = distributed.all_reduce(counts).tolist()
        bar.set_postfix(changed=f"{num_changed / num_rows:.2%}", refresh=False)
        bar.update()
        # As in faiss, which the recipe uses, the last search is not followed by an update.
        if num_changed == 0 or iteration == iterations:
            break
        centroids = sums.means(labels.new_tensor(sizes))
        _restart_empty(centroids, sizes)
    bar.close()
    while 0 in sizes:
        _fill_first_empty(features, labels, centroids, sizes)
    return labels, centroids


def _draw_rows(features, first_row, num_rows, num_clusters, seed):
    """K distinct rows of all N, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_rows, generator=generator)[:num_clusters] - first_row
    here = (chosen >= 0) & (chosen < len(features))
    centroids = torch.zeros(num_clusters, features.shape[1], device=features.device)
    centroids[here.to(features.device)] = features[chosen[here].to(features.device)].float()
    return distributed.all_reduce(centroids)


def _restart_empty(centroids, sizes):
    """Move the centroid of each empty cluster beside that of the largest, in place."""
    for empty in [cluster for cluster, size in enumerate(sizes) if size == 0]:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
        step = torch.full_like(centroids[largest], 2.0**-10)
        step[1::2] *= -1
        centroids[empty] = centroids[largest] * (1 - step)
        centroids[largest] = centroids[largest] * (1 + step)


def _fill_first_empty(features, labels, centroids, sizes):
    """Give the first empty cluster half of the largest; all but features change in place."""
    empty, largest = sizes.index(0), max(range(len(sizes)), key=sizes.__getitem__)
    rows = (labels == largest).nonzero()[:, 0]
    shards = distributed.all_gather_rows(torch.tensor([len(rows)]))
    first = int(shards[: distributed.rank()].sum())
    members = distributed.all_gather_uneven_rows(features[rows]).float()
    second_half = two_means(members, seed=empty)
    labels[rows[second_half[first : first + len(rows)]]] = empty
    for cluster, half in ((largest, ~second_half), (empty, second_half)):
        centroids[cluster], sizes[cluster] = members[half].mean(0), int(half.sum())


def two_means(x, at_least=1, iterations=20, seed=0):
    """Split points in two by k-means with k = 2: bool [n], True for the second half.

    x: [n, d]. The start is the two sides of the principal axis, so that no luck is involved. Each
    half keeps at_least points, or n // 2 if there are fewer: the points farthest on its side.
    Points that k-means cannot tell apart are split at random into equal halves (the recipe).
    Nothing here waits for a GPU. A collective: all processes have the same points.
    """
    n = len(x)
    x = x - x.mean(dim=0)
    axis = x.index_select(0, (x * x).sum(dim=1).argmax()[None])[0]
    for _ in range(4):  # power iteration
        axis = F.normalize((x @ axis) @ x, dim=0)
    score = x @ axis
    second = score > 0
    for _ in range(iterations):
        size = second.sum()
        total = second.to(x.dtype) @ x  # x sums to zero: the first half's sum is minus this
        center1, center2 = -total / (n - size).clamp(min=1), total / size.clamp(min=1)
        score = x @ (center2 - center1) - (center2 @ center2 - center1 @ center1) / 2
        before, second = second, torch.where((size == 0) | (size == n), second, score > 0)
        # Once nothing moves, further iterations change nothing. Only a CPU gains by the question.
        if x.device.type == "cpu" and torch.equal(second, before):
            break
    size = second.sum()
    order = score.argsort(stable=True)
    at_least = min(at_least, n // 2)
    second[order[:at_least]], second[order[n - at_least :]] = False, True
    random_half = torch.ones(n, dtype=torch.bool)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    random_half[shuffled[n // 2 :]] = False
    random_half = random_half.to(x.device, non_blocking=True)
    second = torch.where((size == 0) | (size == n), random_half, second)
    # Process 0 decides for all, as the processes' hardware may round differently.
    return distributed.broadcast(second.byte()).bool()
