"""Clusters for new images: which cluster of a finished run each image belongs to, and the training images it resembles.

    python -m odc.assign --checkpoint out/checkpoint.pth --data FOLDER --output clusters.csv --neighbours 5
"""

import csv
import os

import torch
import torch.nn.functional as F

from odc.runtime import program
from odc import distributed
from odc.runtime import checkpoint
from odc.data import loader
from odc.runtime.arguments import Parser, whole
from odc.data.augmentation import evaluation_transform
from odc.runtime.checkpoint import write_atomically
from odc.data.layouts import check_same_images, open_dataset
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import extract
from odc.evaluation.knn import nearest_neighbours
from odc.model import Neck, ResNet
from odc.nearest import assign


def make_parser():
    parser = Parser("Find the cluster of every image in a folder, by the network and the centroids of a run.")
    group = parser.add_argument_group("what")
    group.add_argument("--checkpoint", metavar="FILE", required=True, help="checkpoint.pth of train.py")
    group.add_argument("--data", metavar="PATH", required=True, help="folder of images, in any known layout, or the "
                       "word shapes")
    group.add_argument("--split", choices=["train", "val"], default="train", help="which one, of data with several")
    group.add_argument("--output", metavar="FILE", default="clusters.csv", help="the table to write")
    neighbours = parser.add_argument_group("nearest training images")
    neighbours.add_argument("--neighbours", metavar="N", type=whole(0, 1000), default=0, help="how many to name")
    neighbours.add_argument("--train-data", metavar="PATH", help="the images of the run (default: where they were)")
    run = parser.add_argument_group("run")
    run.add_argument("--batch-size", metavar="N", type=whole(1, 65536), default=128, help="images in a batch")
    run.add_argument("--workers", metavar="N", type=whole(0, 256), default=None,
                     help="processes that read images, per process (default: up to 4; 0 for images in memory)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    return parser


def load_run(path):
    """The checkpoint of a run, a dict. Raises UserError for a file that is missing or is none."""
    if not os.path.isfile(path):
        raise UserError(f"--checkpoint {path}: there is no such file; give the checkpoint.pth that train.py wrote.")
    state = checkpoint.load(path)
    if state.get("program") != "odc train":
        raise UserError(f"--checkpoint {path}: is not a checkpoint of train.py.")
    return state


def load_network(state, device):
    """Backbone and neck of a run, in eval mode: normalised images [B, 3, S, S] -> unit features [B, d]."""
    backbone = ResNet(state["arch"], state["small_stem"])
    backbone.load_state_dict(state["backbone"])
    neck = Neck(backbone.out_channels[-1], dim=state["settings"]["feature_dim"])
    neck.load_state_dict(state["neck"])
    backbone, neck = backbone.to(device, memory_format=torch.channels_last).eval(), neck.to(device).eval()
    return lambda images: F.normalize(neck(backbone(images)[-1]))


def open_training_images(state, path=None):
    """The ImageSet of a run, for its names. path: where it is now. Raises UserError if these are other images."""
    path = path or state["settings"]["data"]
    try:
        dataset = open_dataset(path, "train")
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; give the run's images with --train-data.") from None
    if dataset.fingerprint != state["data"]["fingerprint"]:
        raise UserError(f"{path} holds other images than the run was trained on, names or order differ: give the run's "
                        "images with --train-data.")
    return dataset


def write_table(path, dataset, unreadable, labels, similarity, neighbours=None, neighbour_similarity=None, train=None):
    """The CSV file: path, cluster, similarity [, neighbour_1, similarity_1, ...]; main process only.

    An unreadable image has an empty cluster. labels, similarity: [Q]. neighbours: indices of images of `train` [Q, n],
    and their similarities.
    """

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            count = 0 if neighbours is None else neighbours.shape[1]
            writer.writerow(["path", "cluster", "similarity",
                             *(name for n in range(count) for name in (f"neighbour_{n + 1}", f"similarity_{n + 1}"))])
            for i in range(len(dataset)):
                row = [dataset.name_of(i)]
                if i in unreadable:
                    row += [""] * (2 + 2 * count)
                else:
                    row += [int(labels[i]), f"{float(similarity[i]):.4f}"]
                    for n in range(count):
                        row += [train.name_of(neighbours[i, n]), f"{float(neighbour_similarity[i, n]):.4f}"]
                writer.writerow(row)

    write_atomically(path, write)


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    device = distributed.init(args.device)
    program.catch_signals()
    train = None
    with distributed.together():
        state = load_run(args.checkpoint)
        dataset = open_dataset(args.data, args.split)
        if args.neighbours:
            train = open_training_images(state, args.train_data)
            if args.neighbours > len(train):
                raise UserError(f"--neighbours {args.neighbours}: the run has only {len(train)} images.")
        if not os.access(os.path.dirname(os.path.abspath(args.output)), os.W_OK):
            raise UserError(f"--output {args.output}: its folder is missing or not writable; choose another.")
    check_same_images(dataset, *([train] if train else []))
    settings, workers = state["settings"], args.workers
    if workers is None:
        workers = loader.default_workers(dataset.pixels is not None)
    print_main(f"{len(dataset):,} images, {settings['num_clusters']:,} clusters after epoch {state['epoch']} of a run "
               f"on {settings['data']}")

    features = extract(load_network(state, device), dataset, evaluation_transform(settings["image_size"]),
                       settings["feature_dim"], device, args.batch_size, workers).to(device)
    centroids = state["memory"]["centroids"].to(device)
    labels = assign(features, centroids, inner_product=True)  # as the run labels its images, see odc.memory
    similarity = torch.cat([F.cosine_similarity(part, centroids[own])
                            for part, own in zip(features.split(65536), labels.split(65536))])
    found = None, None
    if args.neighbours:
        rows = distributed.shard(len(train))
        bank = F.normalize(state["memory"]["features"][rows].float()).to(device)
        found = nearest_neighbours(features, bank, torch.arange(len(train))[rows], args.neighbours)
    unreadable = set(distributed.all_gather_uneven_rows(torch.tensor(list(dataset.unreadable), dtype=torch.int64)).tolist())
    with distributed.together():
        if distributed.is_main():
            write_table(args.output, dataset, unreadable, labels, similarity, found[1], found[0], train)
    print_main(f"Done: {args.output}")


if __name__ == "__main__":
    program.run_program(main)
