"""Online Deep Clustering (Zhan et al., CVPR 2020): learn a ResNet from images without labels.

    torchrun --nproc_per_node=8 train.py --data /path/to/imagenet     the published recipe
    torchrun --nproc_per_node=2 train.py                              a demonstration in minutes, nothing to download

The method is `train_epoch` below and odc/memory.py; the defaults are the recipe odc_resnet50_8xb64-steplr-440e_in1k.
Every number between 1. and 7. is a step of the paper's iteration.
"""

import os

import torch.nn.functional as F

from odc.runtime import program
from odc import distributed
from odc.outputs import export
from odc.runtime.arguments import Parser, number, whole
from odc.distributed import print_main
from odc.data.loader import default_workers
from odc.model import ARCHS
from odc.run import Run
from odc.runtime.log import print_settings

# The built-in demonstration (--data shapes): a small network and settings that suit 5,000 small images, chosen without
# their labels (tests/benchmarks/selection.py).
DEMO = dict(arch="narrow", image_size=32, epochs=20, batch_size=32, lr=0.06, lr_steps=[16], num_clusters=60,
            crop_scale=0.5, save_interval=0, checkpoint_interval=100, knn_interval=5)


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", help="folder of images, in any known layout, or the word shapes "
                      "(default: data/imagenet if it is there, else shapes)")
    data.add_argument("--output", metavar="DIR", default="out", help="where the run writes, and continues from")
    data.add_argument("--image-size", metavar="PIXELS", type=whole(8, 4096), default=224, help="side of the crops")
    data.add_argument("--crop-scale", metavar="SHARE", type=number(0, 1, above=True), default=0.08,
                      help="smallest share of an image that a crop covers")
    data.add_argument("--jitter", metavar=("B", "C", "S", "H"), type=number(0, 10), nargs=4, default=[0.4, 0.4, 1.0, 0.5],
                      help="strength of brightness, contrast, saturation and hue jitter")
    data.add_argument("--workers", metavar="N", type=whole(0, 256), default=None,
                      help="processes that read images, per training process (default: up to 4; 0 for shapes)")

    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=list(ARCHS), default="resnet50", help="backbone; narrow is for small images")
    network.add_argument("--feature-dim", metavar="D", type=whole(1, 65536), default=256, help="width of the features")
    network.add_argument("--weights", metavar="FILE", help="start from this pre-trained backbone")

    method = parser.add_argument_group("clusters and memories")
    method.add_argument("--num-clusters", metavar="K", type=whole(1), default=10000, help="number of clusters")
    method.add_argument("--min-cluster-size", metavar="N", type=whole(0), default=20,
                        help="smaller clusters are dissolved and refilled")
    method.add_argument("--memory-momentum", metavar="M", type=number(0, 1), default=0.5,
                        help="share of the new feature in the samples memory")
    method.add_argument("--centroids-interval", metavar="STEPS", type=whole(1), default=10,
                        help="steps between two updates of the centroids memory")
    method.add_argument("--reweight-power", metavar="P", type=number(0, 4), default=0.5,
                        help="a cluster's loss weight is its size to the power of -P")
    method.add_argument("--kmeans-iterations", metavar="N", type=whole(1), default=20,
                        help="iterations of the initial k-means")
    method.add_argument("--recluster-interval", metavar="EPOCHS", type=whole(0), default=0,
                        help="ablation: instead of online clusters, k-means every so many epochs; 0: never")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", metavar="N", type=whole(1, 10**6), default=440, help="epochs in all")
    optimisation.add_argument("--batch-size", metavar="N", type=whole(2, 65536), default=64,
                              help="images in a batch, per process")
    optimisation.add_argument("--lr", metavar="LR", type=number(0, 1e6), default=0.06, help="learning rate")
    optimisation.add_argument("--lr-steps", metavar="EPOCH", type=whole(1), nargs="*", default=[400],
                              help="epochs at which the learning rate drops")
    optimisation.add_argument("--lr-gamma", metavar="G", type=number(0, 1), default=0.4, help="what it drops by")
    optimisation.add_argument("--weight-decay", metavar="WD", type=number(0, 1e3), default=1e-5, help="of all parameters")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", metavar="N", type=whole(0), default=0, help="decides everything random")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    run.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision: off, bf16 or fp16")
    run.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    run.add_argument("--save-interval", metavar="EPOCHS", type=whole(0), default=10,
                     help="epochs between two copies of the backbone and the labels that are kept; 0: none")
    run.add_argument("--checkpoint-interval", metavar="STEPS", type=whole(1), default=1000,
                     help="steps between two checkpoints, besides one at the end of each epoch")

    watching = parser.add_argument_group("watching")
    watching.add_argument("--log-interval", metavar="STEPS", type=whole(1), default=50,
                          help="steps between two log lines")
    watching.add_argument("--knn-interval", metavar="EPOCHS", type=whole(0), default=0,
                          help="epochs between two measurements of the nearest-neighbour accuracy; 0: none")
    watching.add_argument("--gallery-interval", metavar="EPOCHS", type=whole(0), default=0,
                          help="epochs between two pictures of the clusters, clusters.png; 0: one at the end")
    watching.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    watching.add_argument("--export-features", action="store_true",
                          help="write the features of all images at the end, features.npy")
    return parser


def train_epoch(run, epoch, first_step):
    """One epoch of the paper's iteration, from first_step on."""
    args, memory, model, optimizer = run.args, run.memory, run.model, run.optimizer
    model.train()
    online = not args.recluster_interval  # else labels stay as the last k-means made them
    for group in optimizer.param_groups:
        group["lr"] = args.lr * args.lr_gamma ** sum(epoch >= drop for drop in args.lr_steps)
    loss_weights = memory.loss_weights(args.reweight_power)

    for step, batch in enumerate(run.batches(epoch, first_step), first_step):
        distributed.seed_step(args.seed, epoch, step)  # dropout: a resumed run is the same run
        indices = batch.indices.to(run.device, non_blocking=True)
        images = run.finish(batch)
        labels = memory.labels[indices]

        # 1. Features z and the clusters that the head sees in them.
        with run.autocast():
            z, logits = model(images)
        # 2. Classify into the clusters as they were before this step.
        loss = F.cross_entropy(logits.float(), labels, weight=loss_weights)
        mean_loss = run.agree(epoch, step, loss, batch.failed)  # stops every process if it is not finite
        # 3. Samples memory: features move towards z, labels follow (Eq. 1 and 2).
        change_ratio = memory.update_samples(indices, z) if online else 0.0
        # 4. Learn.
        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        # 5. Centroids memory.
        run.global_step += 1
        if online and run.global_step % args.centroids_interval == 0:
            memory.update_centroids()
        # 6. Small clusters.
        splits = memory.split_small_clusters() if online else 0
        # 7. Every cluster counts, however large.
        loss_weights = memory.loss_weights(args.reweight_power)

        run.after_step(epoch, step, mean_loss, change_ratio, splits)


def parse(arguments=None):
    """The arguments, with the demonstration's defaults where the data are the built-in shapes, and a banner or None."""
    args, banner = make_parser().parse_args(arguments), None
    if args.data is None and os.path.isdir("data/imagenet"):
        args.data = "data/imagenet"
    if args.data in (None, "shapes"):
        if args.data is None:
            banner = "No --data and no data/imagenet here: this is the built-in demonstration, on drawn shapes."
        parser = make_parser()
        parser.set_defaults(**DEMO)
        args = parser.parse_args(arguments)
        args.data = "shapes"
    if args.workers is None:
        args.workers = default_workers(args.data == "shapes")
    return args, banner


def main(arguments=None):
    args, banner = parse(arguments)
    device = distributed.init(args.device)
    program.catch_signals()
    if banner:
        print_main(f"{banner}\n")
    print_settings(vars(args))
    run = Run(args, device)
    for epoch in range(run.epoch, args.epochs):
        run.begin_epoch(epoch)
        train_epoch(run, epoch, run.first_step)
        run.end_epoch(epoch + 1)
    export.save_all(run)
    print_main(f"Done: backbone.pth, clusters.csv, clusters.png and report.html are in {args.output}.")


if __name__ == "__main__":
    program.run_program(main)
