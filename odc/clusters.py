"""Clusters of the unaugmented images, by the current network: the ones that a user gets.

The samples memory serves the training. Its features come from augmented images, with dropout, by
the weights of many different steps, and the neck's batch norm statistics lag behind (momentum
0.001). So all images pass through the network once more, without augmentation. K-means continues
on these features, from the memory's clusters. `odc.assign` compares new images with the centroids
that it finds.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.features import extract
from odc.kmeans import ClusterSums, kmeans

ITERATIONS = 50  # of k-means


@dataclass
class Clustering:
    """N images in K clusters. All but the features is the same on every process."""

    labels: torch.Tensor  # int64 [N], on the CPU
    similarity: torch.Tensor  # float32 [N], cosine to the centroid of the own cluster, on the CPU
    centroids: torch.Tensor  # float32 [K, d], on the CPU
    features: torch.Tensor  # float32 [n, d], unit rows: of this process, or of all images
    neck: torch.nn.Module | None = None  # the network's, with batch norm statistics of all images


def cluster_images(network, dataset, memory, image_size, workers=0):
    """Cluster the unaugmented images by the current network.

    memory: an ODCMemory; k-means starts from its clusters. Small clusters are dissolved and
    refilled as in training. Returns a Clustering. Raises UserError if an image, which could be read
    before, cannot be read now. A collective.
    """
    device, K = memory.labels.device, len(memory.centroids)
    backbone, neck = network.backbone.eval(), copy.deepcopy(network.neck).eval()
    pooled = extract(lambda images: backbone(images)[-1].mean((2, 3)), dataset,
                     evaluation_transform(image_size), backbone.out_channels[-1], device,
                     workers=workers, unreadable_share=0)  # [n, C]
    estimate_statistics(neck, pooled, len(dataset))
    features = torch.cat([unit_features(neck, rows) for rows in pooled.split(4096)])  # [n, d]
    del pooled
    sums = ClusterSums(K, features.shape[1], len(dataset), device)
    sums.add(features, memory.labels[memory.rows])
    start = sums.means(memory.labels.bincount(minlength=K))  # [K, d]
    # Clusters of copies of one image have one centroid. The first keeps it, the others start empty.
    first = torch.cat([(torch.cdist(part, start) < 2**-8).byte().argmax(1)
                       for part in start.split(1024)])
    start[first != torch.arange(K, device=device)] = 0
    own_labels, centroids = kmeans(features, K, ITERATIONS, initial_centroids=start,
                                   min_size=memory.min_cluster_size)
    labels = distributed.all_gather_uneven_rows(own_labels)
    if empty := K - len(labels.unique()):
        distributed.print_main(f"{empty:,} of {K:,} clusters are empty: no group of at least "
                               f"{2 * memory.min_cluster_size} different images was left to split.")
    similarity = cosine_to_centroid(features, centroids, own_labels)
    similarity = distributed.all_gather_uneven_rows(similarity)
    return Clustering(labels.cpu(), similarity.cpu(), centroids.cpu(), features, neck)


@torch.no_grad()
def unit_features(neck, pooled):
    """The neck of pooled features [B, C] of the last map, L2-normalised: [B, d]."""
    return F.normalize(neck(pooled[:, :, None, None]).float())


@torch.no_grad()
def estimate_statistics(neck, pooled, num_images):
    """Set the running mean and variance of the neck's batch norm to those of all images.

    pooled: [n, C], the rows of this process. A collective.
    """
    hidden = neck.bn1.num_features
    sums = torch.zeros(2, hidden, dtype=torch.float64, device=pooled.device)
    for rows in pooled.split(4096):
        x = neck.fc1(rows).double()
        sums += torch.stack([x.sum(0), x.square().sum(0)])
    mean, square = distributed.all_reduce(sums) / num_images
    neck.bn1.running_mean.copy_(mean)
    neck.bn1.running_var.copy_((square - mean.square()).clamp(min=0))


def cosine_to_centroid(features, centroids, labels):
    """Cosine [n] of unit features [n, d] to the centroids of their clusters [n]."""
    return torch.cat([F.cosine_similarity(rows, centroids[own])
                      for rows, own in zip(features.split(65536), labels.split(65536))])
