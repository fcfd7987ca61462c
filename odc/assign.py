"""Clusters of new images, by the network and the final clusters of a run: as a table, as folders,
as vectors, and with the training images that each image resembles.

    python -m odc.assign --checkpoint out/checkpoint.pth --data FOLDER --output clusters.csv
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from odc import distributed
from odc.clusters import cosine_to_centroid, unit_features
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import check_same_images, open_dataset
from odc.data.loader import default_workers, gather_unreadable
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import metrics
from odc.evaluation.knn import nearest_neighbours
from odc.features import extract
from odc.model import Neck, ResNet
from odc.nearest import nearest_centroids
from odc.outputs import export
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import Parser, whole


def make_parser():
    parser = Parser("Find the cluster of every image in a folder, by the network and the centroids "
                    "of a run.")
    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", metavar="FILE", required=True, help="checkpoint.pth of train.py")
    add("--data", metavar="PATH", required=True,
        help="folder of images, in any known layout, or the word shapes")
    add("--split", choices=["train", "val"], default="train",
        help="which one, of data with several")
    add("--background", choices=["white", "black"],
        help="colour on which transparent images are laid (default: the run's)")
    add = parser.add_argument_group("results").add_argument
    add("--output", metavar="FILE", default="clusters.csv", help="the table")
    add("--folders", metavar="DIR", help="a new folder with links to the images, as "
        "DIR/CLUSTER/IMAGE")
    add("--copy", action="store_true", help="copies, not links, in --folders")
    add("--features", metavar="FILE",
        help=".npy file for the vectors of the images, in the table's order")
    add = parser.add_argument_group("nearest training images").add_argument
    add("--neighbours", metavar="N", type=whole(0, 1000), default=0,
        help="how many to name in the table")
    add("--train-data", metavar="PATH", help="the images of the run (default: where they were)")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", metavar="N", type=whole(1, 65536), default=128, help="images in a batch")
    add("--workers", metavar="N", type=whole(0, 256), help="processes that read images, per "
        "process (default: up to 4; 0 for images in memory)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    return parser


def load_run(path):
    """The checkpoint of a run with final clusters, a dict. UserError for any other path."""
    if not os.path.isfile(path):
        raise UserError(f"--checkpoint {path}: there is no such file; give the checkpoint.pth that "
                        "train.py wrote.")
    state = checkpoint.load(path)
    if state.get("program") != checkpoint.PROGRAM:
        raise UserError(f"--checkpoint {path}: is not a checkpoint of this version of train.py.")
    if state["final_clusters"] is None:
        raise UserError(f"--checkpoint {path}: the run has not come to its end and has no final "
                        "clusters; run its command again, with --export-only for them as it is.")
    return state


def load_network(state, device):
    """Backbone and neck of a run: normalised images [B, 3, S, S] -> unit features [B, d]."""
    backbone = ResNet(state["arch"], state["small_stem"])
    neck = Neck(backbone.out_channels[-1], dim=state["settings"]["feature_dim"])
    backbone.load_state_dict(state["backbone"])
    neck.load_state_dict(state["final_clusters"]["neck"])
    backbone.to(device, memory_format=torch.channels_last).eval()
    neck.to(device).eval()
    return lambda images: unit_features(neck, backbone(images)[-1].mean((2, 3)))


def open_training_images(state, path=None):
    """The ImageSet of a run. path: where it is now. Raises UserError if these are other images."""
    path = path or state["settings"]["data"]
    try:
        dataset = open_dataset(path, "train")
    except UserError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{reason}; give the run's images with --train-data.") from None
    if dataset.fingerprint != state["data"]["fingerprint"]:
        raise UserError(f"{path} holds other images than the run was trained on, names or order "
                        "differ: give the run's images with --train-data.")
    return dataset


def load_vectors(path, num_images):
    """The unit features [N, d] of the run's images, memory-mapped. Raises UserError."""
    path = Path(path).parent / "features.npy"
    try:
        vectors = torch.from_numpy(np.load(path, mmap_mode="c"))
        if len(vectors) != num_images:
            raise ValueError(f"{len(vectors)} vectors for {num_images} images")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the run's vectors are missing or damaged ({error}); run its "
                        "command again, with --export-only.") from None
    return vectors


def check_outputs(args):
    """Raise UserError now for what could not be written after the work."""
    paths = {name: path for name in ("output", "features", "folders")
             if (path := getattr(args, name)) is not None}
    for name, path in paths.items():
        is_file = not os.path.exists(path) or os.path.isfile(path)  # or will be
        if not os.path.basename(path.rstrip("/")) or (name != "folders" and not is_file):
            raise UserError(f"--{name} {path}: is no name of a file; choose another.")
        if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
            raise UserError(f"--{name} {path}: its folder is missing or not writable; choose "
                            "another.")
    if len({os.path.realpath(path) for path in paths.values()}) < len(paths):
        raise UserError(f"--output, --features and --folders must differ: {args.output}, "
                        f"{args.features}, {args.folders}; choose other names.")
    if args.copy and not args.folders:
        raise UserError("--copy: there are no --folders to copy into; name them, or leave it out.")
    if args.folders and os.path.exists(args.folders):
        raise UserError(f"--folders {args.folders}: is there already; choose a new folder.")


def fill_folders(folder, dataset, labels, unreadable, copy):
    """Link or copy every readable image to a new folder, as folder/CLUSTER/NAME. Raises UserError.

    Images in memory become PNG files. Of images with the same name in a cluster, all but the
    first have their index behind the name.
    """
    taken = set()
    try:
        os.mkdir(folder)
        for i, cluster in enumerate(labels.tolist()):
            if i in unreadable:
                continue
            source = Path(dataset.root, dataset.name_of(i)).absolute()
            name = source.name if dataset.pixels is None else f"{i}.png"
            target = Path(folder, str(cluster), name)
            while str(target).lower() in taken:  # some file systems ignore case
                target = target.with_stem(f"{target.stem}-{i}")
            taken.add(str(target).lower())
            target.parent.mkdir(exist_ok=True)
            if dataset.pixels is not None:
                dataset.load(i).save(target)
            elif copy:
                shutil.copyfile(source, target)
            else:
                target.symlink_to(source)
    except OSError as error:
        raise UserError(f"--folders {folder}: {error.strerror or error} ({error.filename}); make "
                        "room, or choose another folder.") from None


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    device = distributed.init(args.device)
    launch.catch_signals()
    train = None
    with distributed.raise_everywhere():
        state = load_run(args.checkpoint)
        dataset = open_dataset(args.data, args.split)
        if args.neighbours:
            train = open_training_images(state, args.train_data)
            failed = state["progress"]["failed"]  # their vectors are those of other images
            if args.neighbours > len(train) - len(failed):
                raise UserError(f"--neighbours {args.neighbours}: the run has only "
                                f"{len(train) - len(failed)} images.")
            vectors = load_vectors(args.checkpoint, len(train))
        check_outputs(args)
    check_same_images(dataset, *([train] if train else []))
    settings = state["settings"]
    if args.workers is None:
        args.workers = default_workers(dataset.pixels is not None)
    print_main(f"{len(dataset):,} images, {settings['num_clusters']:,} clusters after epoch "
               f"{state['progress']['epoch']} of a run on {settings['data']}")

    features = extract(load_network(state, device), dataset,
                       evaluation_transform(settings["image_size"]), settings["feature_dim"],
                       device, args.batch_size, args.workers)
    centroids = state["final_clusters"]["centroids"].to(device)
    labels = nearest_centroids(features, centroids)
    similarity = cosine_to_centroid(features, centroids, labels)
    labels, similarity, features = (
        distributed.all_gather_uneven_rows(part).cpu() for part in (labels, similarity, features))
    neighbours = None
    if train:
        rows = torch.arange(len(train))[distributed.shard(len(train))]
        rows = rows[~torch.isin(rows, torch.tensor(failed, dtype=torch.int64))]
        scores, found = nearest_neighbours(
            features.to(device), vectors[rows].to(device), rows, args.neighbours)
        neighbours = train, found.cpu(), scores.cpu()
    unreadable = set(gather_unreadable(dataset))
    with distributed.raise_everywhere():
        if distributed.is_main():
            export.save_table(args.output, dataset, labels, similarity, unreadable, neighbours)
            if args.features:
                export.save_array(args.features, features)
            if args.folders:
                fill_folders(args.folders, dataset, labels, unreadable, args.copy)
    if dataset.labels is not None:
        readable = [i for i in range(len(dataset)) if i not in unreadable]
        print_main(metrics.agreement(labels[readable], dataset.labels[readable])[1])
    print_main("Done:", *filter(None, (args.output, args.features, args.folders)))


if __name__ == "__main__":
    launch.run_program(main)
