"""The settings of a run: what cannot work, and what must stay the same when a run is continued."""

import importlib.util

from odc import distributed
from odc.distributed import print_main
from odc.errors import UserError

# What may differ between the runs that continue one another; everything else must be the same.
FREE = {"data", "output", "epochs", "batch_size", "workers", "device", "weights", "compile", "log_interval",
        "save_interval", "checkpoint_interval", "gallery_interval", "knn_interval", "tensorboard", "export_features"}


def check(args, dataset, device, output, state):
    """Refuse what cannot work and what would not continue the run in the output folder.

    args: train.py's. dataset: an ImageSet. state: the checkpoint in `output`, or None. Raises UserError, on every
    process alike.
    """
    N = len(dataset)
    if args.num_clusters > N:
        raise UserError(f"--num-clusters {args.num_clusters}: there are only {N} images in {args.data}; choose fewer.")
    if args.min_cluster_size * args.num_clusters > N:
        raise UserError(f"--min-cluster-size {args.min_cluster_size}: {args.num_clusters} clusters of that size need "
                        f"{args.min_cluster_size * args.num_clusters} images and {args.data} has {N}; lower it or "
                        "--num-clusters.")
    if args.amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a CUDA device; on the CPU use --amp bf16 or off.")
    if args.knn_interval and dataset.labels is None:
        raise UserError(f"--knn-interval {args.knn_interval}: the images in {args.data} have no labels to predict; leave "
                        "it at 0.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out.")
    if args.lr == 0.06 and args.data != "shapes" and args.batch_size * distributed.world_size() != 512:
        print_main(f"The recipe's --lr 0.06 is for a global batch of 512; here it is "
                   f"{args.batch_size * distributed.world_size()}.")
    if N < 2 * args.min_cluster_size * args.num_clusters:
        print_main(f"{N} images are fewer than 2 x {args.num_clusters} clusters x --min-cluster-size "
                   f"{args.min_cluster_size}: some clusters may stay empty.")
    if not state:
        return
    where = f"{output} holds a run"
    if state.get("program") != "odc train":
        raise UserError(f"{output / 'checkpoint.pth'} is not a checkpoint of train.py; choose another --output.")
    for name, before in state["settings"].items():
        if name not in FREE and vars(args).get(name) != before:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{where} with {flag} {before}, not {vars(args).get(name)}: use the same, or another "
                            "--output.")
    batch_before = state["settings"]["batch_size"]
    if args.batch_size != batch_before and state["global_batch"] != args.batch_size * distributed.world_size():
        raise UserError(f"{where} with --batch-size {batch_before}, not {args.batch_size}: use the same, or one that "
                        f"keeps the global batch at {state['global_batch']}, or another --output.")
    data = state["data"]
    if data["num_images"] != N:
        raise UserError(f"{where} on {data['num_images']} images, and {args.data} has {N}: the memory's rows belong "
                        "to images; restore the images, or choose another --output.")
    if data["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{where} on other images than those in {args.data}, names or order differ: restore them, or "
                        "choose another --output.")
