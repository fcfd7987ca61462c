"""The files of a finished run: backbone, table, arrays, picture and page.

Only the main process writes, and every file is whole or not there.
"""

import codecs
import csv
from pathlib import Path

import numpy as np
import torch

from odc.outputs import gallery, report
from odc.runtime.checkpoint import write_atomically


def save_all(args, backbone, dataset, clustering, progress):
    """All files of a run. clustering: with the features of all images. args, progress: train.py's.
    """
    folder, unreadable = Path(args.output), set(progress.failed)
    title = f"{dataset.name}, epoch {progress.epoch}"
    save_backbone(folder / "backbone.pth", backbone, args.image_size)
    save_array(folder / "labels.npy", clustering.labels)
    save_array(folder / "centroids.npy", clustering.centroids)
    save_table(folder / "clusters.csv", dataset, clustering.labels, clustering.similarity,
               unreadable)
    gallery.save(folder / "clusters.png", dataset, clustering, unreadable, title, args.seed)
    report.save(folder, dataset, clustering, unreadable, args.workers)


def save_backbone(path, backbone, image_size):
    """A state dict with torchvision's names and no `fc`.

    The size of the training images is in its metadata, where `load_state_dict` does not mind it.
    """
    state = backbone.state_dict()
    for name, value in state.items():
        state[name] = value.cpu().contiguous()
    state._metadata[""]["image_size"] = image_size
    write_atomically(path, lambda file: torch.save(state, file))


def save_array(path, array):
    """A tensor on the CPU, or an array, as .npy."""
    write_atomically(path, lambda file: np.save(file, np.asarray(array)))


def save_table(path, dataset, labels, similarity, unreadable, neighbours=None):
    """A CSV file with a line for each image: path (or index), cluster, similarity to its centroid.

    An unreadable image has an empty cluster.
    neighbours: (ImageSet, its images [N, n], similarity [N, n]) for 2 n more columns, or None.
    """
    train, images, scores = neighbours or (None, np.empty((len(dataset), 0)), None)
    columns = [name for n in range(images.shape[1])
               for name in (f"neighbour_{n + 1}", f"similarity_{n + 1}")]

    def row(i):
        if i in unreadable:
            return ["", "", *("" for _ in columns)]
        found = [value for n in range(images.shape[1])
                 for value in (train.name_of(images[i, n]), f"{float(scores[i, n]):.4f}")]
        return [int(labels[i]), f"{float(similarity[i]):.4f}", *found]

    def write(file):
        text = codecs.getwriter("utf-8")(file, errors="surrogateescape")
        # Python before 3.13 does not quote a carriage return by itself.
        blocks = [images.names.block for images in (dataset, train) if images and images.names]
        odd = any((block == ord("\r")).any() for block in blocks)
        writer = csv.writer(text, lineterminator="\n",
                            quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
        writer.writerow(["path", "cluster", "similarity", *columns])
        writer.writerows([dataset.name_of(i), *row(i)] for i in range(len(dataset)))

    write_atomically(path, write)
