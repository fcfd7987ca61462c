"""Clusters of the unaugmented images, by the current network: the ones that a user gets.

The memory's features are of augmented images and old weights, and the neck's batch norm lags behind
(momentum 0.001). So all images are read again, and k-means continues from the memory's clusters.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import five_crop

from odc import distributed
from odc.data.augmentation import clustering_transform
from odc.evaluation import metrics
from odc.features import extract, unit_pixels
from odc.kmeans import ClusterSums, kmeans, nearest_centroids
from odc.model import CentredPool

COMPARED = 10_000  # images at most, on which `stabilities` compares


@dataclass
class Clustering:
    """N images in K clusters. All but the features is the same on every process."""

    labels: torch.Tensor  # int64 [N], on the CPU
    similarity: torch.Tensor  # float32 [N], cosine to the centroid of the own cluster, on the CPU
    centroids: torch.Tensor  # float32 [K, d], on the CPU; rows of -1 for empty clusters
    features: torch.Tensor | None = None  # float32 [n, d], unit rows: this process's, or all
    neck: torch.nn.Module | None = None  # gave the features, with statistics of all images
    pooled: torch.Tensor | None = None  # float32 [n, C], the average of the last map
    hashes: torch.Tensor | None = None  # int64 [N], difference hashes, on the CPU
    duplicates: tuple = ([], 1.0)  # what odc.outputs.duplicates.find_groups has found

    def members(self):
        """The images of each of the K clusters, the most similar to the centroid first: arrays."""
        # As clusters.csv has the similarities: equal there, images keep their order.
        similarity = self.similarity.double().round(decimals=4)
        order = np.lexsort((-similarity.numpy(), self.labels.numpy()))
        return np.split(order, self.labels.bincount(minlength=len(self.centroids)).cumsum(0)[:-1])


def cluster_images(network, dataset, memory, image_size, workers=0, of_backbone=False, parts=False):
    """The Clustering of the unaugmented images, from that of `memory` on. A collective.

    of_backbone: cluster the backbone's features, less their mean, instead of the neck's.
    parts: see `average_maps`.
    Clusters below memory.min_cluster_size give way to halves of wide ones, while there are any.
    Raises UserError if an image cannot be read any more.
    """
    device, K, backbone = memory.labels.device, len(memory.centroids), network.backbone.eval()
    C = backbone.out_channels[-1]

    def forward(images):  # pooled maps; differences to the left of the gray image at 8 x 9 pixels
        gray = F.adaptive_avg_pool2d(images.mean(1), (8, 9))
        return torch.cat([average_maps(backbone, images, parts), gray.diff().flatten(1)], dim=1)
    rows = extract(forward, dataset, clustering_transform(image_size, dataset.whole_images), C + 64,
                   device, workers=workers, unreadable_share=0)
    pooled, lighter = rows[:, :C], rows[:, C:] > 2**-6  # [n, C], [n, 64]: by more than noise
    hashes = (lighter.long() << torch.arange(64, device=device)).sum(1)
    neck = CentredPool(C) if of_backbone else copy.deepcopy(network.neck).eval()
    features = neck_features(neck.to(device), pooled, len(dataset))
    sums = ClusterSums(K, features.shape[1], len(dataset), device)
    sums.add(features, memory.labels[memory.rows])
    start = sums.means(memory.labels.bincount(minlength=K))  # [K, d]
    # Clusters of copies of one image have one centroid. The first keeps it, the others start empty.
    first = torch.cat([(torch.cdist(part, start) < 2**-8).byte().argmax(1)
                       for part in start.split(1024)])
    start[first != torch.arange(K, device=device)] = 0
    own_labels, centroids = kmeans(features, K, 50, initial_centroids=start,
                                   min_size=memory.min_cluster_size)
    labels = distributed.all_gather_uneven_rows(own_labels)
    empty = labels.bincount(minlength=K) == 0
    centroids[empty] = -1  # far from every unit feature: no new image is assigned to it
    if empty.any():
        distributed.print_main(f"{int(empty.sum()):,} of {K:,} clusters are empty: the others are "
                               "too small to split, or hold copies of one image.")
    similarity = distributed.all_gather_uneven_rows(
        cosine_to_centroid(features, centroids, own_labels))
    return Clustering(labels.cpu(), similarity.cpu(), centroids.cpu(), features, neck, pooled,
                      distributed.all_gather_uneven_rows(hashes).cpu())


def average_maps(backbone, images, parts=False):
    """The average [B, C] of the last map of images [B, 3, S, S].

    parts: the mean over the image, its four corners and its middle, of 3/4 of the side, enlarged.
    """
    side, views = images.shape[-1], [images]
    if parts:
        views += [F.interpolate(part, (side, side), mode="bilinear")
                  for part in five_crop(images, round(0.75 * side))]
    return torch.stack([backbone(view)[-1].mean((2, 3)) for view in views]).mean(0)


@torch.no_grad()
def neck_features(neck, pooled, num_images):
    """`unit_features` [n, d] after the neck has got the statistics of all images. A collective."""
    estimate_statistics(neck, pooled, num_images)
    return torch.cat([unit_features(neck, rows) for rows in pooled.split(4096)])


@torch.no_grad()
def unit_features(neck, pooled):
    """The neck of pooled features [B, C] of the last map, L2-normalised: [B, d]."""
    return F.normalize(neck(pooled[:, :, None, None]).float())


def estimate_statistics(neck, pooled, num_images):
    """Give the neck the mean, and its batch norm the variance, of all images. A collective."""
    if isinstance(neck, CentredPool):
        total = distributed.all_reduce(F.normalize(pooled).sum(0, dtype=torch.float64))
        neck.mean.copy_(total / num_images)
        return
    sums = torch.zeros(2, neck.bn1.num_features, dtype=torch.float64, device=pooled.device)
    for rows in pooled.split(4096):
        hidden = neck.fc1(rows).double()
        sums += torch.stack([hidden.sum(0), hidden.square().sum(0)])
    mean, square = distributed.all_reduce(sums) / num_images
    neck.bn1.running_mean.copy_(mean)
    neck.bn1.running_var.copy_((square - mean.square()).clamp(min=0))


def stabilities(backbone, dataset, image_sizes, num_clusters, workers=0):
    """`stability` of a backbone's features at each size and of raw pixels. A collective."""
    sample = dataset.take(range(0, len(dataset), -(-len(dataset) // COMPARED)))
    device, C = next(backbone.eval().parameters()).device, backbone.out_channels[-1]

    def rows_of(forward, image_size, dim):
        return extract(forward, sample, clustering_transform(image_size, dataset.whole_images), dim,
                       device, workers=workers, unreadable_share=0)
    rows = [rows_of(lambda images: average_maps(backbone, images), size, C) for size in image_sizes]
    rows = [neck_features(CentredPool(C).to(device), pooled, len(sample)) for pooled in rows]
    return [stability(each, num_clusters) for each in (*rows, rows_of(unit_pixels, 32, 3 * 32**2))]


def stability(features, num_clusters):
    """NMI in 0..1 of two clusterings of features [n, d]: k-means of the even and the odd rows."""
    labels = []
    for half in (features[::2], features[1::2]):
        num_rows = int(distributed.all_reduce(torch.tensor(len(half))))
        if num_rows == 0:  # one image a process
            return 0.0
        _, centroids = kmeans(half.contiguous(), max(1, min(num_clusters, num_rows // 10)))
        own_labels = nearest_centroids(features, centroids).cpu()
        labels.append(distributed.all_gather_uneven_rows(own_labels))
    return metrics.nmi(*labels)


def cosine_to_centroid(features, centroids, labels):
    """Cosine [n] of unit features [n, d] to the centroids of their clusters [n]."""
    return torch.cat([F.cosine_similarity(rows, centroids[own])
                      for rows, own in zip(features.split(65536), labels.split(65536))])
