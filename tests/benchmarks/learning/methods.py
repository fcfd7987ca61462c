"""Ways to train the same network on the same images: the peers of ODC, and labels as the ceiling.

First weights, augmentation, batch size and the number of crops are ODC's, which sees one crop of an
image. So a method with V crops of an image takes 1 / V as many steps, rounded up; the learning rate
follows them. A smaller crop counts by its area. Heads, optimizers and learning rates are those for
CIFAR-10, which has small images, too: of lightly's benchmark for SimSiam, BYOL and SwAV (here with
a prototype for each cluster), of solo-learn for VICReg, of the authors' code for EMP-SSL.
"""

import copy
import functools
import math
import random
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP

from odc.data.augmentation import (AUGMENTATIONS, augment_batch, crop_and_flip, draw_parameters,
                                   to_cut)
from odc.data.loader import steps_per_epoch
from odc.model import ODC, use_small_stem


class Crops(NamedTuple):
    """Crops of each image. scale: their least and largest share of its area; (): as ODC's."""

    count: int
    side: float = 1.0  # as a share of ODC's
    scale: tuple = ()

    def pixels(self, image_size):
        return image_size if self.side == 1 else max(4, round(self.side * image_size / 4) * 4)


class LARS(torch.optim.SGD):
    """You et al. 2017, as solo-learn has it: biases and norms have neither trust nor decay."""

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for weight in (weight for weight in group["params"] if weight.ndim > 1):
            size, decay = weight.norm(), group["decay"]
            rate = group["trust"] * size / (weight.grad.norm() + decay * size + 1e-8)
            weight.grad.add_(weight, alpha=decay).mul_((rate / group["lr"]).clamp(max=1))
        super().step()


# Linear layers, from a width to a list of widths; batch norm and ReLU after each but the last.
mlp = functools.partial(MLP, norm_layer=nn.BatchNorm1d)


class Peer(nn.Module):
    """A backbone and the heads that train it. optimizer: class, rate for each image, options.

    forward: the loss, from pooled(network), which is its features of every crop, [B, width] each.
    """

    crops = (Crops(2),)
    optimizer = torch.optim.SGD, 0.06 / 128, dict(momentum=0.9, weight_decay=5e-4)

    def __init__(self, backbone, num_clusters, num_classes, steps):
        super().__init__()
        self.backbone, self.steps = backbone, steps
        self.build(backbone.out_channels[-1], num_clusters, num_classes)


class SimSiam(Peer):
    """Chen and He 2021, with the two-layer projection that the paper has for CIFAR."""

    def build(self, width, num_clusters, num_classes):
        self.projection = nn.Sequential(mlp(width, [2048, 2048]), nn.BatchNorm1d(2048))
        self.prediction = mlp(2048, [512, 2048])

    def targets(self, pooled, z):
        return [rows.detach() for rows in z]

    def forward(self, pooled, labels, step):
        z = [self.projection(view) for view in pooled(self.backbone)]
        p, targets = [self.prediction(rows) for rows in z], self.targets(pooled, z)
        return -(F.cosine_similarity(p[0], targets[1]).mean()
                 + F.cosine_similarity(p[1], targets[0]).mean()) / 2


class BYOL(SimSiam):
    """Grill et al. 2020: the targets come from a moving average of the weights."""

    def build(self, width, num_clusters, num_classes):
        self.projection, self.prediction = mlp(width, [1024, 256]), mlp(256, [1024, 256])
        self.online = nn.ModuleList([self.backbone, self.projection])
        self.average = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def targets(self, pooled, z):
        for average, weight in zip(self.average.parameters(), self.online.parameters()):
            average.lerp_(weight, 0.01)
        return [self.average[1](view) for view in pooled(self.average[0])]


class SwAV(Peer):
    """Caron et al. 2020, with a queue, as the paper advises for small batches, and small crops.

    In the paper large crops have 14% of an image or more, small ones 5 to 14%; here 50%, and 18 to
    50%. The small ones come first: the large ones so weigh more in batch norm's mean.
    """

    crops = (Crops(4, 96 / 224, (0.18, 0.5)), Crops(2))
    optimizer = torch.optim.Adam, 1e-3 / 128, dict(weight_decay=1e-6)
    queue_batches, queue_from = 15, 0.1  # used after a tenth of the steps

    def build(self, width, num_clusters, num_classes):
        self.projection = mlp(width, [512, 128])
        self.prototypes, self.queue = nn.Linear(128, num_clusters, bias=False), []

    def forward(self, pooled, labels, step):
        z = [F.normalize(self.projection(view)) for view in pooled(self.backbone)]
        queue = self.queue if step >= self.queue_from * self.steps else []
        with torch.no_grad():  # codes of the large crops, which are the last two
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
            codes = [sinkhorn(self.prototypes(torch.cat(rows)))[: len(z[0])]
                     for rows in zip(z[-2:], *queue)]
        self.queue = [[rows.detach() for rows in z[-2:]], *self.queue][: self.queue_batches]
        logits = [self.prototypes(rows) / 0.1 for rows in z]
        losses = [F.cross_entropy(rows, code) for i, code in enumerate(codes, len(z) - 2)
                  for j, rows in enumerate(logits) if i != j]
        return sum(losses) / len(losses)


def sinkhorn(cosines):
    """Codes [B, K] whose rows sum to 1, and in which all K prototypes have nearly equal shares."""
    codes = torch.exp(cosines / 0.05)
    for _ in range(3):
        codes = codes / codes.sum(0)
        codes = codes / codes.sum(1, keepdim=True)
    return codes


class VICReg(Peer):
    """Bardes et al. 2022."""

    optimizer = LARS, 0.3 / 256, dict(momentum=0.9, decay=1e-4, trust=0.02)

    def build(self, width, num_clusters, num_classes):
        self.projection = mlp(width, [2048, 2048, 2048])

    def forward(self, pooled, labels, step):
        views = [self.projection(view) for view in pooled(self.backbone)]
        loss = 25 * F.mse_loss(*views)
        for z in views:
            covariance = torch.cov(z.T)
            variance = covariance.diagonal()
            others = (covariance.square().sum() - variance.square().sum()) / len(variance)
            loss = loss + others + 25 / 2 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        return loss


class EMPSSL(Peer):
    """Tong et al. 2023, on patches of a quarter of an image, enlarged to its size.

    They have 20 to 200. With 8 it takes 400 steps in 200,000 crops, nearly as in their one epoch.
    It never sees a whole image, so in evaluation one is enlarged, too: the mean of all patches.
    """

    crops = (Crops(8, scale=(0.25, 0.25)),)
    optimizer = LARS, 0.3 / 100, dict(momentum=0.9, decay=1e-4, trust=0.005, nesterov=True)

    def build(self, width, num_clusters, num_classes):
        self.projection = mlp(width, [4096, 4096, 1024])
        self.backbone.register_forward_pre_hook(lambda network, images: None if network.training
                                                else F.interpolate(*images, None, 2, "bilinear"))

    def forward(self, pooled, labels, step):
        z = torch.stack([self.projection(view) for view in pooled(self.backbone)])
        z = F.normalize(z, dim=-1)
        _, B, d = z.shape
        similarity = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
        # I + Z Z' [B, B] has the determinant of I + Z' Z [d, d]. lightly 1.5.22 adds the coding
        # rate, which the paper and its code subtract.
        gram = torch.eye(B, device=z.device) + d / (0.2 * B) * z @ z.mT
        return -200 * similarity - torch.logdet(gram).mean() / 2


class Labels(Peer):
    """Classification into the true classes."""

    crops = (Crops(1),)
    optimizer = torch.optim.SGD, 0.1 / 128, dict(momentum=0.9, weight_decay=5e-4)

    def build(self, width, num_clusters, num_classes):
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, pooled, labels, step):
        return F.cross_entropy(self.classifier(pooled(self.backbone)[0]), labels)


class Views(torch.utils.data.Dataset):
    """Item t is step t's batch: B images, drawn with replacement, each in several crops.

    [(pixels, draws) of each Crops], labels [B]. pixels: uint8 [count * B, 3, s, s], the first
    crops of all images first. draws: the numbers of Draw, [count * B, 15].
    """

    def __init__(self, images, augmentation, image_size, batch_size, crops, steps, seed):
        self.images, self.augmentation, self.image_size = images, augmentation, image_size
        self.batch_size, self.crops, self.steps, self.seed = batch_size, crops, steps, seed

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        generator, groups = random.Random(self.seed * 1_000_003 + step), []
        indices = [generator.randrange(len(self.images)) for _ in range(self.batch_size)]
        opened = [to_cut(self.augmentation, self.image_size, self.images.load(i)) for i in indices]
        for crops in self.crops:
            size, rows = crops.pixels(self.image_size), []
            scale = dict(zip(("min_scale", "max_scale"), crops.scale))
            augmentation = replace(self.augmentation, **scale)
            for image in opened * crops.count:
                drawn = draw_parameters(augmentation, generator, *image.shape[1:], size)
                rows.append((crop_and_flip(image, drawn, size), torch.tensor(drawn)))
            groups.append(tuple(map(torch.stack, zip(*rows))))
        return groups, self.images.labels[indices]


def first_network(args):
    """The backbone as train.py starts with it. args: train.py's."""
    torch.manual_seed(args.seed)
    return ODC(args.arch, use_small_stem(args.image_size), num_clusters=args.num_clusters).backbone


def train(method, args, images, device):
    """Train a backbone by a class above. args: train.py's; images: an ImageSet with labels."""
    S, B = args.image_size, args.batch_size
    area = sum(crops.count * (crops.pixels(S) / S) ** 2 for crops in method.crops)
    steps = math.ceil(args.epochs * steps_per_epoch(len(images), B) / area)
    batches = torch.utils.data.DataLoader(
        Views(images, AUGMENTATIONS[args.augmentation], S, B, method.crops, steps, args.seed),
        batch_size=None, num_workers=args.workers)
    backbone = first_network(args)
    peer = method(backbone, args.num_clusters, len(images.classes), steps)
    peer.to(device, memory_format=torch.channels_last).train()
    kind, rate, options = method.optimizer
    learned = [weight for weight in peer.parameters() if weight.requires_grad]
    optimizer = kind([dict(options, params=learned, lr=rate * B)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (groups, labels) in enumerate(batches):
        views = []
        for crops, (pixels, draws) in zip(method.crops, groups):
            views += augment_batch(pixels.to(device), draws).contiguous(
                memory_format=torch.channels_last).chunk(crops.count)

        def pooled(network):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                return [network(view)[-1].mean((2, 3)).float() for view in views]

        loss = peer(pooled, labels.to(device), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return backbone.eval()
