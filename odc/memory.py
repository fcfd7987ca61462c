"""The two memories of Online Deep Clustering: samples (a feature and a label an image) and centroids.

Notation of the paper: F_i feature of image i, y_i its pseudo-label, C_c centroid of cluster c, N_c its size, m momentum.

The features are split over the processes in contiguous shards; labels, centroids and sizes are the same everywhere.
For every cluster the sum of its features is kept in 64-bit fixed point. Integer sums are exact: a step adds and
subtracts only what its batch changed, and yet the centroids never drift and depend neither on the number of
processes nor on the order in which threads, processes or a GPU's atomics add.
"""

import math

import torch
import torch.nn.functional as F

from odc.errors import UserError
from odc import distributed
from odc.nearest import NearestCentroid, assign


class ODCMemory:
    """Samples memory and centroids memory (paper, "Online Deep Clustering"; recipe odc_resnet50_8xb64-steplr-440e_in1k).

    num_samples: N. dim: d. num_clusters: K. momentum: m of Eq. 1. min_cluster_size: clusters with fewer images are
    small. dtype: how features are stored; half precision halves the memory of N x d.

    labels [N] int64, centroids [K, d] float32 and cluster_sizes [K] int64 are the same on every process; features
    [n, d] are the rows `rows` (a slice of 0..N) that this process holds. All are to be read, not written, from outside.
    Every method but loss_weights is a collective.
    """

    def __init__(self, num_samples, dim, num_clusters, momentum=0.5, min_cluster_size=20, device="cpu",
                 dtype=torch.float32):
        self.momentum, self.min_cluster_size = momentum, min_cluster_size
        self.rows = distributed.shard(num_samples)
        self.features = torch.zeros(self.rows.stop - self.rows.start, dim, dtype=dtype, device=device)
        self.labels = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self.centroids = torch.zeros(num_clusters, dim, device=device)
        self.cluster_sizes = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        self._sums = torch.zeros(num_clusters, dim, dtype=torch.int64, device=device)  # over this process's rows
        self._nearest = None  # search structure over the centroids, made when it is needed and they have changed
        # One in fixed point. N unit features cannot overflow 63 bits; at N = 1.28 million a step is 2^-41.
        self._one = 2.0 ** (62 - math.ceil(math.log2(num_samples + 1)))

    def initialize(self, features, labels):
        """Start from clustered images (paper, before the first iteration).

        features: [n, d] this process's `rows`, or [N, d] all of them; normalised here. labels: [N], in 0..K-1.
        Raises UserError if a feature is not finite, ValueError for wrong shapes or labels.
        """
        num_samples, num_clusters = len(self.labels), len(self.centroids)
        if len(features) == num_samples:
            features = features[self.rows]
        if features.shape != self.features.shape or len(labels) != num_samples:
            raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit a memory of "
                             f"{num_samples} images, {len(self.features)} of them here, of width {self.features.shape[1]}")
        if labels.min() < 0 or labels.max() >= num_clusters:
            raise ValueError(f"labels must lie in 0..{num_clusters - 1}")
        if distributed.any_process(not torch.isfinite(features).all()):
            raise UserError("The network's features are not finite: start from other weights.")
        self.features.copy_(F.normalize(features.float()))
        self.labels.copy_(labels)
        self._count()
        self.update_centroids()

    # --- samples memory ----------------------------------------------------------------------------------------------

    def update_samples(self, indices, features):
        """Move the features of a batch and relabel it (paper, Eq. 1 and 2). Returns the change ratio.

        indices: [B] int64; features: [B, d] network outputs z of this process's part of the batch; B may differ
        between processes. An image that occurs more than once in the global batch takes its last occurrence, in rank
        order. The change ratio is the share of the batch's images whose label changed. Raises UserError if a feature
        is not finite; the memory is then as it was.
        """
        indices = distributed.all_gather_uneven_rows(indices.to(self.labels.device))
        z = distributed.all_gather_uneven_rows(F.normalize(features.detach().to(self.labels.device).float()))
        if not torch.isfinite(z).all():
            raise UserError("The network's features are not finite: lower --lr or switch --amp off.")
        indices, last = _last_occurrences(indices)
        z = z[last]

        # Each process moves and relabels the rows that it holds ...
        here = (indices >= self.rows.start) & (indices < self.rows.stop)
        rows = indices[here] - self.rows.start
        old = self.features[rows].float()
        new = F.normalize(self.momentum * z[here] + (1 - self.momentum) * old).to(self.features.dtype)  # Eq. 1
        self.features[rows] = new
        if self._nearest is None:
            self._nearest = NearestCentroid(self.centroids, inner_product=True)
        new_labels = self._nearest(new.float())  # Eq. 2: argmax_c <F_i, C_c>, the recipe's inner product

        # ... and all learn all new labels: indices ascend and shards are contiguous, so rank order is index order.
        self._add(self.labels[indices[here]], old, sign=-1)
        self._add(new_labels, new, sign=1)
        return self._relabel(indices, distributed.all_gather_uneven_rows(new_labels))

    def _relabel(self, indices, labels):
        """Set y of distinct images, the same call on every process; the share of them that changed."""
        old = self.labels[indices]
        self.labels[indices] = labels
        self.cluster_sizes.index_add_(0, labels, torch.ones_like(labels))
        self.cluster_sizes.index_add_(0, old, torch.full_like(old, -1))
        return float((labels != old).sum()) / max(len(indices), 1)

    def _fixed(self, features):
        return (features.double() * self._one).round_().long()

    def _add(self, labels, features, sign):
        """Add features [n, d] of this process to, or take them from, the sums of their clusters."""
        self._sums.index_add_(0, labels, self._fixed(features), alpha=sign)

    # --- centroids memory --------------------------------------------------------------------------------------------

    def update_centroids(self):
        """C_c <- mean of F_i over y_i = c; the centroid of an empty cluster stays as it was."""
        sums = self._sums if distributed.world_size() == 1 else distributed.all_reduce(self._sums.clone())
        means = self._mean(sums, self.cluster_sizes[:, None])
        empty = (self.cluster_sizes == 0).nonzero()[:, 0]
        means[empty] = self.centroids[empty]
        self._set_centroids(slice(None), means)

    def _set_centroids(self, clusters, values):
        self.centroids[clusters] = values
        self._nearest = None

    def _mean(self, sums, sizes):
        """Sums in units of 1 / _one, divided by sizes."""
        return sums.float().mul_((1 / (sizes.double() * self._one)).float())

    def split_small_clusters(self):
        """Dissolve the small clusters and refill each with half of a large one; returns how many were refilled.

        (Paper, "Handling Clustering Distribution".) Nothing happens while every cluster is small. A cluster of fewer
        than 2 x min_cluster_size images is not split, as half of it would be dissolved again in the next step: the
        clusters that are left then stay empty. N >= 2 K min_cluster_size guarantees that none is.
        """
        is_small = self.cluster_sizes < self.min_cluster_size
        small = is_small.nonzero()[:, 0].tolist()
        if not small or len(small) == len(is_small):
            return 0
        if self.cluster_sizes[is_small].any():
            self._dissolve(is_small)

        # Only the len(small) largest clusters (and their equals) can be split: one look at all labels finds their images.
        sizes = self.cluster_sizes
        candidates = (sizes >= sizes.topk(len(small)).values[-1].clamp(min=2 * self.min_cluster_size)).nonzero()[:, 0]
        if len(candidates) == 0:
            return 0
        is_candidate = torch.zeros_like(is_small)
        is_candidate[candidates] = True
        images = is_candidate[self.labels].nonzero()[:, 0]
        images = images[self.labels[images].argsort(stable=True)]
        members = dict(zip(candidates.tolist(), images.split(sizes[candidates].tolist())))
        for refilled, empty in enumerate(small):
            largest = int(self.cluster_sizes.argmax())
            if largest not in members or len(members[largest]) < 2 * self.min_cluster_size:
                return refilled
            members[largest], members[empty] = self._split(members[largest], largest, empty)
        return len(small)

    def _dissolve(self, is_small):
        """Move every image of a small cluster to the best of the clusters that are not small."""
        large = (~is_small).nonzero()[:, 0]
        rows = is_small[self.labels[self.rows]].nonzero()[:, 0]
        features = self.features[rows].float()
        labels = large[assign(features, self.centroids[large], inner_product=True)]
        self._add(self.labels[rows + self.rows.start], features, sign=-1)
        self._add(labels, features, sign=1)
        self._relabel(distributed.all_gather_uneven_rows(rows + self.rows.start), distributed.all_gather_uneven_rows(labels))

    def _split(self, images, largest, empty):
        """Give half of the cluster `largest`, which has these images, to the cluster `empty`; returns both halves."""
        here = (images >= self.rows.start) & (images < self.rows.stop)
        own = self.features[images[here] - self.rows.start].float()
        features = distributed.all_gather_uneven_rows(own)  # images ascend and shards are contiguous: the order is the same
        # All split the same matrix; the main process decides for all, should their hardware round differently.
        moves = two_means(features, at_least=self.min_cluster_size, seed=empty)
        moves = distributed.broadcast(moves.byte()).bool()

        stays, goes = images[~moves], images[moves]
        moved = own[moves[here]]
        labels = torch.full((len(moved),), empty, device=moved.device)
        self._add(torch.full_like(labels, largest), moved, sign=-1)
        self._add(labels, moved, sign=1)
        self._relabel(goes, torch.full_like(goes, empty))
        for cluster, half in ((largest, features[~moves]), (empty, features[moves])):
            self._set_centroids(cluster, self._mean(self._fixed(half).sum(dim=0), self.cluster_sizes[cluster]))
        return stays, goes

    def loss_weights(self, power=0.5):
        """w_c proportional to N_c^-power, summing to 1: [K] float32 (an empty cluster counts as one image)."""
        weights = self.cluster_sizes.clamp(min=1).double() ** -power
        return (weights / weights.sum()).float()

    # --- checkpoint --------------------------------------------------------------------------------------------------

    def state_dict(self):
        """{"features" [N, d], "labels" [N], "centroids" [K, d]} on the CPU; features are None off the main process."""
        return {"features": distributed.gather_rows(self.features), "labels": self.labels.cpu().clone(),
                "centroids": self.centroids.cpu().clone()}

    def load_state_dict(self, state):
        """Restore `state_dict`, on any number of processes: each takes its rows of all N."""
        self.features.copy_(state["features"][self.rows])
        self.labels.copy_(state["labels"])
        self._set_centroids(slice(None), state["centroids"].to(self.labels.device))
        self._count()

    def _count(self, chunk=65536):
        """Sizes and sums from scratch; exact, so equal to what the steps had kept."""
        self.cluster_sizes = self.labels.bincount(minlength=len(self.centroids))
        self._sums.zero_()
        for features, labels in zip(self.features.split(chunk), self.labels[self.rows].split(chunk)):
            self._add(labels, features, sign=1)


def _last_occurrences(indices):
    """Distinct indices [U], ascending, and the position [U] of each one's last occurrence."""
    ordered, positions = indices.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[is_last], positions[is_last]


def two_means(x, at_least=1, iterations=20, seed=0):
    """Split points in two by k-means, k = 2: bool [n], True for the second half.

    x: [n, d]. Starts from the sides of the points' principal axis, so that no luck is involved. Each half keeps
    at_least points, or n // 2 if there are fewer: those that lie farthest on its side. Points that k-means cannot
    tell apart are split at random into equal halves.
    """
    n = len(x)
    x = x - x.mean(dim=0)
    axis = x[(x * x).sum(dim=1).argmax()]
    for _ in range(4):  # power iteration
        axis = F.normalize((x @ axis) @ x, dim=0)
    score = x @ axis
    second = score > 0
    for _ in range(iterations):
        size = int(second.sum())
        if size in (0, n):
            break
        # x sums to zero, so the first half's sum is minus the second's.
        total = second.to(x.dtype) @ x
        center1, center2 = -total / (n - size), total / size
        score = x @ (center2 - center1) - (center2 @ center2 - center1 @ center1) / 2  # above 0: nearer to center2
        if torch.equal(score > 0, second):
            break
        second = score > 0
    if not second.any() or second.all():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
        second[order[: n // 2]], second[order[n // 2 :]] = True, False
        return second
    order = score.argsort(stable=True)
    at_least = min(at_least, n // 2)
    second[order[:at_least]], second[order[n - at_least :]] = False, True
    return second
