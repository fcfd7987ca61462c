"""The settings of a training run: arguments, settings that follow the data, and what cannot work.

The defaults of the arguments are the recipe odc_resnet50_8xb64-steplr-440e_in1k. They suit a
million images. For a smaller set, `follow_data` replaces those that the user did not give.
"""

import argparse
import importlib.util
import os

import torch

from odc import distributed
from odc.data.loader import default_workers
from odc.distributed import print_main
from odc.errors import UserError
from odc.model import ARCHS
from odc.products import coarse_dtype
from odc.runtime.arguments import Parser, number, whole
from odc.runtime.checkpoint import check_same_settings

# The demonstration (--data shapes): a small network, and settings for 5,000 small images. They were
# chosen without labels, by the agreement of the clusters of several seeds.
DEMO = dict(arch="narrow", image_size=32, epochs=20, batch_size=32, lr=0.06, lr_steps=[16],
            num_clusters=60, crop_scale=0.5, save_interval=0, checkpoint_interval=100,
            knn_interval=5)

SMALL_SET = 200_000  # fewer images than this: settings that follow the data

# Settings of one start, which a continued run does not take from its checkpoint.
PER_START = {"data", "output", "workers", "device", "compile", "tensorboard", "export_only"}
# Settings that may differ when a run is continued.
MAY_DIFFER = PER_START | {"epochs", "batch_size", "log_interval", "save_interval",
                          "checkpoint_interval", "gallery_interval", "knn_interval"}


def make_parser():
    parser = Parser("Online Deep Clustering: learn a ResNet from images without labels.")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="folder of images, in any known layout, or the word shapes "
        "(default: data/imagenet if it exists, else shapes)")
    add("--output", metavar="DIR", default="out", help="where the run writes, and continues from")
    add("--recipe", action="store_true", help="the published settings, also for fewer than "
        f"{SMALL_SET:,} images, whose settings follow from the images otherwise")
    add("--image-size", metavar="PIXELS", type=whole(8, 4096), default=224, help="side of a crop")
    add("--crop-scale", metavar="SHARE", type=number(0, 1, above=True), default=0.08,
        help="smallest share of an image that a crop covers")
    add("--jitter", metavar=("B", "C", "S", "H"), type=number(0, 10), nargs=4,
        default=[0.4, 0.4, 1.0, 0.5], help="brightness, contrast, saturation and hue jitter")
    add("--background", choices=["white", "black"], help="lay transparent images on it; otherwise "
        "their transparency is dropped, as torchvision does")
    add("--workers", metavar="N", type=whole(0, 256), help="processes that read images, per "
        "training process (default: up to 4; 0 for images in memory)")

    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=list(ARCHS), default="resnet50", help="backbone; narrow: small images")
    add("--neck-norm", choices=["synchronised", "local"], default="synchronised",
        help="the neck's batch norm on GPUs: over the images of all processes, or of each one")
    add("--feature-dim", metavar="D", type=whole(1, 65536), default=256, help="width of a feature")
    add("--weights", metavar="FILE", help="start from this pre-trained backbone")

    add = parser.add_argument_group("clusters and memories").add_argument
    add("--num-clusters", metavar="K", type=whole(1), default=10000, help="number of clusters")
    add("--min-cluster-size", metavar="N", type=whole(0), default=20,
        help="smaller clusters are dissolved and refilled")
    add("--memory-momentum", metavar="M", type=number(0, 1), default=0.5,
        help="share of the new feature in the samples memory")
    add("--centroids-interval", metavar="STEPS", type=whole(1), default=10,
        help="steps between two updates of the centroids memory")
    add("--reweight-power", metavar="P", type=number(0, 4), default=0.5,
        help="a cluster's loss weight is its size to the power of -P")
    add("--kmeans-iterations", metavar="N", type=whole(1), default=20,
        help="iterations of the initial k-means")
    add("--initial", choices=["network", "pixels"], default="network",
        help="features of the initial k-means: of the network as it starts, or the pixels")
    add("--recluster-interval", metavar="EPOCHS", type=whole(0), default=0, help="epochs between "
        "two times that both memories are made again from all images, and k-means continues; "
        "0: only after --offline-epochs")
    add("--offline-epochs", metavar="EPOCHS", type=whole(0), default=0,
        help="first epochs, in which only k-means moves the labels")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", metavar="N", type=whole(1, 10**6), default=440, help="epochs in all")
    add("--batch-size", metavar="N", type=whole(2, 65536), default=64,
        help="images in a batch, per process")
    add("--lr", metavar="LR", type=number(0, 1e6), default=0.06, help="learning rate")
    add("--lr-schedule", choices=["step", "cosine"], default="step", help="cosine: down to 0")
    add("--lr-steps", metavar="EPOCH", type=whole(1), nargs="*", default=[400],
        help="epochs at which the learning rate drops")
    add("--lr-gamma", metavar="G", type=number(0, 1), default=0.4, help="what it drops by")
    add("--weight-decay", metavar="WD", type=number(0, 1e3), default=1e-5, help="of all parameters")

    add = parser.add_argument_group("run").add_argument
    add("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--save-interval", metavar="EPOCHS", type=whole(0), default=10, help="epochs between two "
        "copies of the backbone and the labels that are kept; 0: none")
    add("--checkpoint-interval", metavar="STEPS", type=whole(1), default=1000,
        help="steps between two checkpoints, besides one at the end of each epoch")

    add = parser.add_argument_group("watching").add_argument
    add("--log-interval", metavar="STEPS", type=whole(1), default=50,
        help="steps between two log lines")
    add("--knn-interval", metavar="EPOCHS", type=whole(0), default=0, help="epochs between two "
        "measurements of the nearest-neighbour accuracy; 0: none")
    add("--gallery-interval", metavar="EPOCHS", type=whole(0), default=0, help="epochs between two "
        "looks at the clusters, clusters.png and report.html; 0: at the end")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    add("--export-only", action="store_true", help="do not train; write the final clusters and "
        "files of the run in --output as it is")
    return parser


def parse(arguments=None):
    """The arguments, and the names of those that were given."""
    args = make_parser().parse_args(arguments)
    marked = argparse.Namespace(**dict.fromkeys(vars(args), "not given"))
    make_parser().parse_args(arguments, marked)
    given = {name for name, value in vars(marked).items() if value != "not given"}
    if args.weights:
        args.weights = os.path.abspath(args.weights)  # the same in a run that goes on elsewhere
    if args.data is None:
        args.data = "data/imagenet" if os.path.isdir("data/imagenet") else "shapes"
    return args, given


def follow_data(args, given, dataset, saved, device):
    """Set what was not given: from the checkpoint, the demonstration or the data.

    Settings that follow from the data are printed, with the reason. --recipe and sets of SMALL_SET
    images or more keep the published settings. Raises UserError if the processes have different
    arguments or see different checkpoints. A collective.
    """
    own = {"data", "output", "workers"}  # of a machine
    arguments = {name: value for name, value in vars(args).items() if name not in own}
    if not distributed.same_everywhere((arguments, given - own)):
        raise UserError("The processes have different arguments: start all machines with the same "
                        "command.")
    if not distributed.same_everywhere(saved and (saved["progress"], saved["log_position"])):
        raise UserError(f"--output {args.output}: the processes see different checkpoints; it must "
                        "be a folder that all machines share.")
    chosen = {}
    if saved:
        chosen = {name: value for name, value in saved["settings"].items()
                  if name not in PER_START}
    elif args.data == "shapes" and not args.recipe:
        chosen = DEMO
        if "data" not in given:
            print_main("No --data and no data/imagenet: this is the demonstration, on drawn "
                       "shapes.\n")
    elif len(dataset) < SMALL_SET and not args.recipe:
        follow_small_set(args, given, dataset, device)
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    dataset.background = args.background
    if args.workers is None:
        args.workers = default_workers(dataset.pixels is not None)


def follow_small_set(args, given, dataset, device):
    """Set what was not given for a small set; print what and why.

    Most rules come from trials on 12,000 images of Fashion-MNIST, see the README.
    """
    N, W = len(dataset), distributed.world_size()
    print_main(f"{N:,} images: these settings follow from the data. Every argument that is given "
               "wins, and --recipe asks for the published ones.")

    def choose(name, value, reason):
        """Set and print a setting, unless it was given; returns the value that the run has."""
        if name not in given:
            setattr(args, name, value)
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            print_main(f"  --{name.replace('_', '-')} {shown}: {reason}")
        return getattr(args, name)

    # Process 0's: another machine may fail to read one of the files that are measured.
    side = int(distributed.broadcast(torch.tensor(dataset.typical_side())))
    largest = 64 if device.type == "cpu" else 224
    size = choose("image_size", max(24, min(side, largest)) // 4 * 4,
                  f"the images have about {side} pixels"
                  + (f", a {device.type.upper()} takes {largest}" if side > largest else ""))
    choose("arch", "narrow" if size <= 64 and device.type == "cpu" else "resnet18",
           "suits this size and device")
    K = max(2, min(1000, N // 40))
    K = choose("num_clusters", K, f"{N:,} images, {N // K} a cluster")
    choose("min_cluster_size", max(1, N // K // 8), "an eighth of a mean cluster")
    choose("batch_size", max(2, 64 // W), "64 in all; few images need many steps")
    epochs = max(30, min(200, 2_000_000 // N))
    epochs = choose("epochs", epochs, f"{epochs * N:,} images seen")
    choose("lr_schedule", "cosine", "it ends at 0, whatever the number of epochs")
    choose("initial", "pixels", "they know more of a small set than a random network")
    every = max(1, min(round(60_000 / N), epochs // 4))
    choose("offline_epochs", every, "the network first learns the clusters of the pixels")
    choose("recluster_interval", every, "the memories start anew from all images")
    choose("memory_momentum", 0.1, "a tenth of each new feature; re-clustering renews all")
    choose("crop_scale", 0.5, "at least half of an image")
    choose("jitter", [0.8, 0.8, 0.8, 0.2], "SimCLR's: pixels depend on brightness and contrast")
    if not distributed.any_process(coarse_dtype(device) != torch.bfloat16):
        choose("amp", "bf16", "this device multiplies it faster")
    if dataset.labels is not None:
        choose("knn_interval", max(1, epochs // 5), "there are labels to measure by")
    choose("save_interval", 0, "the checkpoint is enough")
    print_main("")


def check(args, dataset, saved, device):
    """Raise UserError for what cannot work and what cannot continue.

    args: train.py's. dataset: an ImageSet. saved: the checkpoint in --output, or None.
    """
    N, global_batch = len(dataset), args.batch_size * distributed.world_size()
    if args.num_clusters > N:
        raise UserError(f"--num-clusters {args.num_clusters}: there are only {N} images in "
                        f"{args.data}; choose fewer.")
    if (needed := args.min_cluster_size * args.num_clusters) > N:
        raise UserError(f"--min-cluster-size {args.min_cluster_size}: {args.num_clusters} clusters "
                        f"of that size need {needed} images and {args.data} has {N}; lower it or "
                        "--num-clusters.")
    if args.export_only and not saved:
        raise UserError(f"--export-only: there is no run in --output {args.output}; name the "
                        "folder of one, or leave it out.")
    if args.amp == "fp16" and device.type == "cpu" and not args.export_only:
        remedy = "continue it on one" if saved else "on the CPU use --amp bf16 or off"
        raise UserError(f"--amp fp16 needs a CUDA device; {remedy}.")
    if args.knn_interval and dataset.labels is None:
        raise UserError(f"--knn-interval {args.knn_interval}: the images in {args.data} have no "
                        "labels to predict; leave it at 0.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, or "
                        "leave it out.")
    if args.lr == 0.06 and N >= SMALL_SET and args.data != "shapes" and global_batch != 512:
        print_main(f"The recipe's --lr 0.06 is for a global batch of 512; here it is "
                   f"{global_batch}.")
    if N < 2 * needed:
        print_main(f"{N} images are fewer than 2 x {args.num_clusters} clusters x "
                   f"--min-cluster-size {args.min_cluster_size}: some clusters may stay empty.")
    if not saved:
        return
    before, now = ({"--" + name.replace("_", "-"): value for name, value in settings.items()
                    if name not in MAY_DIFFER} for settings in (saved["settings"], vars(args)))
    check_same_settings(args.output, before, now)
    batch_before = saved["settings"]["batch_size"]
    if args.batch_size != batch_before and saved["global_batch"] != global_batch:
        raise UserError(f"{args.output} holds a run with --batch-size {batch_before}, not "
                        f"{args.batch_size}: use the same, or one that keeps the global batch at "
                        f"{saved['global_batch']}, or another --output.")
    if saved["data"] != dict(num_images=N, fingerprint=dataset.fingerprint):
        raise UserError(f"{args.output} holds a run on {saved['data']['num_images']} images, and "
                        f"{args.data} has {N}, or other names or another order: the memory's rows "
                        "belong to images; restore the images, or choose another --output.")
    epochs = saved["settings"]["epochs"]
    if args.lr_schedule == "cosine" and args.epochs != epochs and not args.export_only:
        print_main(f"--epochs {args.epochs}: the run was set for {epochs}. The cosine schedule "
                   "follows the new number, so the learning rate jumps here.")
