"""Linear classification on frozen feature maps, and fine-tuning with few labels.

    python eval_linear.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data /path/to/imagenet
    python eval_linear.py --weights out/backbone.pth --data shapes --protocol finetune \\
        --train-share 0.01

The linear classifiers of all maps train together on one forward pass. A protocol
(odc/evaluation/linear.py) sets everything; every setting can be given as an argument. The batch is
split over the processes, and all that mixes its images is summed over them, so one process and
eight compute the same.

The published rows of fine-tuning are the best of nine runs, --lr 0.001, 0.01, 0.1 with --head-lr
1, 10, 100. Train as many, each with its own --output, for a row beside them.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import LINEAR_AUGMENTATIONS, augment_batch
from odc.data.datasets import check_same_images
from odc.data.loader import check_unreadable, epoch_batches
from odc.distributed import print_main
from odc.errors import Interrupted, UserError
from odc.evaluation import frozen_backbone, tables
from odc.evaluation.linear import (
    FINE_TUNED, PROTOCOLS, choose_images, choose_protocols, choose_results, make_classifiers,
    published_table)
from odc.features import extract
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import Parser, number, whole
from odc.runtime.log import progress_bar


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = frozen_backbone.add_arguments(parser)
    add = parser.add_argument_group(
        "protocol", "Every setting is the protocol's unless given; with --epochs the learning "
        "rate's steps move, too.").add_argument
    names = [name for name in PROTOCOLS if name != "short"]
    add("--protocol", choices=names, metavar="NAME", help=f"{', '.join(names)} (default: the "
        "data's own, else a short form of the first)")
    add("--with-avgpool", action="store_true", help="train the AvgPool column, too, with the lr of "
        "imagenet-avgpool but the other columns' epochs and augmentation")
    add("--subset", metavar="FILE", help="train only on the images that this list names, a path a "
        "line, as in meta/train_labeled_1percent.txt")
    add("--train-share", metavar="SHARE", type=number(0, 1, above=True),
        help="train only on this share of each class, drawn from --seed")
    add("--num-classes", metavar="N", type=whole(2),
        help="classes, where the data is not the published set")
    add("--epochs", metavar="N", type=whole(1, 10**6), help="epochs in all")
    add("--batch-size", metavar="N", type=whole(1, 2**20),
        help="images in a batch, of all processes together")
    add("--lr", metavar="LR", type=number(0, 1e6), help="learning rate")
    add("--avgpool-lr", metavar="LR", type=number(0, 1e6), help="learning rate of --with-avgpool "
        f"(default: {PROTOCOLS['imagenet-avgpool'].lr:g})")
    add("--head-lr", metavar="FACTOR", type=number(0, 1e6),
        help="in fine-tuning, what the linear layer's learning rate is multiplied by")
    add("--lr-steps", metavar="EPOCH", type=whole(0), nargs="*", help="epochs at which it drops")
    add("--lr-gamma", metavar="G", type=number(0, 1), help="what it drops by")
    add("--momentum", metavar="M", type=number(0, 1), help="momentum of SGD")
    add("--weight-decay", metavar="WD", type=number(0, 1e3), help="of what is trained")
    add("--train-transform", choices=list(LINEAR_AUGMENTATIONS), metavar="NAME",
        help="augmentation of the protocol of that name")
    add("--reported", choices=["last", "best"], help="which epoch's accuracy: last or best")
    groups["run"].add_argument("--checkpoint-interval", metavar="STEPS", type=whole(1),
                               default=1000, help="steps between two checkpoints beside --output, "
                               "besides one at each epoch's end")
    return parser


@dataclass
class Progress:
    """Where the training stands. A checkpoint holds this, the classifiers and the optimizer."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that are done of the epoch after them
    losses: list = field(default_factory=list)  # sums over these steps, for each column
    failed: int = 0  # images of these steps that could not be read
    unreadable: int = 0  # val images that could not be read, and are left out
    history: list = field(default_factory=list)  # for every epoch {column: [top-1, top-5]}


def train(args, network, protocols, classifiers, optimizer, progress):
    """Train and judge the classifiers, from progress on. The results are in progress.history."""
    while progress.epoch < protocols[0].epochs:
        try:
            train_epoch(args, network, protocols, classifiers, optimizer, progress)
            progress.history.append(evaluate(network, protocols, classifiers, progress))
        except Interrupted:
            end = "; the same command continues." if args.output else "."
            raise Interrupted(f"Stopped in epoch {progress.epoch + 1} after step {progress.step}, "
                              f"as a signal asked{end}") from None
        progress.epoch, progress.step, progress.failed = progress.epoch + 1, 0, 0
        progress.losses = [0.0] * len(classifiers.columns)
        save(args, network, protocols, classifiers, optimizer, progress)


def train_epoch(args, network, protocols, classifiers, optimizer, progress):
    """One epoch, from step progress.step on. Every image comes once."""
    protocol, device = protocols[0], network.device
    for group in optimizer.param_groups:
        drops = sum(progress.epoch >= step for step in group["lr_steps"])
        group["lr"] = group["initial_lr"] * group["lr_gamma"] ** drops
    batches = epoch_batches(
        network.train, LINEAR_AUGMENTATIONS[protocol.train_transform], network.image_size,
        protocol.batch_size // distributed.world_size(), args.seed, progress.epoch, progress.step,
        network.workers, pin_memory=device.type == "cuda")
    iterator, train_labels = iter(batches), network.train.labels.to(device)
    sums = torch.tensor(progress.losses, device=device)
    classifiers.train()
    bar = progress_bar(progress.step + len(batches),
                       f"epoch {progress.epoch + 1}/{protocol.epochs}", initial=progress.step)
    for _ in range(len(batches)):
        with distributed.raise_everywhere():
            batch = next(iterator)
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        labels = train_labels[batch.indices.to(device, non_blocking=True)]  # [B]

        # The loss is the mean over the batch of all processes, whose parts may differ in size.
        count, failed, stop = distributed.all_reduce(torch.tensor(
            [len(labels), int((batch.failed >= 0).sum()), launch.signal_is_pending()])).tolist()
        losses = torch.stack([F.cross_entropy(logits, labels, reduction="sum") / count
                              for logits in classifiers(images).values()])  # [columns]
        optimizer.zero_grad()
        losses.sum().backward()
        for parameter in classifiers.parameters():
            distributed.all_reduce(parameter.grad)
        optimizer.step()

        sums += distributed.all_reduce(losses.detach())
        progress.step += 1
        progress.failed += failed
        bar.update()
        if stop or progress.step % args.checkpoint_interval == 0 or progress.step == bar.total:
            progress.losses = sums.tolist()
            save(args, network, protocols, classifiers, optimizer, progress)
        if stop:
            raise Interrupted
    bar.close()
    check_unreadable(progress.failed, network.train)


def evaluate(network, protocols, classifiers, progress):
    """Accuracy on the val images that can be read, in percent: {column: [top-1, top-5]}.

    A collective.
    """
    classifiers.eval()
    columns, k = classifiers.columns, min(5, protocols[0].classes)

    def best_classes(images):
        """[B, 3, S, S] -> [B, columns * k], the best class first."""
        return torch.cat([logits.topk(k).indices for logits in classifiers(images).values()], 1)

    best = extract(best_classes, network.val, network.transform, len(columns) * k, network.device,
                   max(1, protocols[0].batch_size // distributed.world_size()), network.workers,
                   name="val")
    own, readable = distributed.shard(len(network.val)), network.readable()
    labels = network.val.labels[own].to(network.device)
    hits = (best.view(len(best), len(columns), k) == labels[:, None, None]).double()
    hits = hits[readable[own]]
    correct = torch.stack([hits[:, :, 0].sum(0), hits.sum((0, 2))], dim=1)  # [columns, 2]
    accuracy = 100 * distributed.all_reduce(correct) / int(readable.sum())
    progress.unreadable = network.unreadable
    print_main(f"epoch {progress.epoch + 1}/{protocols[0].epochs}: " + ", ".join(
        f"{column} loss {loss / progress.step:.3f} top-1 {top1:.2f}"
        for column, loss, (top1, _) in zip(columns, progress.losses, accuracy.tolist())))
    return dict(zip(columns, accuracy.tolist()))


def save(args, network, protocols, classifiers, optimizer, progress):
    """Write the checkpoint, if there is an --output. Raises UserError if the loss is not finite."""
    if not torch.tensor(progress.losses).isfinite().all():
        raise UserError(f"the loss is not finite in epoch {progress.epoch + 1}, by step "
                        f"{progress.step}: lower --lr.")
    with distributed.raise_everywhere():
        if args.output and distributed.is_main():
            checkpoint.save(checkpoint_path(args), dict(
                program="odc eval_linear", settings=settings_of(args, network, protocols),
                progress=asdict(progress), classifiers=classifiers.state_dict(),
                optimizer=optimizer.state_dict()))


def restore(args, network, protocols, classifiers, optimizer):
    """The Progress of the checkpoint beside --output, with what it held, or that of a new run."""
    saved, path = None, checkpoint_path(args)
    with distributed.raise_everywhere():
        if args.output and path.exists():
            saved = checkpoint.load(path)
            if saved.get("program") != "odc eval_linear":
                raise UserError(f"{path} is not a checkpoint of eval_linear.py: choose another "
                                "--output, or delete the file.")
            checkpoint.check_same_settings(path, saved["settings"],
                                           settings_of(args, network, protocols))
    if saved is None:
        return Progress(losses=[0.0] * len(classifiers.columns))
    classifiers.load_state_dict(saved["classifiers"])
    optimizer.load_state_dict(saved["optimizer"])
    progress = Progress(**saved["progress"])
    network.unreadable = progress.unreadable
    print_main(f"{path} holds the finished run." if progress.epoch == protocols[0].epochs else
               f"Continuing {path} in epoch {progress.epoch + 1} after step {progress.step}.")
    return progress


def checkpoint_path(args):
    return Path(f"{args.output}".removesuffix(".json") + ".checkpoint.pth")


def settings_of(args, network, protocols):
    """What must be the same for a run to be continued."""
    settings = {"seed": args.seed, "image size": network.image_size, "amp": network.amp,
                "background": args.background, "weights": network.fingerprint[:16],
                "train images": network.train.labelled_fingerprint,
                "val images": network.val.labelled_fingerprint}
    return settings | {f"{name.replace('_', ' ')} of {' '.join(protocol.columns)}": str(value)
                       for protocol in protocols for name, value in asdict(protocol).items()}


def main():
    args = make_parser().parse_args()
    network = frozen_backbone.prepare(args)
    with distributed.raise_everywhere():
        network.train = choose_images(network.train, args.subset, args.train_share, args.seed)
    check_same_images(network.train)
    if args.subset or args.train_share:
        print_main(f"training on {len(network.train):,} of the train images")
    if network.train.labels is None:
        raise UserError(f"{network.train.name} has several classes an image, and these classifiers "
                        "choose one: use eval_svm.py.")
    name, protocols, changed = choose_protocols(args, network.train)
    protocol = protocols[0]
    print_main(f"protocol {name} ({protocol.recipe}): {protocol.describe()}")
    if changed:
        print_main("not the recipe's: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    if not args.output:
        print_main("No --output: no checkpoint, so a run that is stopped begins anew.")

    classifiers = make_classifiers(network, protocols, args.seed)
    optimizer = torch.optim.SGD(classifiers.optimizer_groups(protocols))
    progress = restore(args, network, protocols, classifiers, optimizer)
    train(args, network, protocols, classifiers, optimizer, progress)

    results = choose_results(protocols, progress.history)
    # The rows of fine-tuning belong to published lists of images, not to a share that was drawn.
    published = None if args.train_share else published_table(name, changed, network)
    fine_tuning = protocol.columns == (FINE_TUNED,)
    title = f"{network.train.name} {'fine-tuning' if fine_tuning else 'linear'}"
    if published:
        title = published.title.removesuffix(" (top-1)")
    tables.write_json(args.output, dict(
        script="eval_linear", protocol=name, settings=asdict(protocol), not_the_recipes=changed,
        settings_of_avgpool=asdict(protocols[1]) if len(protocols) > 1 else None,
        **network.description(), results=results, history=progress.history,
        published=tables.published_rows(published)))
    row = network.label(args)
    tables.show(f"{title} (%), protocol {name}", classifiers.columns, {
        f"{row}, top-1": {column: result["top1"] for column, result in results.items()},
        f"{row}, top-5": {column: result["top5"] for column, result in results.items()},
    }, published)
    if len(protocols) > 1:
        print_main(f"AvgPool here: {protocols[1].describe()}, best epoch. Its published protocol "
                   "is --protocol imagenet-avgpool, a run of its own.")
    if published and fine_tuning:
        print_main("Each published row is the best of nine runs, --lr 0.001, 0.01, 0.1 with "
                   "--head-lr 1, 10, 100; this is one.")


if __name__ == "__main__":
    launch.run_program(main)
