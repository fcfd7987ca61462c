"""Arguments and set-up that the evaluation scripts share: a frozen backbone, and two splits."""

import itertools
import os
from dataclasses import dataclass

import torch

from odc import distributed
from odc.data import loader
from odc.data.augmentation import evaluation_transform
from odc.data.images import ImageSet
from odc.data.datasets import check_same_images, open_dataset
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation.weights import load_backbone
from odc.features import cache_path, weights_fingerprint
from odc.model import ARCHS, ResNet
from odc.runtime import launch
from odc.runtime.arguments import whole

# The size at which sets of small images are used; all others are used at 224.
NATIVE_SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "mnist": 28,
                "stl10": 96}


def add_arguments(parser, batch_size=None):
    """Add the arguments of all evaluation scripts; returns the groups {"data", "network", "run"}.

    batch_size: the default of --batch-size, for scripts that use the features of an image once.
    They have --features-cache, too.
    """
    groups = {name: parser.add_argument_group(name) for name in ("data", "network", "run")}
    add = groups["data"].add_argument
    add("--data", metavar="PATH", help="folder with a train and a val split, in any known layout, "
        "or the word shapes (default: data/imagenet if it is there, else shapes)")
    add("--image-size", metavar="PIXELS", type=whole(8, 4096),
        help="side of the images (default: 224; for sets of small images their own)")
    add("--background", choices=["white", "black"], help="colour on which transparent images are "
        "laid (default: their transparency is dropped)")
    add("--workers", metavar="N", type=whole(0, 256), help="processes that read images, per "
        "process (default: up to 4; 0 for images in memory)")
    add = groups["network"].add_argument
    add("--weights", metavar="FILE", required=True,
        help="backbone.pth, a checkpoint of this or another method, or the word random")
    add("--arch", choices=list(ARCHS), metavar="ARCH", help=f"{', '.join(ARCHS)} (default: "
        "recognised from the weights; resnet50 for random)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="precision of the backbone: off, bf16 or fp16")
    add = groups["run"].add_argument
    add("--output", metavar="FILE", help="write the results to this file, as JSON")
    add("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    if batch_size is not None:
        add("--batch-size", metavar="N", type=whole(1, 65536), default=batch_size,
            help="images in a batch, per process")
        add("--features-cache", metavar="DIR", help="keep features here; used again while weights, "
            "data and transform are the same")
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
    unreadable: int = 0  # val images that cannot be read, as `readable` has counted them

    def autocast(self):
        """The context in which the backbone runs with the precision of --amp."""
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "off")

    def maps(self, images):
        """Normalised images [B, 3, S, S] -> the five maps, float32, without gradients."""
        with torch.no_grad(), self.autocast():
            maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return [feature_map.float() for feature_map in maps]

    @property
    def transform(self):
        """The validation transform of all recipes but VOC's."""
        return evaluation_transform(self.image_size)

    def cache(self, folder, dataset, transform, *kind):
        """The cache file of one split's features, or None without a folder. A collective.

        kind: what is made of the maps, and of which images.
        """
        if not folder:
            return None
        # One process looks at the files: a million of them take a while on a shared disk.
        stamp = torch.tensor(dataset.content_stamp() if distributed.is_main() else 0)
        return cache_path(
            folder, *kind, self.amp, self.fingerprint, dataset.fingerprint,
            int(distributed.broadcast(stamp)), transform.func.__name__,
            sorted(transform.keywords.items()))

    def readable(self):
        """The val images that could be read, [N] bool. Others do not count in the results.

        Prints how many these are, if that is new. Call it after the images were read. A collective.
        """
        mask = loader.readable(self.val)
        if (count := int((~mask).sum())) != self.unreadable:
            self.unreadable = count
            print_main(f"{self.unreadable} of {len(self.val):,} val images cannot be read; they "
                       "are left out")
        return mask

    def description(self):
        """What was judged on what, for the JSON file."""
        return dict(
            weights=self.weights, arch=self.backbone.arch, small_stem=self.backbone.small_stem,
            amp=self.amp, image_size=self.image_size, dataset=self.train.name,
            train_images=len(self.train), val_images=len(self.val),
            unreadable_val_images=self.unreadable, classes=len(self.val.classes),
            processes=distributed.world_size())

    def label(self, args):
        """The name of our row in a table."""
        amp = "" if self.amp == "off" else f", {self.amp}"
        return f"this run, {self.backbone.arch}, {args.weights}{amp}"


def prepare(args):
    """Join the process group, open both splits and load the backbone -> FrozenBackbone.

    Raises UserError for data without labels or without a val split, for unfit weights, and for
    processes that were not started alike.
    """
    device = distributed.init(args.device)
    launch.catch_signals()
    if args.amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a CUDA device; on the CPU use --amp bf16 or off.")
    data = args.data
    if data is None:
        data = "data/imagenet" if os.path.isdir("data/imagenet") else "shapes"
        print_main(f"No --data: evaluating on {data}.")
    with distributed.raise_everywhere():
        train, val = (open_dataset(data, split) for split in ("train", "val"))
        _check_labels(data, train, val)
        if output := args.output:
            if not os.path.basename(output) or (os.path.exists(output)
                                                and not os.path.isfile(output)):
                raise UserError(f"--output {output}: it must be a file; give a name such as "
                                "results.json.")
            if not os.access(os.path.dirname(os.path.abspath(output)), os.W_OK):
                raise UserError(f"--output {output}: its folder is missing or not writable; "
                                "choose another.")
        if cache := getattr(args, "features_cache", None):
            os.makedirs(cache, exist_ok=True)
        size = args.image_size or NATIVE_SIZES.get(train.name, 224)
        backbone, description = load_backbone(args.weights, args.arch, size, args.seed)
    check_same_images(train, val)
    # Paths and workers may differ between machines. But all must write, or read, together.
    arguments = vars(args) | dict.fromkeys(("data", "weights", "subset", "workers"))
    arguments |= {name: bool(arguments.get(name)) for name in ("output", "features_cache")}
    fingerprint = weights_fingerprint(backbone)
    if not distributed.same_everywhere((arguments, fingerprint)):
        raise UserError("The processes have different arguments or weights: start all machines "
                        "with the same command, and give them the same files.")
    print_main(description)
    backbone = backbone.to(device, memory_format=torch.channels_last).requires_grad_(False)
    workers = args.workers
    if workers is None:
        workers = loader.default_workers(train.pixels is not None)
    print_main(f"{train.name}: {len(train):,} train and {len(val):,} val images of "
               f"{len(val.classes)} classes, {size} pixels")
    return FrozenBackbone(backbone, fingerprint, description, train, val, size, workers, device,
                          args.amp)


def _check_labels(data, train, val):
    """Raise UserError if a split has no labels, or if the two have other classes."""
    for dataset in (train, val):
        if dataset.labels is None and dataset.targets is None:
            raise UserError(
                f"{dataset.root} has no labels, and an evaluation needs them: give a folder with "
                "train/CLASS/IMAGE and val/CLASS/IMAGE, of two classes or more and without images "
                "beside the class folders, or another known layout.")
    if train.classes != val.classes:
        pairs = enumerate(itertools.zip_longest(train.classes, val.classes, fillvalue="missing"))
        k, (in_train, in_val) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
        raise UserError(f"{data}: class {k} is {in_train!r} in the train split "
                        f"({len(train.classes)} classes) and {in_val!r} in the val split "
                        f"({len(val.classes)}); both must have the same classes in the same order.")
