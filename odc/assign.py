"""Clusters of new images, by the network and the final clusters of a run, and what they resemble.

    python -m odc.assign --checkpoint out/checkpoint.pth --data FOLDER --output clusters.csv
"""

import os
from pathlib import Path

import numpy as np
import torch

from odc import distributed
from odc.clusters import average_maps, cosine_to_centroid, unit_features
from odc.data.augmentation import clustering_transform, normalise
from odc.data.datasets import check_same_images, open_dataset
from odc.data.loader import default_workers
from odc.errors import UserError
from odc.evaluation import metrics
from odc.evaluation.knn import nearest_neighbours
from odc.features import extract
from odc.kmeans import nearest_centroids
from odc.model import CentredPool, Neck, ResNet
from odc.outputs import results
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import Parser, check_output, path, whole

# How a file of vectors begins.
NUMPY_START = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("


def make_parser():
    parser = Parser("Find the cluster of every image in a folder, by a finished run of train.py.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", type=path, required=True, help="checkpoint.pth of train.py")
    add("--data", metavar="PATH", type=path, required=True, help="images in any known layout")
    add("--output", metavar="FILE.csv", type=path, default="clusters.csv", help="the table")
    add("--folders", metavar="DIR", type=path, help="a new folder with links, DIR/CLUSTER/IMAGE")
    add("--features", metavar="FILE.npy", type=path, help="vectors of the images with a cluster")
    add("--neighbours", metavar="N", type=whole(0, 1000), default=0,
        help="how many of the most similar training images the table names")
    add("--train-data", metavar="PATH", type=path, help="the run's images, if they were moved")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    return parser


def load_run(path, device):
    """(checkpoint of a run, network: images [B, 3, S, S] -> unit features [B, d], centroids)."""
    state = checkpoint.read_run(Path(path))
    if not state or not state.get("final_clusters"):
        raise UserError(f"--checkpoint {path}: is not of a run that has come to its end; run its "
                        "command again, with --epochs 0.")
    backbone = ResNet(state["arch"], state["small_stem"]).to(device).eval()
    kind = CentredPool if "mean" in state["final_clusters"]["neck"] else Neck
    neck = kind(backbone.out_channels[-1]).to(device).eval()
    backbone.load_state_dict(state["backbone"])
    neck.load_state_dict(state["final_clusters"]["neck"])
    centroids = state["final_clusters"]["centroids"].to(device)
    backbone.to(memory_format=torch.channels_last)
    parts = state["final_clusters"]["parts"]
    return state, lambda x: unit_features(neck, average_maps(backbone, x, parts)), centroids


def open_training_images(path, vectors_path, state, network, transform, device):
    """(the ImageSet of the run, its unit features [N, d], memory-mapped). Raises UserError."""
    dataset = open_dataset(path)
    if dataset.fingerprint != state["fingerprint"]:
        raise UserError(f"{path} holds other images than the run had; give --train-data.")
    dataset.leave_out(state["unreadable"])
    try:
        vectors = torch.from_numpy(np.load(vectors_path, mmap_mode="c"))
        # A run that was killed may have left the vectors of another epoch: compute three again.
        some = [0, len(dataset) // 2, len(dataset) - 1]
        images = torch.stack([transform(dataset.load(i)) for i in some]).to(device)
        cosine = (network(normalise(images)).cpu() * vectors[some]).sum(1)
        if len(vectors) != len(dataset) or not cosine.min() > 0.98:
            raise ValueError("the checkpoint gives others")
    except Exception as error:
        raise UserError(f"{vectors_path}: the run's vectors are missing, damaged or of another time"
                        f" ({error}); run its command again, with --epochs 0.") from None
    return dataset, vectors


def link_images(folder, dataset, labels):
    """A link to every image in a new folder: folder/CLUSTER/INDEX-NAME; from memory, PNG files."""
    for i, cluster in enumerate(labels.tolist()):
        source = Path(dataset.root, dataset.name_of(i))
        target = Path(folder, str(cluster), f"{i}-{source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if dataset.pixels is None:
            target.symlink_to(source)
        else:
            dataset.load(i).save(target.with_name(f"{i}.png"))


@torch.no_grad()
def main(arguments=None):
    args = make_parser().parse_args(arguments)
    device = distributed.init(args.device)
    launch.catch_signals()
    train = neighbours = None
    with distributed.raise_everywhere():
        vectors_path = Path(args.checkpoint).with_name("features.npy")
        if args.folders and (os.path.lexists(args.folders) or Path(
                os.path.realpath(args.folders)).is_relative_to(os.path.realpath(args.data))):
            raise UserError(f"--folders {args.folders}: choose a new folder, outside --data.")
        taken = [args.checkpoint, *map(vectors_path.with_name, (
            "features.npy", "labels.npy", "centroids.npy", "clusters.csv"))]  # of the run
        for option, file, start in (("--folders", args.folders, b""),
                                    ("--output", args.output, b"path,cluster,similarity"),
                                    ("--features", args.features, NUMPY_START)):
            if file:
                check_output(option, file, start, taken)
                taken.append(file)
        state, network, centroids = load_run(args.checkpoint, device)
        transform = clustering_transform(state["final_clusters"]["image_size"],
                                         state["final_clusters"]["whole_images"])
        dataset = open_dataset(args.data)
        if args.neighbours:
            train, vectors = open_training_images(args.train_data or state["settings"]["data"],
                                                  vectors_path, state, network, transform, device)
    check_same_images(dataset, *([train] if train else []))
    distributed.print_main(f"{len(dataset):,} images, {len(centroids):,} clusters after epoch "
                           f"{state['progress']['epoch']} of a run on {state['settings']['data']}")
    listed = [dataset.name_of(i) for i in range(len(dataset))]  # unreadable ones leave it now
    features = extract(network, dataset, transform, centroids.shape[1], device, 128,
                       default_workers(dataset.pixels is not None), unreadable_share=1.0)
    labels = nearest_centroids(features, centroids)
    similarity = cosine_to_centroid(features, centroids, labels)
    labels, similarity, features = (
        distributed.all_gather_uneven_rows(part).cpu() for part in (labels, similarity, features))
    if train:
        rows = torch.arange(len(train))[distributed.shard(len(train))]
        scores, found = nearest_neighbours(features.to(device), vectors[rows].to(device), rows,
                                           min(args.neighbours, len(train)))
        neighbours = train, found.cpu(), scores.cpu()
    with distributed.raise_everywhere():
        if distributed.is_main():
            results.write_table(args.output, dataset, labels, similarity, neighbours, listed)
            if args.features:
                results.write_array(args.features, features)
            if args.folders:
                link_images(args.folders, dataset, labels)
    if dataset.labels is not None:
        distributed.print_main(metrics.agreement(labels, dataset.labels)[1])
    distributed.print_main("Done:", *filter(None, (args.output, args.features, args.folders)))


if __name__ == "__main__":
    launch.run_program(main)
