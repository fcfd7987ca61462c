"""Arguments and set-up that the evaluation scripts share: a frozen backbone, and two splits."""

import contextlib
import itertools
import os
from dataclasses import dataclass

import torch

from odc import distributed
from odc.data import loader
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import check_same_images, open_dataset
from odc.data.images import ImageSet
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import tables
from odc.evaluation.weights import load_backbone
from odc.features import weights_fingerprint
from odc.model import ARCHS, ResNet, use_small_stem
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import check_output, path, whole


def add_arguments(parser, batch_size=None):
    """Add the arguments of all evaluation scripts; returns the groups {"data", "network", "run"}.

    batch_size: the default of --batch-size, for scripts that use the features of an image once.
    """
    groups = {name: parser.add_argument_group(name) for name in ("data", "network", "run")}
    add = groups["data"].add_argument
    add("--data", metavar="PATH", type=path, help="folder with a train and a val split, in any "
        "known layout, or the word shapes (default: data/imagenet if it is there, else shapes)")
    add("--image-size", metavar="PIXELS", type=whole(8, 4096), help="side of the images (default: "
        "that of the training, if the weights tell; else 224, or small images' own)")
    add("--workers", metavar="N", type=whole(0, 256), help="processes that read images, per "
        "process (default: up to 4; 0 for images in memory)")
    add = groups["network"].add_argument
    add("--weights", metavar="FILE", type=path, required=True,
        help="backbone.pth, a checkpoint of this or another method, or the word random")
    add("--arch", choices=list(ARCHS), metavar="ARCH", help=f"{', '.join(ARCHS)} (default: "
        "recognised from the weights; resnet50 for random)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="precision of the backbone")
    add = groups["run"].add_argument
    add("--output", metavar="FILE", type=path, help="write the results to this file, as JSON")
    add("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    if batch_size is not None:
        add("--batch-size", metavar="N", type=whole(1, 65536), default=batch_size,
            help="images in a batch, per process")
    return groups


@dataclass
class FrozenBackbone:
    """A backbone in eval mode on its device, and the two splits on which it is judged."""

    backbone: ResNet
    fingerprint: str  # of the weights that were loaded; fine-tuning changes the backbone's
    weights: str  # what was loaded, one line
    train: ImageSet
    val: ImageSet
    image_size: int
    workers: int
    device: torch.device
    amp: str

    def maps(self, images):
        """Normalised images [B, 3, S, S] -> the five maps, float32; gradients in fine-tuning alone.
        """
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.amp != "off"):
            maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return [feature_map.float() for feature_map in maps]

    @property
    def transform(self):
        """The validation transform of all recipes but VOC's."""
        return evaluation_transform(self.image_size)

    def description(self):
        """What was judged on what, for the JSON file."""
        return dict(
            weights=self.weights, arch=self.backbone.arch, small_stem=self.backbone.small_stem,
            amp=self.amp, image_size=self.image_size, dataset=self.train.name,
            train_images=len(self.train), val_images=len(self.val), classes=len(self.val.classes),
            processes=distributed.world_size())

    def label(self, args):
        """The name of our row in a table."""
        amp = "" if self.amp == "off" else f", {self.amp}"
        return f"this run, {self.backbone.arch}, {os.path.relpath(args.weights)}{amp}"


def prepare(args, one_class=False):
    """Join the process group, open both splits and load the backbone -> FrozenBackbone.

    one_class: each image must have one. Raises UserError for data without such labels or without a
    val split, for unfit weights, and for processes that were not started alike.
    """
    device = distributed.init(args.device)
    launch.catch_signals()
    if args.amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a CUDA device; on the CPU use --amp bf16 or off.")
    data = args.data or ("data/imagenet" if os.path.isdir("data/imagenet") else "shapes")
    with distributed.raise_everywhere():
        train, val = (open_dataset(data, split) for split in ("train", "val"))
        _check_labels(data, train, val, one_class)
        if args.output:
            check_output("--output", args.output, tables.RESULT_START)
        native = 224 if train.pixels is None else train.typical_side()  # those are small images
        size = args.image_size or trained_size(args.weights) or native
        backbone, description = load_backbone(args.weights, args.arch, size, args.seed)
        if backbone.small_stem and not use_small_stem(size):
            raise UserError(f"--image-size {size}: the stem of {args.weights} is for images of up "
                            "to 64 pixels; give the size of its training images.")
    check_same_images(train, val)
    # Paths and workers may differ between machines. But all must write, or read, together.
    arguments = vars(args) | dict.fromkeys(("data", "weights", "subset", "workers"))
    arguments["output"] = bool(args.output)
    fingerprint = weights_fingerprint(backbone)
    if not distributed.same_everywhere((arguments, size, fingerprint)):
        raise UserError("The processes have different arguments or weights: start all machines "
                        "with the same command, and give them the same files.")
    print_main(description)
    backbone = backbone.to(device, memory_format=torch.channels_last).requires_grad_(False)
    in_memory = train.pixels is not None
    workers = loader.default_workers(in_memory) if args.workers is None else args.workers
    print_main(f"{data}: {len(train):,} train and {len(val):,} val images of {len(val.classes)} "
               f"classes, {size} pixels")
    return FrozenBackbone(backbone, fingerprint, description, train, val, size, workers, device,
                          args.amp)


def trained_size(weights):
    """The side of the training images, from our backbone.pth or checkpoint.pth, or None."""
    with contextlib.suppress(Exception):  # whether a file is fit at all, `load_backbone` says
        content = torch.load(weights, map_location="cpu", weights_only=True,
                             mmap=checkpoint.can_be_mapped(weights))
        return int((content.get("settings") or content._metadata[""])["image_size"])


def _check_labels(data, train, val, one_class):
    """Raise UserError if a split has no labels, or if the two have other classes."""
    for dataset in (train, val):
        if dataset.labels is None and dataset.targets is None:
            raise UserError(
                f"{dataset.root} has no labels, and an evaluation needs them: give a folder with "
                "train/CLASS/IMAGE and val/CLASS/IMAGE alone, or another known layout.")
    if one_class and train.labels is None:
        raise UserError(f"{train.name} has several classes an image: use eval_svm.py.")
    pairs = enumerate(itertools.zip_longest(train.classes, val.classes, fillvalue="missing"))
    for k, (in_train, in_val) in pairs:
        if in_train != in_val:
            raise UserError(f"{data}: class {k} is {in_train!r} in the train split and {in_val!r} "
                            "in the val split; both must have the same classes in one order.")
