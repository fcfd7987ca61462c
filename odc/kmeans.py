"""k-means over the features of all processes, and the parts of it that the memory shares."""

import math

import torch
import torch.nn.functional as F

from odc import distributed
from odc.errors import UserError
from odc.runtime import launch
from odc.runtime.log import progress_bar

BLOCK_BYTES = 24 * 2**20  # of scores at a time
GROUP = 64  # scores: 4 vectors of 16 (AVX-512), the fewest at which torch vectorises a maximum


def nearest_centroids(features, centroids, inner_product=False):
    """The best centroid of every row: [n, d] float, [K, d] float32 -> int64 [n].

    Best means nearest, or with inner_product the largest <f, c> (recipe); of equal ones the lowest
    index. Float32 rounding may depend on the other rows of a block. Not for use under autocast.
    """
    n, K, device = len(features), len(centroids), features.device
    bias = torch.zeros(K, device=device)
    if not inner_product:  # |f - c|^2 = |f|^2 - 2 (<f, c> - |c|^2 / 2)
        bias -= centroids.square().sum(1) / 2
    labels = torch.empty(n, dtype=torch.int64, device=device)
    block = max(1, BLOCK_BYTES // (4 * K))
    scores = torch.empty(min(n, block), -(-K // GROUP) * GROUP, device=device)
    scores[:, K:] = -torch.inf
    for rows, own in zip(features.split(block), labels.split(block)):
        torch.addmm(bias, rows.float(), centroids.T, out=scores[: len(rows), :K])
        # argmax over all columns would take as long as the product. So first the best group.
        groups = scores[: len(rows)].unflatten(1, (-1, GROUP))  # [rows, K / GROUP, GROUP]
        best = groups.amax(2).argmax(1)
        own.copy_(GROUP * best + groups[torch.arange(len(rows)), best].argmax(1))
    return labels


class ClusterSums:
    """The sums [K, d] of this process's features in each cluster, exact to the last bit.

    They are 64-bit integers in units of 1 / `one`: nothing drifts, and neither W nor the order of a
    GPU's atomics makes a difference. num_rows: N, of all processes. Features are in -1..1.
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
        """The means [k, d] of some of the clusters of sizes [K], 0 if empty. A collective."""
        total = distributed.all_reduce(self.values[clusters].clone())
        return total / (sizes[clusters, None].clamp(min=1) * self.one)  # float32


def kmeans(features, num_clusters, iterations=20, seed=0, initial_centroids=None, min_size=1):
    """Lloyd's k-means (recipe: 20 iterations over all images, no subsampling). A collective.

    features: [n, d] float, unit rows of this process. initial_centroids: [K, d]; default: drawn.
    Returns labels int64 [n], those of `nearest_centroids`, and the centroids float32 [K, d].
    Clusters of fewer than min_size rows restart beside wide ones; some may be small at the end.
    Raises UserError if K > N or a feature is not finite, Interrupted on a signal.
    """
    K = num_clusters
    shards = distributed.all_gather_rows(torch.tensor([len(features)]))
    num_rows, first_row = int(shards.sum()), int(shards[: distributed.rank()].sum())
    if not 1 <= K <= num_rows:
        raise UserError(f"--num-clusters {K}: choose between 1 and {num_rows}, the images.")
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
        bar.update()
        # As in faiss, which the recipe uses, the last search is not followed by an update.
        if num_changed == 0 or iteration == iterations:
            break
        centroids = sums.means(labels.new_tensor(sizes))
        if min(sizes) < min_size:
            _restart_small(features, labels, centroids, torch.tensor(sizes), min_size)
    bar.close()
    return labels, centroids


def _draw_rows(features, first_row, num_rows, num_clusters, seed):
    """K distinct rows of all N, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_rows, generator=generator)[:num_clusters] - first_row
    here = (chosen >= 0) & (chosen < len(features))
    centroids = torch.zeros(num_clusters, features.shape[1], device=features.device)
    centroids[here.to(features.device)] = features[chosen[here].to(features.device)].float()
    return distributed.all_reduce(centroids)


def _restart_small(features, labels, centroids, sizes, min_size):
    """Move each small cluster's centroid, in place, beside that of most squared distance."""
    spread = torch.zeros(len(centroids), dtype=torch.float64, device=labels.device)
    for rows, own in zip(features.split(65536), labels.split(65536)):
        spread.index_add_(0, own, (rows - centroids[own]).square().sum(1).double())
    spread = distributed.all_reduce(spread).cpu()
    generator = torch.Generator().manual_seed(0)
    for small in (sizes < min_size).nonzero()[:, 0].tolist():
        can_split = (sizes >= 2 * min_size) & (spread > 1e-8 * sizes)  # not equal rows
        if not can_split.any():
            break
        widest = int((spread * can_split).argmax())
        spread[widest] = spread[small] = spread[widest] / 2
        sizes[widest] = sizes[small] = sizes[widest] // 2
        step = 2.0**-7 * torch.randn(centroids.shape[1], generator=generator)
        centroids[small] = centroids[widest] * (1 + step.to(centroids.device))


def two_means(x, at_least=1, iterations=20, seed=0):
    """Split points in two by k-means with k = 2: bool [n], True for the second half. A collective.

    x: [n, d], the same on every process. The start is the two sides of the principal axis. Each
    half keeps at_least points, at most n // 2. Points that k-means cannot tell apart are split at
    random into equal halves (recipe). Nothing here waits for a GPU.
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
        second = torch.where((size == 0) | (size == n), second, score > 0)
    size = second.sum()
    order = score.argsort(stable=True)
    at_least = min(at_least, n // 2)
    second[order[:at_least]], second[order[n - at_least :]] = False, True
    random_half = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) < n // 2
    random_half = random_half.to(x.device, non_blocking=True)
    second = torch.where((size == 0) | (size == n), random_half, second)
    return distributed.broadcast(second.byte()).bool()  # others may round differently
