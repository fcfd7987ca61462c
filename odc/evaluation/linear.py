"""Linear classifiers on a frozen backbone, fine-tuning with few labels, and their protocols."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from odc import distributed
from odc.errors import UserError
from odc.evaluation import tables
from odc.evaluation.pooling import map_pools, map_shapes

COLUMNS = tables.FIVE_MAPS
AVGPOOL = "AvgPool"
MAPS = dict(zip((*COLUMNS, AVGPOOL), (0, 1, 2, 3, 4, 4)))  # which of the five maps a column judges
FINE_TUNED = "Fine-tuned"  # the average pool and a linear layer, on a backbone that learns, too


@dataclass(frozen=True)
class Protocol:
    """How one benchmark trains and judges classifiers.

    recipe: the published recipe. columns: of COLUMNS and AVGPOOL, or FINE_TUNED alone.
    classes: their number. lr is multiplied by lr_gamma at each epoch of lr_steps. head_lr: what the
    linear layer's is multiplied by in fine-tuning. batch_size: of all processes together.
    train_transform: a key of LINEAR_AUGMENTATIONS. reported: "last" for the last epoch's accuracy,
    "best" for that of the epoch with the best top-1.
    """

    recipe: str
    columns: tuple
    classes: int
    epochs: int
    lr: float
    lr_steps: tuple
    weight_decay: float
    nesterov: bool
    train_transform: str
    reported: str
    batch_size: int = 256
    lr_gamma: float = 0.1
    momentum: float = 0.9
    head_lr: float = 1.0

    def shortened(self, epochs):
        """The same for another number of epochs; lr_steps move in proportion."""
        steps = tuple(max(1, round(step * epochs / self.epochs)) for step in self.lr_steps)
        return dataclasses.replace(self, epochs=epochs, lr_steps=steps)

    def group(self, parameters, head=False):
        """A parameter group of SGD, with what eval_linear.py needs for its learning rate."""
        lr = self.lr * (self.head_lr if head else 1)
        return dict(params=parameters, lr=lr, initial_lr=lr, lr_steps=self.lr_steps,
                    lr_gamma=self.lr_gamma, momentum=self.momentum, weight_decay=self.weight_decay,
                    nesterov=self.nesterov and self.momentum > 0)

    def describe(self):
        """Epochs and learning rate in words."""
        head = f" (head x {self.head_lr:g})" if self.columns == (FINE_TUNED,) else ""
        return (f"{self.epochs} epochs, batch {self.batch_size}, lr {self.lr:g}{head} x "
                f"{self.lr_gamma:g} after epochs {' '.join(map(str, self.lr_steps))}, "
                f"{self.train_transform} augmentation")


MULTIHEAD = Protocol(
    "mhead_linear-8xb32-steplr-90e", COLUMNS, 1000, epochs=90, lr=0.01, lr_steps=(30, 60),
    weight_decay=1e-4, nesterov=True, train_transform="imagenet-multihead", reported="last")
# Semi-supervised ImageNet. Each published row is the best of all combinations of SEARCHED; here
# is the one that was best for ODC.
SEARCHED = {"lr": (0.001, 0.01, 0.1), "head_lr": (1.0, 10.0, 100.0)}
ONE_PERCENT = Protocol(
    "fine-tuning with 1% of the labels", (FINE_TUNED,), 1000, epochs=20, lr=0.1, lr_steps=(12, 16),
    weight_decay=5e-4, nesterov=False, train_transform="imagenet-avgpool", reported="last",
    lr_gamma=0.2, head_lr=100.0)
TEN_PERCENT = dataclasses.replace(
    ONE_PERCENT, recipe="fine-tuning with 10% of the labels", weight_decay=1e-4, head_lr=10.0)
PROTOCOLS = {
    "imagenet-multihead": MULTIHEAD,
    "imagenet-avgpool": Protocol(
        "linear-8xb32-steplr-100e", (AVGPOOL,), 1000, epochs=100, lr=30.0, lr_steps=(60, 80),
        weight_decay=0.0, nesterov=False, train_transform="imagenet-avgpool", reported="best"),
    "places205": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-28e", classes=205, epochs=28, lr_steps=(7, 14, 21),
        train_transform="places205"),
    "inaturalist2018": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-84e", classes=8142, epochs=84, lr_steps=(24, 48, 72),
        train_transform="inaturalist2018"),
    "imagenet-1percent": ONE_PERCENT,
    "imagenet-10percent": TEN_PERCENT,
    "finetune": dataclasses.replace(
        TEN_PERCENT, recipe="a form of imagenet-10percent for other data", batch_size=64, lr=0.01),
    # For other data: ImageNet's classifiers in fewer epochs and smaller batches, as there are fewer
    # images, with crops and flips alone.
    "short": dataclasses.replace(
        MULTIHEAD.shortened(12), recipe="a short form of imagenet-multihead", batch_size=64,
        train_transform="inaturalist2018"),
}
TABLES = {"imagenet-multihead": tables.IMAGENET_LINEAR, "imagenet-avgpool": tables.IMAGENET_LINEAR,
          "places205": tables.PLACES205_LINEAR, "inaturalist2018": tables.INATURALIST2018_LINEAR,
          "imagenet-1percent": tables.IMAGENET_1PERCENT,
          "imagenet-10percent": tables.IMAGENET_10PERCENT}
DEFAULTS = {"imagenet": "imagenet-multihead", "places205": "places205",
            "inaturalist2018": "inaturalist2018"}  # data set -> protocol


def choose_protocols(args, dataset):
    """(name, [Protocol, that of --with-avgpool], {setting: value} that are not the recipe's).

    args: eval_linear.py's; a setting that is None is the protocol's. dataset: the training images.
    Raises UserError for classes in another number than the protocol's, and for arguments that do
    not fit each other or the number of processes.
    """
    classes, W = len(dataset.classes), distributed.world_size()
    name = args.protocol or DEFAULTS.get(dataset.name, "short")
    if not args.protocol and PROTOCOLS[name].classes != classes:
        name = "short"
    recipe = PROTOCOLS[name]
    if name in ("short", "finetune"):
        recipe = dataclasses.replace(recipe, classes=classes)
    if (wanted := args.num_classes or recipe.classes) != classes:
        by = f"--num-classes {wanted}"
        if not args.num_classes:
            by = f"--protocol {name} is for {wanted} classes and"
        raise UserError(f"{by} does not match {dataset.root}, which has {classes}: give other "
                        f"--data, or --num-classes {classes}.")
    before = dataclasses.asdict(recipe)
    given = {k: value for k in before if (value := getattr(args, k, None)) is not None}
    if args.lr_steps is not None:
        given["lr_steps"] = tuple(sorted(args.lr_steps))
    protocol = dataclasses.replace(recipe.shortened(args.epochs or recipe.epochs), classes=classes,
                                   **given)
    changed = {k: v for k, v in dataclasses.asdict(protocol).items() if v != before[k]}

    fine_tuning = protocol.columns == (FINE_TUNED,)
    if name.endswith("percent") and not args.subset and not args.train_share:
        raise UserError(f"--protocol {name} trains on few of the images: give the list of them "
                        "with --subset, or a --train-share.")
    if args.head_lr is not None and not fine_tuning:
        raise UserError(f"--head-lr {args.head_lr:g} is for fine-tuning: add --protocol finetune.")
    if args.with_avgpool and fine_tuning:
        raise UserError(f"--with-avgpool needs a frozen backbone, and --protocol {name} trains it: "
                        "leave it out.")
    if args.amp == "fp16" and fine_tuning:
        raise UserError(f"--amp fp16 is too coarse for the gradients of --protocol {name}: use "
                        "bf16 or off.")
    if protocol.batch_size % W or protocol.batch_size < 2 * W:
        raise UserError(f"a batch of {protocol.batch_size} images cannot be split evenly over {W} "
                        "processes, at least 2 each: choose a --batch-size that can.")
    if args.with_avgpool and AVGPOOL not in protocol.columns:
        avgpool = PROTOCOLS["imagenet-avgpool"].shortened(protocol.epochs)
        return name, [protocol, dataclasses.replace(
            avgpool, classes=classes, batch_size=protocol.batch_size,
            lr=avgpool.lr if args.avgpool_lr is None else args.avgpool_lr,
            train_transform=protocol.train_transform)], changed
    if args.avgpool_lr is not None:
        raise UserError(f"--avgpool-lr {args.avgpool_lr:g} is of --with-avgpool beside another "
                        "protocol: give that, too, or --lr instead.")
    return name, [protocol], changed


def published_table(name, changed, network):
    """The published rows beside which a run of this protocol may stand, or None.

    The AvgPool column was made by a protocol of its own, and only stands beside that. The rows of
    fine-tuning are the best of some learning rates, so one of these may be given.
    """
    table = TABLES.get(name)
    searched = SEARCHED if PROTOCOLS[name].columns == (FINE_TUNED,) else {}
    as_published = all(value in searched.get(setting, ()) for setting, value in changed.items())
    if not table or not as_published or not table.is_comparable(
            network.train, network.val, network.backbone, network.image_size):
        return None
    return table.only((AVGPOOL,) if name == "imagenet-avgpool" else PROTOCOLS[name].columns)


def choose_results(protocols, history):
    """{column: {"top1", "top5", "epoch"}} of the epoch that the column's protocol reports."""
    results = {}
    for protocol in protocols:
        for column in protocol.columns:
            epoch = len(history) - 1
            if protocol.reported == "best":
                epoch = max(range(len(history)), key=lambda e: history[e][column][0])
            top1, top5 = history[epoch][column]
            results[column] = dict(top1=top1, top5=top5, epoch=epoch + 1)
    return results


def choose_images(dataset, subset=None, train_share=None, seed=0):
    """The images of an ImageSet to train on: all, or those of a list, or a share of each class.

    subset: a text file with an image's path in each line, perhaps followed by its label.
    train_share: 0 < share <= 1; at least one image of each class is drawn, from the seed.
    Raises UserError for a list that does not fit the data.
    """
    if subset and train_share:
        raise UserError("--subset and --train-share both choose the images: give one of them.")
    if subset:
        with open(subset, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.strip() for line in file if line.strip()]
        forms = [(line, line.rsplit(maxsplit=1)[0]) for line in lines]  # with and without label
        wanted = {name for both in forms for name in both}
        there = {name: i for i in range(len(dataset)) if (name := dataset.name_of(i)) in wanted}
        absent = [line for line, name in forms if line not in there and name not in there]
        chosen = sorted({there[line] if line in there else there[name] for line, name in forms
                         if line in there or name in there})
        if absent or len(chosen) < 2:
            problem = "it names fewer than 2 images"
            if absent:
                problem = (f"{len(absent)} of its {len(lines)} images, such as {absent[0]!r}, are "
                           f"not in {dataset.root}")
            raise UserError(f"--subset {subset}: {problem}; it needs a line for each image, with "
                            "its path in that folder.")
        return dataset.take(chosen)
    if train_share and dataset.labels is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for label in range(len(dataset.classes)):
            rows = (dataset.labels == label).nonzero()[:, 0]
            count = max(1, round(len(rows) * train_share))
            chosen += rows[torch.randperm(len(rows), generator=generator)[:count]].tolist()
        return dataset.take(sorted(chosen))
    return dataset


def make_classifiers(network, protocols, seed):
    """The module that the protocols train on a FrozenBackbone network, on its device."""
    classes = protocols[0].classes
    if protocols[0].columns == (FINE_TUNED,):
        classifiers = FineTuned(network.backbone, classes, network.autocast(), seed)
    else:
        columns = [column for protocol in protocols for column in protocol.columns]
        shapes = map_shapes(network.backbone, network.image_size)
        classifiers = LinearClassifiers(network.maps, shapes, columns, classes, seed)
    if network.device.type == "cuda":
        classifiers = nn.SyncBatchNorm.convert_sync_batchnorm(classifiers)
    return classifiers.to(network.device)


def _linear(width, num_classes, generator):
    """A linear layer that starts with weights N(0, 0.01) and biases 0, as the recipes'."""
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


class LinearClassifiers(nn.Module):
    """One linear classifier for each column, on one forward pass of a frozen backbone.

    maps: images [B, 3, S, S] -> the five maps, without gradients. shapes: [(C, h, w)] of these.
    columns: of COLUMNS, each the recipe's pool -> batch norm -> Linear, and AVGPOOL, the global
    average of the last map -> Linear. seed: of the weights.
    """

    def __init__(self, maps, shapes, columns, num_classes, seed=0):
        super().__init__()
        pools = dict(zip(MAPS, [*map_pools(shapes), nn.AdaptiveAvgPool2d(1)]))
        generator = torch.Generator().manual_seed(seed)
        self.maps, self.columns = maps, list(columns)
        self.pools = nn.ModuleDict({column: pools[column] for column in columns})
        self.norms, self.linears = nn.ModuleDict(), nn.ModuleDict()
        for column in columns:
            shape = shapes[MAPS[column]]
            self.norms[column] = (nn.Identity() if column == AVGPOOL else
                                  nn.BatchNorm2d(shape[0], affine=False))
            width = pools[column](torch.zeros(shape)).numel()
            self.linears[column] = _linear(width, num_classes, generator)

    def optimizer_groups(self, protocols):
        """SGD's parameter groups, one for each protocol."""
        return [protocol.group([parameter for column in protocol.columns
                                for parameter in self.linears[column].parameters()])
                for protocol in protocols]

    def forward(self, images):
        """Normalised images [B, 3, S, S] -> {column: logits [B, classes]}. A collective."""
        maps, logits = self.maps(images), {}
        for column, linear in self.linears.items():
            features = self.norms[column](self.pools[column](maps[MAPS[column]]))
            logits[column] = linear(features.flatten(1))
        return logits


class FineTuned(nn.Module):
    """A backbone that learns, batch norm synchronised, with a linear layer on its average pool.

    The benchmark of semi-supervised ImageNet that published ODC's rows.
    """

    def __init__(self, backbone, num_classes, autocast, seed=0):
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        self.autocast, self.columns = autocast, [FINE_TUNED]
        self.head = _linear(backbone.out_channels[-1], num_classes,
                            torch.Generator().manual_seed(seed))

    def optimizer_groups(self, protocols):
        """SGD's parameter groups: the backbone, and the head with its own learning rate."""
        return [protocols[0].group(self.backbone.parameters()),
                protocols[0].group(self.head.parameters(), head=True)]

    def forward(self, images):
        """Normalised images [B, 3, S, S] -> {FINE_TUNED: logits [B, classes]}. A collective."""
        with self.autocast:
            features = self.backbone(images.contiguous(memory_format=torch.channels_last))[-1]
        return {FINE_TUNED: self.head(features.float().mean((2, 3)))}
