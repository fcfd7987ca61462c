"""The two memories of Online Deep Clustering (paper, section "Online Deep Clustering").

The samples memory holds a moving feature F_i and a pseudo-label y_i for every image i, and the
centroids memory the mean feature C_c of the N_c images of every cluster c. The momentum m is the
share of the new feature: F_i <- m z_i + (1 - m) F_i, normalised.

Each process holds the features of its contiguous `rows`, and their sums. Labels, centroids and
sizes are the same everywhere. Public methods are collectives. `images` are ascending int64 indices
on the CPU: no step waits for a GPU to know how many there are, and a process has a slice of them.
"""

import torch
import torch.nn.functional as F

from odc import distributed
from odc.errors import UserError
from odc.kmeans import ClusterSums, nearest_centroids, two_means


class ODCMemory:
    """Samples memory and centroids memory; the defaults are the recipe's.

    num_images: N. dim: d. num_clusters: K. Clusters of fewer than min_cluster_size images are
    small. To read: labels [N] int64, centroids [K, d], cluster_sizes [K] int64, features [n, d].
    """

    def __init__(self, num_images, dim, num_clusters, momentum=0.5, min_cluster_size=20,
                 device="cpu"):
        self.momentum, self.min_cluster_size = momentum, min_cluster_size
        self.rows = distributed.shard(num_images)
        self.features = torch.zeros(self.rows.stop - self.rows.start, dim, device=device)
        self.labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        self.centroids = torch.zeros(num_clusters, dim, device=device)
        self.cluster_sizes = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        self.sums = ClusterSums(num_clusters, dim, num_images, device)

    def initialize(self, features, labels):
        """Start from finite features [n, d] of this process's rows, and labels [N]."""
        if distributed.any_process(not torch.isfinite(features.sum())):
            raise UserError("The network's features are not finite: start from other weights.")
        F.normalize(features.float(), out=self.features)
        self.labels.copy_(labels)
        self._count()
        self.update_centroids()

    def update_samples(self, indices, z):
        """Move the features of a batch and relabel it (paper, Eq. 1 and 2).

        indices: int64 [M] on the CPU. z: [M, d] finite. Both are of all processes, in rank order;
        an image's last occurrence counts. Returns the share of labels that changed, 0-dim float64.
        """
        images, place = indices.unique(return_inverse=True)
        last = place.new_zeros(len(images)).scatter_reduce(
            0, place, torch.arange(len(indices)), "amax")
        own, rows = self._own(images)
        z = F.normalize(z[self._to_device(last[own])].float())
        before = self.features[rows]
        # Eq. 1, and Eq. 2 as the recipe has it: argmax_c <F_i, C_c> instead of the nearest C_c.
        features = F.normalize(self.momentum * z + (1 - self.momentum) * before)
        labels = nearest_centroids(features, self.centroids, inner_product=True)
        self.features[rows] = features
        labels = self._collect(labels, own, len(images))
        changed = self._relabel(images, labels, own, before, features)
        return changed.double() / len(images)

    def _relabel(self, images, labels, own, before, features):
        """Relabel distinct images, with old and new features of images[own] -> how many changed."""
        images = self._to_device(images)
        old_labels, self.labels[images] = self.labels[images], labels
        self.sums.add(before, old_labels[own], sign=-1)
        self.sums.add(features, labels[own])
        self.cluster_sizes.index_add_(0, labels, torch.ones_like(labels))
        self.cluster_sizes.index_add_(0, old_labels, torch.ones_like(labels), alpha=-1)
        return (labels != old_labels).sum()

    def update_centroids(self):
        """C_c <- mean of F_i over y_i = c. The centroid of an empty cluster stays as it was."""
        means = self.sums.means(self.cluster_sizes)
        self.centroids = torch.where(self.cluster_sizes[:, None] > 0, means, self.centroids)

    def split_small_clusters(self):
        """Dissolve the small clusters, then refill each with half of a large one, as in the paper.

        Returns how many were refilled. Clusters below 2 x min_cluster_size are not split.
        """
        sizes = self.cluster_sizes.cpu()
        small = sizes < self.min_cluster_size
        if not small.any() or small.all():
            return 0
        if sizes[small].any():
            self._dissolve(small)
            sizes = self.cluster_sizes.cpu()
        empty = small.nonzero()[:, 0].tolist()
        members = self._members_of_largest(sizes, len(empty))
        for refilled, cluster in enumerate(empty):
            largest = int(sizes.argmax())
            if sizes[largest] < 2 * self.min_cluster_size:
                return refilled
            halves = self._split(members[largest], largest, cluster)
            members[largest], members[cluster] = halves
            sizes[largest], sizes[cluster] = map(len, halves)
        return len(empty)

    def _dissolve(self, small):
        """Move every image of a small cluster [K] bool to the best cluster that is not small."""
        large = self._to_device((~small).nonzero()[:, 0])
        images = self._to_device(small)[self.labels].nonzero()[:, 0].cpu()
        own, rows = self._own(images)
        features = self.features[rows]
        labels = large[nearest_centroids(features, self.centroids[large], inner_product=True)]
        self._relabel(images, self._collect(labels, own, len(images)), own, features, features)

    def _members_of_largest(self, sizes, count):
        """{cluster: images [N_c]} of the `count` largest clusters: no other will be split."""
        chosen = sizes >= sizes.topk(count).values[-1].clamp(min=2 * self.min_cluster_size)
        images = self._to_device(chosen)[self.labels].nonzero()[:, 0]
        images = images[self.labels[images].argsort(stable=True)].cpu()
        clusters = chosen.nonzero()[:, 0].tolist()
        return dict(zip(clusters, images.split(sizes[chosen].tolist())))

    def _split(self, images, largest, empty):
        """Give half of the images [n] of `largest` to `empty`, with new centroids: both halves."""
        own, rows = self._own(images)
        features = self._collect(self.features[rows], own, len(images))
        moves = two_means(features, at_least=self.min_cluster_size, seed=empty).cpu()
        stay, go = images[~moves], images[moves]
        own, rows = self._own(go)
        moved = self.features[rows]
        labels = torch.full((len(go),), empty, device=moved.device)
        self._relabel(go, labels, own, moved, moved)
        both = self._to_device(torch.tensor([largest, empty]))
        self.centroids[both] = self.sums.means(self.cluster_sizes, both)
        return stay, go

    def loss_weights(self, power=0.5):
        """w_c ~ N_c^-power (paper), sum 1: float32 [K]. An empty cluster counts as one image."""
        weights = self.cluster_sizes.clamp(min=1).double() ** -power
        return (weights / weights.sum()).float()

    def _own(self, images):
        """The part of `images` that this process holds: a slice of them, and their rows."""
        bounds = torch.tensor([self.rows.start, self.rows.stop])
        own = slice(*torch.searchsorted(images, bounds).tolist())
        return own, self._to_device(images[own] - self.rows.start)

    def _collect(self, values, own, count):
        """Put values of the images `own` in their places among `count`, from every process."""
        collected = values.new_zeros(count, *values.shape[1:])
        collected[own] = values
        return distributed.all_reduce(collected)

    def _to_device(self, tensor):
        return tensor.to(self.labels.device, non_blocking=True)

    def state_dict(self):
        """labels [N] and centroids [K, d]. Features are saved by rows: runtime/checkpoint.py."""
        return {"labels": self.labels, "centroids": self.centroids}

    def load_state_dict(self, state, features):
        """Restore `state_dict`, with the features [n, d] of this process's rows."""
        self.features.copy_(features)
        self.labels.copy_(state["labels"])
        self.centroids.copy_(state["centroids"])
        self._count()

    def _count(self):
        """Sizes and sums from scratch; exact, so equal to what the steps had kept."""
        self.cluster_sizes = self.labels.bincount(minlength=len(self.centroids))
        self.sums.values.zero_()
        self.sums.add(self.features, self.labels[self.rows])
