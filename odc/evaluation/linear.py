"""Linear classifiers on a frozen backbone, fine-tuning with few labels, and their protocols."""

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import nn

from odc import distributed
from odc.errors import UserError
from odc.evaluation import tables
from odc.evaluation.pooling import map_pools, map_shapes

COLUMNS, AVGPOOL, FINE_TUNED = tables.FIVE_MAPS, "AvgPool", "Fine-tuned"
MAPS = {AVGPOOL: 4, FINE_TUNED: 4, **{column: i for i, column in enumerate(COLUMNS)}}


@dataclass(frozen=True)
class Protocol:
    """How one benchmark trains and judges classifiers."""

    recipe: str  # the published one's name
    columns: tuple  # of COLUMNS and AVGPOOL, or FINE_TUNED alone
    epochs: int
    lr: float
    lr_steps: tuple  # epochs at which lr is multiplied by lr_gamma
    weight_decay: float
    nesterov: bool
    train_transform: str  # a key of LINEAR_AUGMENTATIONS
    reported: str  # the accuracy of the "last" epoch, or of that with the "best" top-1
    batch_size: int = 256  # of all processes together
    lr_gamma: float = 0.1
    head_lr: float = 1.0  # in fine-tuning, the linear layer learns with head_lr * lr

    def shortened(self, epochs):
        """The same for another number of epochs; lr_steps move in proportion."""
        steps = tuple(max(1, round(step * epochs / self.epochs)) for step in self.lr_steps)
        return dataclasses.replace(self, epochs=epochs, lr_steps=steps)


MULTIHEAD = Protocol(
    "mhead_linear-8xb32-steplr-90e", COLUMNS, epochs=90, lr=0.01, lr_steps=(30, 60),
    weight_decay=1e-4, nesterov=True, train_transform="imagenet-multihead", reported="last")
ONE_PERCENT = Protocol(  # lr and head_lr: of the nine that were tried, the best for ODC
    "fine-tuning with 1% of the labels", (FINE_TUNED,), epochs=20, lr=0.1, lr_steps=(12, 16),
    weight_decay=5e-4, nesterov=False, train_transform="imagenet-avgpool", reported="last",
    lr_gamma=0.2, head_lr=100.0)
TEN_PERCENT = dataclasses.replace(
    ONE_PERCENT, recipe="fine-tuning with 10% of the labels", weight_decay=1e-4, head_lr=10.0)
PROTOCOLS = {
    "imagenet-multihead": MULTIHEAD,
    "imagenet-avgpool": Protocol(
        "linear-8xb32-steplr-100e", (AVGPOOL,), epochs=100, lr=30.0, lr_steps=(60, 80),
        weight_decay=0.0, nesterov=False, train_transform="imagenet-avgpool", reported="best"),
    "places205": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-28e", epochs=28, lr_steps=(7, 14, 21),
        train_transform="places205"),
    "inaturalist2018": dataclasses.replace(
        MULTIHEAD, recipe="mhead_8xb32-steplr-84e", epochs=84, lr_steps=(24, 48, 72),
        train_transform="inaturalist2018"),
    "imagenet-1percent": ONE_PERCENT, "imagenet-10percent": TEN_PERCENT,
    "finetune": dataclasses.replace(
        TEN_PERCENT, recipe="imagenet-10percent for other data", batch_size=64, lr=0.01),
    "short": dataclasses.replace(
        MULTIHEAD.shortened(12), recipe="imagenet-multihead for fewer images", batch_size=64,
        train_transform="inaturalist2018"),  # crops and flips alone
}
TABLES = {"imagenet-multihead": tables.IMAGENET_LINEAR, "imagenet-avgpool": tables.IMAGENET_LINEAR,
          "places205": tables.PLACES205_LINEAR, "inaturalist2018": tables.INATURALIST2018_LINEAR,
          "imagenet-1percent": tables.IMAGENET_1PERCENT,
          "imagenet-10percent": tables.IMAGENET_10PERCENT}


def choose_protocol(args, dataset):
    """(name, Protocol, {setting: value} that are not the recipe's). args: eval_linear.py's.

    dataset: the training images. Raises UserError for arguments that do not fit.
    """
    name = args.protocol
    if name is None:  # the first one whose table is of this data set
        name = next((name for name, table in TABLES.items() if table.dataset == dataset.name
                     and table.num_classes == len(dataset.classes)), "short")
    recipe, W = PROTOCOLS[name], distributed.world_size()
    given = {k: v for k in ("batch_size", "lr", "head_lr") if (v := getattr(args, k)) is not None}
    protocol = dataclasses.replace(recipe.shortened(args.epochs or recipe.epochs), **given)
    changed = {k: v for k, v in dataclasses.asdict(protocol).items() if v != getattr(recipe, k)}
    if name.endswith("percent") and not args.subset and not args.train_share:
        raise UserError(f"--protocol {name} trains on few of the images: give the list of them "
                        "with --subset, or a --train-share.")
    if args.head_lr is not None and protocol.columns != (FINE_TUNED,):
        raise UserError(f"--head-lr {args.head_lr:g} is for fine-tuning: add --protocol finetune.")
    if protocol.batch_size % W or protocol.batch_size < 4 * W:  # 2 each in a last, short batch
        raise UserError(f"a batch of {protocol.batch_size} images cannot be split evenly over {W} "
                        "processes, at least 4 each: choose a --batch-size that can.")
    return name, protocol, changed


def choose_results(protocol, history):
    """{column: {"top1", "top5", "epoch"}} of the epoch that the protocol reports."""
    results = {}
    for column in protocol.columns:
        top1, top5 = zip(*(accuracy[column] for accuracy in history))
        epoch = top1.index(max(top1)) if protocol.reported == "best" else len(history) - 1
        results[column] = dict(top1=top1[epoch], top5=top5[epoch], epoch=epoch + 1)
    return results


def choose_images(dataset, subset=None, train_share=None, seed=0):
    """The images of an ImageSet to train on: all, or those of a list, or a share of each class.

    subset: a text file with an image's path in each line, perhaps followed by its label.
    train_share: 0 < share <= 1, of each class at least one image. Raises UserError.
    """
    if subset:
        with open(subset, encoding="utf-8-sig", errors="surrogateescape") as file:
            wanted = {re.sub(r"\s+\d{1,6}$", "", line.strip()) for line in file} - {""}
        index = {dataset.name_of(i): i for i in range(len(dataset))}
        absent = sorted(wanted - index.keys())
        if absent or not wanted:
            raise UserError(f"--subset {subset}: {len(absent)} of its {len(wanted)} images are not "
                            f"in {dataset.root} {absent[:1]}; it must name images by their paths.")
        return dataset.take(sorted(index[name] for name in wanted))
    if train_share:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        classes = [order[dataset.labels[order] == k] for k in range(len(dataset.classes))]
        chosen = torch.cat([rows[: max(1, round(len(rows) * train_share))] for rows in classes])
        return dataset.take(sorted(chosen.tolist()))
    return dataset


def make_optimizer(classifiers, protocol):
    """SGD with a group for the linear layers and, in fine-tuning, one for the backbone."""
    groups = [dict(params=classifiers.linears.parameters())]
    if protocol.columns == (FINE_TUNED,):
        groups.append(dict(params=classifiers.backbone.parameters()))
    return torch.optim.SGD(groups, protocol.lr, momentum=0.9, weight_decay=protocol.weight_decay,
                           nesterov=protocol.nesterov)


class LinearClassifiers(nn.Module):
    """A linear classifier for each column, on one forward pass of a FrozenBackbone, on its device.

    COLUMNS: pool -> batch norm -> Linear. AVGPOOL, FINE_TUNED: average of the last map -> Linear.
    """

    def __init__(self, network, columns, seed=0):
        super().__init__()
        self.columns = list(columns)
        self.maps = network.backbone.forward  # no submodule: a frozen one stays in eval mode
        if FINE_TUNED in columns:
            self.backbone = network.backbone.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        shapes = map_shapes(network.backbone, network.image_size)
        pools = map_pools(shapes)
        self.features, self.linears = nn.ModuleDict(), nn.ModuleDict()
        for column in columns:
            i, layers = MAPS[column], [nn.AdaptiveAvgPool2d(1)]
            if column in COLUMNS:
                layers = [pools[i], nn.BatchNorm2d(shapes[i][0], affine=False)]
            self.features[column] = nn.Sequential(*layers, nn.Flatten())
            width = layers[0](torch.zeros(shapes[i])).numel()
            linear = self.linears[column] = nn.Linear(width, len(network.train.classes))
            nn.init.normal_(linear.weight, std=0.01, generator=generator)
            nn.init.zeros_(linear.bias)
        self.to(network.device)
        if network.device.type == "cuda" and distributed.world_size() > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def forward(self, images):
        """Normalised images [B, 3, S, S] -> {column: logits [B, classes]}."""
        maps = self.maps(images)
        return {column: linear(self.features[column](maps[MAPS[column]]))
                for column, linear in self.linears.items()}
