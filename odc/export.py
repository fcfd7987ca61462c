"""The files of a run that other programs read: backbone.pth, clusters.csv, labels.npy and features.npy."""

import csv

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed
from odc.checkpoint import write_atomically


def save_backbone(path, backbone):
    """A state dict with torchvision's names and no `fc`; main process only."""
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def save_array(path, tensor):
    """A tensor, such as the pseudo-labels [N], as .npy; main process only."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, tensor.cpu().numpy())

    write_atomically(path, write)


def similarities(memory):
    """Cosine of every image's feature to its centroid, [N] on the main process, None elsewhere. A collective."""
    labels = memory.labels[memory.rows]
    parts = [F.cosine_similarity(features.float(), memory.centroids[part])
             for features, part in zip(memory.features.split(65536), labels.split(65536))]
    return distributed.gather_rows(torch.cat(parts))


def save_clusters(path, dataset, labels, similarity):
    """clusters.csv: path (or index), cluster, cosine similarity to its centroid; main process only."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "cluster", "similarity"])
            for i, (cluster, cosine) in enumerate(zip(labels.tolist(), similarity.tolist())):
                writer.writerow([dataset.name_of(i), cluster, f"{cosine:.4f}"])

    write_atomically(path, write)
