"""The settings of a training run: arguments, the three presets, and what cannot work.

A setting that is not given comes from the checkpoint of the run that goes on, else from a preset:
    recipe   the published odc_resnet50_8xb64-steplr-440e_in1k; for 200,000 images or more
    small    for fewer images; size of images, clusters and epochs follow from the images
    demo     for the drawn shapes, which are there without any data
"""

import importlib.util
import os
import time

import torch

from odc import distributed
from odc.data.augmentation import AUGMENTATIONS
from odc.data.loader import check_shared_memory, default_workers
from odc.distributed import print_main
from odc.errors import UserError
from odc.model import ARCHS, ODC, use_small_stem
from odc.runtime.arguments import Parser, number, path, whole
from odc.runtime.checkpoint import check_same_settings

SMALL_SET = 200_000  # fewer images than this: preset small
HALF_HOUR = 1500  # seconds in the network; to read and augment takes the rest

RECIPE = dict(
    image_size=224, augmentation="recipe", crops=1, arch="resnet50", neck="recipe", amp="off",
    num_clusters=10000, min_cluster_size=20, memory_momentum=0.5, centroids_interval=10, seed=0,
    reweight_power=0.5, initial="network", recluster_interval=0, epochs=440,
    batch_size=512, lr=0.06, weight_decay=1e-5, checkpoint_interval=1000)
# Chosen in trials, see tests/benchmarks/learning/README.md. `_follow_images` sets what is missing.
SMALL = RECIPE | dict(
    augmentation=None, crops=None, neck="plain", memory_momentum=0.1, batch_size=64,
    image_size=None, arch=None, num_clusters=None, min_cluster_size=None, lr=None, initial=None,
    epochs=None, recluster_interval=None)
# Chosen without labels, by the agreement of the clusters of several seeds; the neck is small's.
DEMO = RECIPE | dict(arch="narrow", image_size=32, num_clusters=60, augmentation="demo", epochs=20,
                     batch_size=64, checkpoint_interval=100, neck="plain")
PRESETS = {"recipe": RECIPE, "small": SMALL, "demo": DEMO}

MAY_DIFFER = {"data", "output", "workers", "device", "tensorboard", "epochs",
              "checkpoint_interval"}  # when a run is continued


def make_parser():
    parser = Parser(
        "Online Deep Clustering: learn a ResNet from images without labels. A setting that is not "
        f"given is that of --preset: recipe for {SMALL_SET:,} images or more, small for fewer, "
        "demo for the drawn shapes. Here are all three; - follows from the images.")

    def group(title):
        add = parser.add_argument_group(title).add_argument

        def argument(flag, help="", **options):
            if (name := flag[2:].replace("-", "_")) in RECIPE:
                values = [_text(PRESETS[preset][name]) for preset in ("recipe", "small", "demo")]
                values = values[:1] if len(set(values)) == 1 else values
                help += f" ({' | '.join(values)})"
            add(flag, help=help, **options)
        return argument
    add = group("data")
    add("--data", metavar="PATH", type=path, help="folder of images, or the word shapes (default: "
        "data/imagenet if it exists, else shapes)")
    add("--output", metavar="DIR", type=path, default="out", help="the run's folder, where it "
        "also continues")
    add("--preset", choices=list(PRESETS), help="where settings come from that are not given")
    add("--image-size", metavar="PIXELS", type=whole(8, 4096), help="side of a crop")
    add("--augmentation", choices=list(AUGMENTATIONS), help="random crops and colours")
    add("--crops", metavar="C", type=whole(1), help="crops of each image in a batch; the samples "
        "memory takes their mean")
    add("--workers", metavar="N", type=whole(0, 256), help="processes that read images, per "
        "training process (default: up to 4; 0 in memory, or on one core)")
    add = group("network")
    add("--arch", choices=list(ARCHS), help="backbone; narrow is for small images")
    add("--neck", choices=["recipe", "plain"], help="plain: without dropout and last ReLU; k-means "
        "is of the backbone's features instead of the neck's")
    add("--pretrained", metavar="FILE", type=lambda text: text if text in ARCHS else path(text),
        help="start from this backbone, or from torchvision's by its name, such as resnet18")
    add = group("clusters and memories")
    add("--num-clusters", metavar="K", type=whole(1), help="number of clusters")
    add("--min-cluster-size", metavar="N", type=whole(0), help="smaller ones are dissolved")
    add("--memory-momentum", metavar="M", type=number(0, 1), help="share of the new feature; 0: "
        "only k-means moves the labels")
    add("--centroids-interval", metavar="STEPS", type=whole(1), help="between their updates")
    add("--reweight-power", metavar="P", type=number(0, 4),
        help="a cluster's loss weight is its size to the power of -P")
    add("--initial", choices=["network", "pixels", "backbone"],
        help="features of the initial k-means; backbone: without the neck. Labels of backbone "
        "stay for one --recluster-interval; those of pixels, too, or until the network's clusters "
        "are more stable")
    add("--recluster-interval", metavar="EPOCHS", type=whole(0), help="epochs between two times "
        "that both memories start anew from all images; 0: never")
    add = group("optimisation")
    add("--epochs", metavar="N", type=whole(0, 10**6), help="epochs in all; 0: the backbone of "
        "--pretrained, or the run in --output, only clusters the images")
    add("--batch-size", metavar="N", type=whole(2, 10**6), help="of all processes together")
    add("--lr", metavar="LR", type=number(0, 1e6),
        help="learning rate; x 0.4 after 10/11 of the epochs")
    add("--weight-decay", metavar="WD", type=number(0, 1e3), help="of all parameters")
    add = group("run")
    add("--seed", metavar="N", type=whole(0), help="decides everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    add("--amp", choices=["off", "bf16", "fp16"], help="mixed precision")
    add("--checkpoint-interval", metavar="STEPS", type=whole(1),
        help="steps between two checkpoints within an epoch")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    return parser


def _text(value):
    """A setting as it is written on a command line; - for one that follows from the images."""
    return "-" if value is None else str(value)


def parse(arguments=None):
    """The arguments; a setting of the presets that was not given is None."""
    args = make_parser().parse_args(arguments)
    if args.data is None:
        args.data = path("data/imagenet") if os.path.isdir("data/imagenet") else "shapes"
    return args


def resolve_defaults(args, dataset, saved, device, pretrained=None):
    """Set what was not given. A collective. Raises UserError if arguments or checkpoints differ."""
    own = {"data", "output", "workers"}  # may differ between machines
    for what, value in (("arguments", {k: v for k, v in vars(args).items() if k not in own}),
                        ("checkpoints", saved and (saved["progress"], saved["log_position"]))):
        if not distributed.same_everywhere(value):
            raise UserError(f"The processes have different {what}: start all machines with the "
                            "same command, and an --output that they share.")
    if args.workers is None:
        args.workers = default_workers(dataset.pixels is not None)
    if saved:
        return _fill(args, saved["settings"])
    small = "small" if len(dataset) < SMALL_SET else "recipe"
    args.preset = args.preset or ("demo" if args.data == "shapes" else small)
    given = [f"--{name.replace('_', '-')} {_text(value)}" for name in RECIPE
             if (value := getattr(args, name)) is not None]
    if pretrained is not None:
        args.arch = pretrained.arch
    _fill(args, PRESETS[args.preset])
    print_main(f"{len(dataset):,} images, preset {args.preset}"
               + (f", but {' '.join(given)}" if given else ""))
    if args.preset == "small":
        _follow_images(args, dataset, device, pretrained)
    if has_small_stem(args, pretrained) and not use_small_stem(args.image_size):
        raise UserError(f"--image-size {args.image_size}: {args.pretrained} is for at most 64.")


def has_small_stem(args, pretrained):
    """Whether a new run's network has the stem for small images: as the ResNet of --pretrained."""
    return use_small_stem(args.image_size) if pretrained is None else pretrained.small_stem


def _fill(args, values):
    """Set what was not given."""
    vars(args).update((k, v) for k, v in values.items() if getattr(args, k) is None)


def _follow_images(args, dataset, device, pretrained):
    """The formulas of preset small: image size, clusters, learning rate, epochs and interval."""
    N, on_cpu = len(dataset), device.type == "cpu"
    # Process 0's: another machine may fail to read one of the files that are measured.
    side = int(distributed.broadcast(torch.tensor(dataset.typical_side())))
    if pretrained is None or pretrained.small_stem:
        side = max(24, min(side, 64 if on_cpu or pretrained else 224)) // 4 * 4
    else:
        side = 224  # small images, too: they were clustered better so
    ratio = 1.0  # of photographs; 1.7 of letters
    if args.augmentation is None and args.epochs != 0:
        ratio = float(distributed.broadcast(torch.tensor(dataset.mirror_ratio())))
    if ratio > 1.1:
        print_main(f"Crops are not mirrored, as mirror images lie {ratio:.1f} times as far from "
                   "the nearest other image as the images do.")
    _fill(args, dict(augmentation="small" if ratio <= 1.1 else "unmirrored"))
    _fill(args, dict(image_size=side, num_clusters=max(2, min(1000, N // 40)),
                     lr=0.06 if pretrained is None else 0.006,  # with 0.06 it would forget
                     initial="pixels" if pretrained is None else "backbone"))
    _fill(args, dict(arch="narrow" if args.image_size <= 64 and on_cpu else "resnet18",
                     min_cluster_size=max(1, N // args.num_clusters // 8),  # 1/8 of the mean
                     # So each image is drawn about once or more between two clusterings.
                     crops=4 if N <= 15_000 else 2 if N <= 30_000 else 1))
    if args.epochs is None:
        rate = images_per_second(args, device, has_small_stem(args, pretrained))
        work = N * (1 + 0.4 * min(1, N / 60_000))  # with clusterings, each 0.4 of an epoch
        args.epochs = max(10, min(200, int(HALF_HOUR * rate / work)))
        print_main(f"{args.epochs} epochs, for about half an hour (10 to 200).")
    every = max(1, min(round(60_000 / N), (args.epochs or 4) // 4))  # 60,000 images in between
    _fill(args, dict(recluster_interval=every))
    if N < 1000 and pretrained is None:
        print_main("With fewer than 1,000 images a pre-trained backbone gives better clusters: "
                   "--pretrained resnet18 --epochs 0.")


def images_per_second(args, device, small_stem):
    """How many images all processes together learn in a second, apart from reading them."""
    W = distributed.world_size()
    B = max(2, args.batch_size // W)
    network = ODC(args.arch, small_stem, num_clusters=args.num_clusters)
    network.to(device, memory_format=torch.channels_last)
    images = torch.randn(B, 3, args.image_size, args.image_size, device=device)
    for step in range(6):
        if step == 2:  # warm
            began = time.monotonic()
        network(images)[1].square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = distributed.all_reduce(torch.tensor(time.monotonic() - began)) / W
    return 4 * W * B / float(seconds)


def validate(args, dataset, saved, device):
    """Raise UserError for what cannot work, and what cannot continue the checkpoint `saved`."""
    N, W = len(dataset), distributed.world_size()
    needed = args.num_clusters * max(1, args.min_cluster_size)
    if needed > N:
        raise UserError(f"--num-clusters {args.num_clusters} with --min-cluster-size "
                        f"{args.min_cluster_size} need {needed} images, and {args.data} has {N}; "
                        "lower one of them.")
    if args.batch_size % (W * args.crops) or args.batch_size < 2 * W:
        raise UserError(f"--batch-size {args.batch_size}: choose a multiple of {W} processes x "
                        f"{args.crops} crops, of at least 2 a process.")
    largest = args.image_size * (2 if args.preset == "small" and not args.pretrained else 1)
    check_shared_memory(args.workers, args.batch_size, largest)
    if args.epochs == 0 and not args.pretrained and not saved:
        raise UserError("--epochs 0 clusters by a network that has learned: give --pretrained, "
                        "such as resnet18, or the --output of a run.")
    if args.amp == "fp16" and device.type == "cpu" and args.epochs:
        raise UserError("--amp fp16 needs a CUDA device; a CPU takes --amp bf16 or off.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install tensorboard.")
    if not saved:
        return
    before, now = ({"--" + name.replace("_", "-"): value for name, value in settings.items()
                    if name not in MAY_DIFFER} for settings in (saved["settings"], vars(args)))
    check_same_settings(args.output, before, now)
    if saved["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{args.output} holds a run on other images than the {N} of {args.data} "
                        "(number, names, order or labels differ): restore the images, or choose "
                        "another --output.")
