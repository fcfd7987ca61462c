"""The files of a run that other programs read: backbone.pth, clusters.csv, labels.npy and features.npy."""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed
from odc.features import save_rows
from odc.outputs import gallery
from odc.runtime.checkpoint import write_atomically


def save_all(args, state, dataset):
    """What a run leaves for other programs and for people; the same files again if it had already come to its end.

    A collective. run: an `odc.run.Run`.
    """
    memory, output = state.memory, Path(args.output)
    similarity = similarities(memory)
    if args.export_features:
        save_rows(output / "features.npy", memory.features, len(dataset), f"--output {output}")
    with distributed.together():
        if distributed.is_main():
            save_backbone(output / "backbone.pth", state.network.backbone)
            save_array(output / "labels.npy", memory.labels)
            save_clusters(output / "clusters.csv", dataset, memory.labels, similarity, state.progress.failed)
            save_gallery(args, state, dataset, similarity)


def save_gallery(args, state, dataset, similarity):
    """clusters.png as things are; main process only."""
    gallery.save(Path(args.output) / "clusters.png", dataset, state.memory.labels.cpu(), similarity, args.num_clusters,
                 f"{dataset.name}, epoch {state.progress.epoch}", args.seed)


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
    return distributed.all_gather_uneven_rows(torch.cat(parts)).cpu()


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
