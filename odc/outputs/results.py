"""Files of a finished run that programs read; process 0 writes them, each whole or not at all."""

import numpy as np
import torch

from odc.distributed import print_main
from odc.outputs import duplicates
from odc.runtime.checkpoint import write_atomically


def write_results_files(folder, backbone, image_size, dataset, clustering, workers=0):
    """All but features.npy. clustering: of all images; its duplicates are found here."""
    write_backbone(folder / "backbone.pth", backbone, image_size)
    write_array(folder / "labels.npy", clustering.labels)
    write_array(folder / "centroids.npy", clustering.centroids)
    write_table(folder / "clusters.csv", dataset, clustering.labels, clustering.similarity)
    clustering.duplicates = duplicates.find_groups(dataset, clustering, workers)
    write_duplicates(folder / "duplicates.csv", dataset, *clustering.duplicates)


def write_backbone(path, backbone, image_size):
    """A state dict with torchvision's names and no `fc`; its `_metadata` keeps the image size."""
    state = backbone.state_dict()
    state._metadata[""]["image_size"] = image_size
    for name, value in state.items():
        state[name] = value.detach().cpu().contiguous()
    write_atomically(path, lambda file: torch.save(state, file))


def write_array(path, array):
    """A tensor on the CPU, or an array, as .npy."""
    write_atomically(path, lambda file: np.save(file, np.asarray(array)))


def write_table(path, dataset, labels, similarity, neighbours=None, listed=None):
    """A CSV file of images: path (or index), cluster, similarity to its centroid, the path's root.

    neighbours: (ImageSet, its images [N, n], similarity [N, n]) for 2 n more columns, or None.
    listed: the names of all lines, if unreadable images have left the dataset; theirs are empty.
    """
    train, images, scores = neighbours or (None, *torch.empty(2, len(dataset), 0))
    columns = ["path", "cluster", "similarity"]
    for n in range(images.shape[1]):
        columns += [f"neighbour_{n + 1}", f"similarity_{n + 1}"]

    def lines():
        yield [*columns, "root"]
        rows = zip(labels.tolist(), similarity, images, scores)
        for name in listed or map(dataset.name_of, range(len(dataset))):
            row = [name] + [""] * (len(columns) - 1)
            if name not in dataset.left_out:
                cluster, cosine, found, near = next(rows)
                row = [name, cluster, f"{cosine:.4f}"]
                for image, score in zip(found, near):
                    row += [train.name_of(image), f"{score:.4f}"]
            yield [*row, dataset.root]

    write_lines(path, lines())


def write_duplicates(path, dataset, groups, least):
    """A line for each image that has copies. groups, least: of `duplicates.find_groups`."""
    lines = [[n, dataset.name_of(image), *size, f"{similarity:.4f}", found]
             for n, group in enumerate(groups, 1) for image, *size, similarity, found in group]
    write_lines(path, ["group path width height bytes similarity found".split(), *lines])
    print_main(f"{len(groups):,} groups of {len(lines):,} copies, by a hash, or by features "
               f"with a similarity of at least {least:.3f}.")


def write_lines(path, lines):
    """A CSV file. Python's own writer leaves a carriage return bare before 3.13."""
    def quoted(value):
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text

    write_atomically(path, lambda file: file.writelines(
        (",".join(map(quoted, line)) + "\n").encode("utf-8", "surrogateescape") for line in lines))


def write_unreadable(path, left_out):
    """A line for each image that was left out, {name: reason}: both, with a tab between."""
    text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(left_out.items()))
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="surrogateescape")))
