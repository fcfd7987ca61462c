"""Linear classification on frozen feature maps: the published protocols, all classifiers on one forward pass.

    python eval_linear.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data /path/to/imagenet --with-avgpool

The protocols are the recipes of the benchmark that published ODC's numbers. A protocol sets everything; every setting
can be given as an argument.
"""

import dataclasses
from pathlib import Path

from odc.runtime import program
from odc.evaluation import frozen as evaluation
from odc.evaluation import tables as report
from odc.runtime.arguments import Parser, number, whole
from odc.data.augmentation import LINEAR_AUGMENTATIONS
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation.linear import AVGPOOL, COLUMNS, Protocol, Training

MULTIHEAD = Protocol(
    "mhead_linear-8xb32-steplr-90e", tuple(COLUMNS), 1000, epochs=90, lr=0.01, lr_steps=(30, 60), weight_decay=1e-4,
    nesterov=True, train_transform="imagenet-multihead", report="last")
PROTOCOLS = {
    "imagenet-multihead": MULTIHEAD,
    "imagenet-avgpool": Protocol(
        "linear-8xb32-steplr-100e", (AVGPOOL,), 1000, epochs=100, lr=30.0, lr_steps=(60, 80), weight_decay=0.0,
        nesterov=False, train_transform="imagenet-avgpool", report="best"),
    "places205": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-28e", classes=205, epochs=28, lr_steps=(7, 14, 21),
        train_transform="places205"),
    "inaturalist2018": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-84e", classes=8142, epochs=84, lr_steps=(24, 48, 72),
        train_transform="inaturalist2018"),
}
TABLES = {"imagenet-multihead": report.IMAGENET_LINEAR, "imagenet-avgpool": report.IMAGENET_LINEAR,
          "places205": report.PLACES205_LINEAR, "inaturalist2018": report.INATURALIST2018_LINEAR}
DEFAULTS = {"imagenet": "imagenet-multihead", "places205": "places205", "inaturalist2018": "inaturalist2018"}
# For data without a protocol of its own: ImageNet's classifiers and optimiser in fewer epochs and smaller batches, as
# there are fewer images, and crops and flips alone.
SHORT = dataclasses.replace(MULTIHEAD.shortened(12), recipe="a short form of imagenet-multihead", batch_size=64,
                            train_transform="inaturalist2018")


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = evaluation.add_arguments(parser)
    protocol = parser.add_argument_group(
        "protocol", "Every setting is the protocol's unless given; with --epochs the learning rate's steps move, too.")
    protocol.add_argument("--protocol", choices=list(PROTOCOLS), metavar="NAME",
                          help=f"{', '.join(PROTOCOLS)} (default: the data's own, else a short form of the first)")
    protocol.add_argument("--with-avgpool", action="store_true",
                          help="train the AvgPool column, too, with the lr of imagenet-avgpool but the other columns' "
                          "epochs and augmentation")
    protocol.add_argument("--num-classes", metavar="N", type=whole(2),
                          help="classes, where the data is not the published set")
    protocol.add_argument("--epochs", metavar="N", type=whole(1, 10**6), help="epochs in all")
    protocol.add_argument("--batch-size", metavar="N", type=whole(1, 2**20),
                          help="images in a batch, of all processes together")
    protocol.add_argument("--lr", metavar="LR", type=number(0, 1e6), help="learning rate")
    protocol.add_argument("--avgpool-lr", metavar="LR", type=number(0, 1e6),
                          help=f"learning rate of --with-avgpool (default: {PROTOCOLS['imagenet-avgpool'].lr:g})")
    protocol.add_argument("--lr-steps", metavar="EPOCH", type=whole(0), nargs="*", help="epochs at which it drops")
    protocol.add_argument("--lr-gamma", metavar="G", type=number(0, 1), help="what it drops by")
    protocol.add_argument("--momentum", metavar="M", type=number(0, 1), help="momentum of SGD")
    protocol.add_argument("--weight-decay", metavar="WD", type=number(0, 1e3), help="of the classifiers")
    protocol.add_argument("--train-transform", choices=list(LINEAR_AUGMENTATIONS), metavar="NAME",
                          help="augmentation of the protocol of that name")
    protocol.add_argument("--report", choices=["last", "best"], help="which epoch's accuracy: last or best")
    groups["run"].add_argument("--checkpoint-interval", metavar="STEPS", type=whole(1), default=1000,
                               help="steps between two checkpoints beside --output, besides one at each epoch's end")
    return parser


def choose_protocol(args, dataset):
    """(name, Protocol as used, {setting: value} where that is not the recipe's).

    Raises UserError if the data's number of classes is not the protocol's.
    """
    classes = len(dataset.classes)
    name = args.protocol or DEFAULTS.get(dataset.name)
    if args.protocol is None and (name is None or PROTOCOLS[name].classes != classes):
        name = "short"
    recipe = PROTOCOLS[name] if name != "short" else dataclasses.replace(SHORT, classes=classes)
    wanted = args.num_classes or recipe.classes
    if wanted != classes:
        by = f"--num-classes {wanted}" if args.num_classes else f"--protocol {name} is for {wanted} classes and"
        raise UserError(f"{by} does not match {dataset.root}, which has {classes}: give other --data, or --num-classes "
                        f"{classes}.")
    protocol = dataclasses.replace(recipe.shortened(args.epochs or recipe.epochs), classes=classes)
    settings = ("batch_size", "lr", "lr_steps", "lr_gamma", "momentum", "weight_decay", "train_transform", "report")
    given = {setting: getattr(args, setting) for setting in settings if getattr(args, setting) is not None}
    if "lr_steps" in given:
        given["lr_steps"] = tuple(sorted(given["lr_steps"]))
    protocol = dataclasses.replace(protocol, **given)
    before = dataclasses.asdict(recipe)
    return name, protocol, {k: v for k, v in dataclasses.asdict(protocol).items() if v != before[k]}


def published_table(name, changed, frozen):
    """The published rows that a run of this protocol may stand beside, or None.

    The AvgPool column was made by a protocol of its own, and stays empty beside another one.
    """
    table = TABLES.get(name)
    if not table or changed or not table.is_comparable(frozen.train, frozen.val, frozen.backbone, frozen.image_size):
        return None
    return table.only((AVGPOOL,) if name == "imagenet-avgpool" else COLUMNS)


def main():
    args = make_parser().parse_args()
    frozen = evaluation.prepare(args)
    if frozen.train.labels is None:
        raise UserError(f"{frozen.train.name} has several classes an image, and these classifiers choose one: use "
                        "eval_svm.py.")
    name, protocol, changed = choose_protocol(args, frozen.train)
    protocols, avgpool = [protocol], None
    if args.with_avgpool and AVGPOOL not in protocol.columns:
        avgpool = PROTOCOLS["imagenet-avgpool"].shortened(protocol.epochs)
        avgpool = dataclasses.replace(avgpool, classes=protocol.classes, train_transform=protocol.train_transform,
                                      batch_size=protocol.batch_size, lr=avgpool.lr if args.avgpool_lr is None else
                                      args.avgpool_lr)
        protocols.append(avgpool)
    elif args.avgpool_lr is not None:
        raise UserError(f"--avgpool-lr {args.avgpool_lr:g} is of --with-avgpool beside another protocol: give that, too, or "
                        "--lr instead.")
    steps = " ".join(map(str, protocol.lr_steps))
    print_main(f"protocol {name} ({protocol.recipe}): {protocol.epochs} epochs, batch {protocol.batch_size}, "
               f"lr {protocol.lr:g} x {protocol.lr_gamma:g} after epochs {steps}, {protocol.train_transform} augmentation")
    if changed:
        print_main("not the recipe's: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    path = Path(args.output.removesuffix(".json") + ".checkpoint.pth") if args.output else None
    if path is None:
        print_main("No --output: no checkpoint, so that a run that is stopped begins anew.")
    training = Training(frozen, protocols, args.seed, path, args.checkpoint_interval)
    training.run()

    results = training.results()
    published = published_table(name, changed, frozen)
    title = published.title.removesuffix(" (top-1)") if published else f"{frozen.train.name} linear"
    row = frozen.label(args)
    report.show(
        f"{title} (%), protocol {name}", training.columns,
        {f"{row}, top-1": {column: r["top1"] for column, r in results.items()},
         f"{row}, top-5": {column: r["top5"] for column, r in results.items()}}, published)
    if avgpool:
        steps = " ".join(map(str, avgpool.lr_steps))
        print_main(f"AvgPool here: lr {avgpool.lr:g} x {avgpool.lr_gamma:g} after epochs {steps} of {avgpool.epochs}, "
                   f"{avgpool.train_transform} augmentation, best epoch. Its published protocol is --protocol "
                   "imagenet-avgpool, a run of its own.")
    report.write_json(args.output, dict(
        script="eval_linear", protocol=name, settings=dataclasses.asdict(protocol), not_the_recipes=changed,
        settings_of_avgpool=avgpool and dataclasses.asdict(avgpool),
        **frozen.description(), results=results, history=training.history, published=report.published_rows(published)))


if __name__ == "__main__":
    program.run_program(main)
