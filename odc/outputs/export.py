"""The files of a run that other programs read: backbone.pth, clusters.csv, labels.npy and features.npy."""

import csv

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed
from odc.outputs import gallery
from odc.runtime.checkpoint import write_atomically


def save_all(run):
    """What a run leaves for other programs and for people; the same files again if it had already come to its end.

    A collective. run: an `odc.run.Run`.
    """
    similarity = similarities(run.memory)
    features = distributed.gather_rows(run.memory.features) if run.args.export_features else None
    with distributed.together():
        if distributed.is_main():
            save_backbone(run.output / "backbone.pth", run.network.backbone)
            save_array(run.output / "labels.npy", run.memory.labels)
            save_clusters(run.output / "clusters.csv", run.dataset, run.memory.labels, similarity, run.failed)
            if features is not None:
                save_array(run.output / "features.npy", features)
            save_gallery(run, similarity)


def save_gallery(run, similarity):
    """clusters.png as things are; main process only."""
    gallery.save(run.output / "clusters.png", run.dataset, run.memory.labels.cpu(), similarity, run.args.num_clusters,
                 f"{run.dataset.name}, epoch {run.epoch}", run.args.seed)


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


def save_clusters(path, dataset, labels, similarity, unreadable=()):
    """clusters.csv: path (or index), cluster, cosine similarity to its centroid; main process only.

    An unreadable image has an empty cluster.
    """

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "cluster", "similarity"])
            for i, (cluster, cosine) in enumerate(zip(labels.tolist(), similarity.tolist())):
                writer.writerow([dataset.name_of(i), *(("", "") if i in unreadable else (cluster, f"{cosine:.4f}"))])

    write_atomically(path, write)
