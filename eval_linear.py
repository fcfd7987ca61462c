"""Linear classification on frozen feature maps, and fine-tuning with few labels.

    python eval_linear.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data /path/to/imagenet

The classifiers of all maps train together on one forward pass, as a protocol of
odc/evaluation/linear.py says. The processes split a batch and sum their gradients. Batch norm
shares its statistics on GPUs; on CPUs it does not, and those of process 0 are judged and saved.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import LINEAR_AUGMENTATIONS, augment_batch, evaluation_transform
from odc.data.datasets import check_same_images
from odc.data.loader import epoch_batches
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import frozen_backbone, linear, tables
from odc.features import extract, weights_fingerprint
from odc.runtime import checkpoint, launch
from odc.runtime.arguments import Parser, number, path, whole
from odc.runtime.log import print_settings, progress_bar


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    frozen_backbone.add_arguments(parser)
    group = parser.add_argument_group("protocol")
    add, add_images = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--protocol", choices=list(linear.PROTOCOLS), metavar="NAME",
        help=f"{', '.join(linear.PROTOCOLS)} (default: the data's own, else short)")
    add_images("--subset", metavar="FILE", type=path, help="train only on the images that this "
               "list names, a path a line, as in meta/train_labeled_1percent.txt")
    add_images("--train-share", metavar="SHARE", type=number(0, 1, above=True),
               help="train only on this share of each class, drawn from --seed")
    add("--epochs", metavar="N", type=whole(1, 10**6), help="in all; the steps of --lr move along")
    add("--batch-size", metavar="N", type=whole(1, 2**20), help="images, of all processes together")
    add("--lr", metavar="LR", type=number(0, 1e6), help="learning rate")
    add("--head-lr", metavar="FACTOR", type=number(0, 1e6),
        help="in fine-tuning, what the linear layer's learning rate is multiplied by")
    return parser


def train(args, network, protocol, classifiers, optimizer):
    """Train or continue -> {column: [top-1, top-5]} per epoch. Raises UserError, Interrupted."""
    settings = settings_of(args, network, protocol)
    history = load_checkpoint(args, settings, classifiers, optimizer)
    while (epoch := len(history)) < protocol.epochs:
        losses = train_epoch(args, network, protocol, classifiers, optimizer, epoch)
        distributed.share_statistics(classifiers)
        accuracy = evaluate(network, protocol, classifiers)
        print_main(f"epoch {epoch + 1}/{protocol.epochs}: " + ", ".join(
            f"{column} loss {loss:.3f} top-1 {top1:.2f}"
            for (column, (top1, _)), loss in zip(accuracy.items(), losses)))
        history.append(accuracy)
        save_checkpoint(args, settings, classifiers, optimizer, history)
    return history


def train_epoch(args, network, protocol, classifiers, optimizer, epoch):
    """One epoch, in which every image comes once; returns the mean loss of each column."""
    drops, device = sum(epoch >= step for step in protocol.lr_steps), network.device
    for group, factor in zip(optimizer.param_groups, (protocol.head_lr, 1)):
        group["lr"] = protocol.lr * factor * protocol.lr_gamma**drops
    batches = epoch_batches(
        network.train, LINEAR_AUGMENTATIONS[protocol.train_transform], network.image_size,
        protocol.batch_size // distributed.world_size(), args.seed, epoch,
        workers=network.workers, pin_memory=device.type == "cuda")
    iterator, train_labels = iter(batches), network.train.labels.to(device)
    sums = torch.zeros(len(classifiers.columns), device=device)
    classifiers.train()
    bar = progress_bar(len(batches), f"epoch {epoch + 1}/{protocol.epochs}")
    for _ in range(len(batches)):
        launch.check_signals()
        with distributed.raise_everywhere():
            batch = next(iterator)
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        labels = train_labels[batch.indices.to(device, non_blocking=True)]  # [B]
        # The loss is the mean over the batch of all processes, whose parts may differ in size.
        count = int(distributed.all_reduce(torch.tensor(len(labels))))
        losses = torch.stack([F.cross_entropy(logits, labels, reduction="sum") / count
                              for logits in classifiers(images).values()])  # [columns]
        optimizer.zero_grad()
        losses.sum().backward()
        for parameter in classifiers.parameters():
            distributed.all_reduce(parameter.grad)
        optimizer.step()
        sums += distributed.all_reduce(losses.detach())
        bar.update()
    bar.close()
    if not sums.isfinite().all():
        raise UserError(f"the loss is not finite in epoch {epoch + 1}: lower --lr.")
    return (sums / len(batches)).tolist()


def evaluate(network, protocol, classifiers):
    """Accuracy on the val images, in percent: {column: [top-1, top-5]}. A collective."""
    classifiers.eval()
    columns, k = classifiers.columns, min(5, len(network.val.classes))

    def best_classes(images):  # [B, 3, S, S] -> [B, columns * k], the best class first
        return torch.cat([logits.topk(k).indices for logits in classifiers(images).values()], 1)
    best = extract(best_classes, network.val, evaluation_transform(network.image_size),
                   len(columns) * k, network.device,
                   protocol.batch_size // distributed.world_size(), network.workers, name="val")
    labels = network.val.labels[distributed.shard(len(network.val))].to(network.device)
    hits = (best.view(len(best), len(columns), k) == labels[:, None, None]).double()
    correct = torch.stack([hits[:, :, 0].sum(0), hits.sum((0, 2))], dim=1)  # [columns, 2]
    accuracy = 100 * distributed.all_reduce(correct) / len(network.val)
    return dict(zip(columns, accuracy.tolist()))


def checkpoint_path(args):
    return Path(args.output.removesuffix(".json") + ".checkpoint.pth")


def save_checkpoint(args, settings, classifiers, optimizer, history):
    with distributed.raise_everywhere():
        if args.output and distributed.is_main():
            checkpoint.write_dict(checkpoint_path(args), dict(
                program="odc eval_linear", settings=settings, history=history,
                classifiers=classifiers.state_dict(), optimizer=optimizer.state_dict()))


def load_checkpoint(args, settings, classifiers, optimizer):
    """The history of the checkpoint beside --output, with what it held; [] for a new run."""
    if not args.output or distributed.any_process(not checkpoint_path(args).exists()):
        return []
    file = checkpoint_path(args)
    with distributed.raise_everywhere(), checkpoint.reading(file):
        saved = checkpoint.read_dict(file)
        if saved.get("program") != "odc eval_linear":
            raise UserError(f"{file} is no checkpoint of eval_linear.py: choose another --output.")
        checkpoint.check_same_settings(file, saved["settings"], settings)
        optimizer.load_state_dict(saved["optimizer"])
        classifiers.load_state_dict(saved["classifiers"])
        history = saved["history"]
    print_main(f"Continuing {file} after epoch {len(history)}.")
    return history


def settings_of(args, network, protocol):
    """What must be the same for a run to be continued."""
    return {"seed": args.seed, "image size": network.image_size,
            "weights": weights_fingerprint(network.backbone)[:16],
            "train images": network.train.fingerprint, "val images": network.val.fingerprint,
            **{name: str(value) for name, value in asdict(protocol).items()}}


def main():
    args = make_parser().parse_args()
    network = frozen_backbone.prepare(args, one_class=True)
    with distributed.raise_everywhere():
        network.train = linear.choose_images(network.train, args.subset, args.train_share,
                                             args.seed)
    check_same_images(network.train)
    name, protocol, changed = linear.choose_protocol(args, network.train)
    print_main(f"protocol {name} on {len(network.train):,} images; changed: {changed or 'nothing'}")
    print_settings(asdict(protocol))
    classifiers = linear.LinearClassifiers(network, protocol.columns, args.seed)
    optimizer = linear.make_optimizer(classifiers, protocol)
    history = train(args, network, protocol, classifiers, optimizer)
    results = linear.choose_results(protocol, history)
    # The rows of fine-tuning belong to published lists of images, not to a share that was drawn.
    published = None if changed or args.train_share else linear.TABLES.get(name)
    published = published and published.if_comparable(network)
    tables.write_json(args.output, dict(script="eval_linear", protocol=name,
        settings=asdict(protocol), not_the_recipes=changed, **network.description(),
        results=results, history=history))
    rows = {f"{network.label(args)}, top-{n}": {
        column: result[f"top{n}"] for column, result in results.items()} for n in (1, 5)}
    tables.show(f"{network.train.name} (%), protocol {name}", protocol.columns, rows, published)


if __name__ == "__main__":
    launch.run_program(main)
