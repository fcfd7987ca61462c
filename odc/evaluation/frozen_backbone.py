"""What the evaluation scripts share: their arguments, and a frozen backbone with two splits."""

import contextlib
import os
from dataclasses import dataclass

import torch

from odc import distributed
from odc.data import loader
from odc.data.datasets import check_same_images, open_dataset
from odc.data.images import ImageSet
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import tables
from odc.evaluation.weights import load_backbone
from odc.features import weights_fingerprint
from odc.model import ARCHS, ResNet, use_small_stem
from odc.runtime import launch
from odc.runtime.arguments import check_output, path, whole


def add_arguments(parser, batch_size=None):
    """Add what all scripts share, and --batch-size if it has a default; returns {name: group}."""
    groups = {name: parser.add_argument_group(name) for name in ("data", "network", "run")}
    add = groups["data"].add_argument
    add("--data", metavar="PATH", type=path,
        default="data/imagenet" if os.path.isdir("data/imagenet") else "shapes",
        help="folder with a train and a val split, in any known layout, or the word shapes")
    add("--image-size", metavar="PIXELS", type=whole(8, 4096), help="side of the images (default: "
        "that of the training, if the weights tell; else 224, or small images' own)")
    add("--workers", metavar="N", type=whole(0, 256), help="reading processes (default: up to 4)")
    add = groups["network"].add_argument
    add("--weights", metavar="FILE", type=path, required=True,
        help="backbone.pth, a checkpoint of this or another method, or the word random")
    add("--arch", choices=list(ARCHS), help="default: the weights', or resnet50 for random ones")
    add = groups["run"].add_argument
    add("--output", metavar="FILE", type=path, help="write the results to this file, as JSON")
    add("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    if batch_size:
        add("--batch-size", metavar="N", type=whole(1), default=batch_size, help="per process")
    return groups


@dataclass
class FrozenBackbone:
    """A backbone in eval mode on its device, and the two splits on which it is judged."""

    backbone: ResNet
    weights: str  # what was loaded, one line
    train: ImageSet
    val: ImageSet
    image_size: int
    workers: int
    device: torch.device

    def description(self):
        """What was judged on what, for the JSON file."""
        return dict(weights=self.weights, arch=self.backbone.arch,
                    small_stem=self.backbone.small_stem, image_size=self.image_size,
                    dataset=self.train.name, train_images=len(self.train), val_images=len(self.val),
                    classes=len(self.val.classes), processes=distributed.world_size())

    def label(self, args):  # of our row in a table
        return f"this run, {self.backbone.arch}, {os.path.relpath(args.weights)}"


def prepare(args, one_class=False):
    """Join the process group, open both splits and load the backbone -> FrozenBackbone.

    one_class: whether each image must have one. Raises UserError.
    """
    device = distributed.init(args.device)
    launch.catch_signals()
    with distributed.raise_everywhere():
        train, val = (open_dataset(args.data, split) for split in ("train", "val"))
        check_labels(args.data, train, val, one_class)
        if args.output:
            check_output("--output", args.output, tables.RESULT_START)
        in_memory = train.pixels is not None  # these are small
        size = args.image_size or trained_size(args.weights) or (
            train.typical_side() if in_memory else 224)
        backbone, description = load_backbone(args.weights, args.arch, size, args.seed)
        if backbone.small_stem and not use_small_stem(size):
            raise UserError(f"--image-size {size}: {args.weights} is for 64 pixels or less.")
    check_same_images(train, val)
    # Paths and workers may differ between machines. But all must write.
    own = dict.fromkeys(("data", "weights", "subset", "low_shot_targets", "workers"))
    arguments = vars(args) | own | {"output": bool(args.output)}
    if not distributed.same_everywhere((arguments, size, weights_fingerprint(backbone))):
        raise UserError("The processes have different arguments or weights; give all the same.")
    print_main(f"{description}\n{args.data}: {len(train):,} train, {len(val):,} val, {size} pixels")
    backbone = backbone.to(device, memory_format=torch.channels_last).requires_grad_(False)
    workers = loader.default_workers(in_memory) if args.workers is None else args.workers
    loader.check_shared_memory(workers, args.batch_size or 256, size)
    return FrozenBackbone(backbone, description, train, val, size, workers, device)


def trained_size(weights):
    """The side of the training images, from our backbone.pth or checkpoint.pth, or None."""
    with contextlib.suppress(Exception):  # other files do not tell
        if os.path.isfile(weights):
            content = torch.load(weights, map_location="cpu", weights_only=True)
            size = (content.get("settings") or content._metadata[""])["image_size"]
            return size if size in range(8, 4097) else None


def check_labels(data, train, val, one_class):
    if train.classes is None or train.classes != val.classes:
        raise UserError(f"{data}: both splits must have labels, of the same classes in one order; "
                        "give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE alone.")
    if one_class and train.labels is None:
        raise UserError(f"{train.name} has several classes an image: use eval_svm.py.")
