"""What the three evaluation scripts begin with: arguments, a frozen backbone, and a labelled train and val set."""

import contextlib
import os
from dataclasses import dataclass

import torch

from odc.runtime import program
from odc import distributed
from odc.data import loader
from odc.runtime.arguments import whole
from odc.data.augmentation import evaluation_transform
from odc.data.images import ImageSet
from odc.data.layouts import check_same_images, open_dataset
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import cache_path, weights_fingerprint
from odc.model import ARCHS, ResNet
from odc.evaluation.weights import load_backbone

# The size at which sets of small images are used; all others are used at 224.
NATIVE_SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "stl10": 96}


def add_arguments(parser):
    """The arguments that all evaluation scripts share. Returns the groups {"data", "network", "run"} to add to."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", help="folder with a train and a val split, in any known layout, or the "
                      "word shapes (default: data/imagenet if it is there, else shapes)")
    data.add_argument("--image-size", metavar="PIXELS", type=whole(8, 4096), default=None,
                      help="side of the images (default: 224; for sets of small images their own)")
    data.add_argument("--workers", metavar="N", type=whole(0, 256), default=None,
                      help="processes that read images, per process (default: up to 4; 0 for images in memory)")
    network = parser.add_argument_group("network")
    network.add_argument("--weights", metavar="FILE", required=True,
                         help="backbone.pth, a checkpoint of this or another method, or the word random")
    network.add_argument("--arch", choices=list(ARCHS), metavar="ARCH",
                         help=f"{', '.join(ARCHS)} (default: recognised from the weights; resnet50 for random)")
    network.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off",
                         help="precision of the frozen backbone: off, bf16 or fp16")
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="FILE", help="write the results to this file, as JSON")
    run.add_argument("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    return {"data": data, "network": network, "run": run}


def add_features_cache(group):
    """The argument of the scripts that use each image's features once."""
    group.add_argument("--features-cache", metavar="DIR", help="keep features here; used again while weights, data and "
                       "transform are the same")


@dataclass
class Frozen:
    """A backbone in eval mode on its device, and the two splits on which it is judged."""

    backbone: ResNet
    weights: str  # what was loaded, one line
    train: ImageSet
    val: ImageSet
    image_size: int
    workers: int
    device: torch.device
    amp: str

    def maps(self, images):
        """Normalised images [B, 3, S, S] -> the five maps, float32, without gradients."""
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        autocast = torch.autocast(self.device.type, dtype=dtype) if self.amp != "off" else contextlib.nullcontext()
        with torch.no_grad(), autocast:
            return [m.float() for m in self.backbone(images.contiguous(memory_format=torch.channels_last))]

    @property
    def transform(self):
        """The validation transform of all recipes but VOC's."""
        return evaluation_transform(self.image_size)

    def cache(self, folder, dataset, transform, *kind):
        """The cache file for one split's features under a transform, or None without a folder. A collective.

        kind: what is made of the maps, and of which images, as far as the arguments of `Frozen` do not say it.
        """
        if not folder:
            return None
        # One look at the files by one process: on a shared disk, a million of them take a while.
        stamp = torch.tensor(dataset.content_stamp() if distributed.is_main() else 0)
        return cache_path(folder, *kind, self.amp, weights_fingerprint(self.backbone), os.path.realpath(dataset.root),
                     dataset.fingerprint, int(distributed.broadcast(stamp)), transform.func.__name__,
                     sorted(transform.keywords.items()))

    def description(self):
        """What was judged on what, for the JSON file."""
        return dict(
            weights=self.weights, arch=self.backbone.arch, small_stem=self.backbone.small_stem, amp=self.amp,
            image_size=self.image_size, dataset=self.train.name, train_images=len(self.train),
            val_images=len(self.val), classes=len(self.val.classes), processes=distributed.world_size(),
        )

    def label(self, args):
        """Our row's name in a table."""
        amp = "" if self.amp == "off" else f", {self.amp}"
        return f"this run, {self.backbone.arch}, {args.weights}{amp}"


def prepare(args):
    """Open the two splits and load the backbone that the arguments name; joins the process group.

    Returns Frozen. Raises UserError for data without labels or without a val split, for unfit weights, and for processes
    that were not started alike.
    """
    device = distributed.init(args.device)
    program.catch_signals()
    if args.amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a CUDA device; on the CPU use --amp bf16 or off.")
    data = args.data
    if data is None:
        data = "data/imagenet" if os.path.isdir("data/imagenet") else "shapes"
        print_main(f"No --data: evaluating on {data}.")
    with distributed.together():
        train, val = open_dataset(data, "train"), open_dataset(data, "val")
        for opened in (train, val):
            if opened.labels is None and opened.targets is None:
                raise UserError(f"{opened.root} has no labels, and an evaluation needs them: give a folder with "
                                "train/CLASS/IMAGE and val/CLASS/IMAGE, of two classes or more and without images beside "
                                "the class folders, or another known layout.")
        if train.classes != val.classes:
            raise UserError(f"{data}: {_difference(train.classes, val.classes)}; both splits must have the same classes, in "
                            "the same order.")
        if args.output and (os.path.isdir(args.output) or not os.path.basename(args.output)):
            raise UserError(f"--output {args.output}: it must be a file, not a folder; add a name such as results.json.")
        if args.output and not os.access(os.path.dirname(os.path.abspath(args.output)), os.W_OK):
            raise UserError(f"--output {args.output}: its folder is missing or not writable; choose another.")
        size = args.image_size or NATIVE_SIZES.get(train.name, 224)
        backbone, description = load_backbone(args.weights, args.arch, size, args.seed)
    check_same_images(train, val)
    arguments = {k: v for k, v in vars(args).items() if k not in ("data", "weights", "output", "workers", "features_cache")}
    # Paths may differ between machines, but not whether there is one: all write, or read, together.
    arguments |= {k: bool(getattr(args, k, None)) for k in ("output", "features_cache")}
    if not distributed.same_everywhere((arguments, weights_fingerprint(backbone))):
        raise UserError("The processes have different arguments or weights: start all machines with the same command, and "
                        "give them the same files.")
    print_main(description)
    backbone = backbone.to(device, memory_format=torch.channels_last).requires_grad_(False)
    workers = args.workers if args.workers is not None else loader.default_workers(train.pixels is not None)
    print_main(f"{train.name}: {len(train):,} train and {len(val):,} val images of {len(val.classes)} classes, "
               f"{size} pixels")
    return Frozen(backbone, description, train, val, size, workers, device, args.amp)


def _difference(train, val):
    """How two lists of class names differ, in a few words."""
    for only, split in ((sorted(set(train) - set(val)), "train"), (sorted(set(val) - set(train)), "val")):
        if only:
            return f"the train split has {len(train)} classes and the val split has {len(val)}, {only[0]!r} only {split}"
    first, second = next((a, b) for a, b in zip(train, val) if a != b)
    return f"the train split has class {first!r} where the val split has {second!r}"
