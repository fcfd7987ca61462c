"""Ways to train the same network on the same images: the peers of ODC, and labels as the ceiling.

SimSiam and SwAV are of lightly: its heads and losses, and the optimizers of its benchmark on
CIFAR-10, which has small images, too. The rest is ODC's: the first weights, the augmentation, the
batch size and the number of images that are drawn. Both need two views of an image, so they do
twice the arithmetic for it. SwAV has as many prototypes as ODC has clusters, and no small crops.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from odc.data.augmentation import Augmentation, augment_batch, crop_and_flip, draw_parameters
from odc.data.loader import steps_per_epoch
from odc.model import ODC, use_small_stem


class SimSiam(nn.Module):
    """SimSiam (Chen and He 2021), with the two-layer projection that the paper has for CIFAR."""

    num_views = 2

    def __init__(self, width, num_clusters, num_classes, steps):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead
        super().__init__()
        self.projection = ProjectionHead([
            (width, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
            (2048, 2048, nn.BatchNorm1d(2048), None)])
        self.prediction = SimSiamPredictionHead(2048, 512, 2048)
        self.similarity = NegativeCosineSimilarity()

    def optimizer(self, parameters, batch_size):
        return torch.optim.SGD(parameters, 0.06 * batch_size / 128, 0.9, weight_decay=5e-4)

    def forward(self, views, labels, step):
        """views: pooled features [B, width] of both views. Returns the loss."""
        z = [self.projection(view) for view in views]
        p = [self.prediction(projected) for projected in z]
        return (self.similarity(p[0], z[1].detach()) + self.similarity(p[1], z[0].detach())) / 2


class SwAV(nn.Module):
    """SwAV (Caron et al. 2020), with a queue, as the paper advises for small batches."""

    num_views, queue_batches, queue_from = 2, 15, 0.1  # used after a tenth of the steps

    def __init__(self, width, num_clusters, num_classes, steps):
        from lightly.loss import SwaVLoss
        from lightly.models.modules.heads import SwaVProjectionHead, SwaVPrototypes
        super().__init__()
        self.projection = SwaVProjectionHead(width, 512, 128)
        self.prototypes = SwaVPrototypes(128, num_clusters)
        self.swapped_loss = SwaVLoss()
        self.queue, self.queue_start = [], self.queue_from * steps

    def optimizer(self, parameters, batch_size):
        return torch.optim.Adam(parameters, 1e-3 * batch_size / 128, weight_decay=1e-6)

    def forward(self, views, labels, step):
        """views: pooled features [B, width] of both views. Returns the loss."""
        self.prototypes.normalize()
        z = [F.normalize(self.projection(view)) for view in views]
        queue = None
        if self.queue and step >= self.queue_start:
            with torch.no_grad():
                queue = [self.prototypes(torch.cat(rows)) for rows in zip(*self.queue)]
        loss = self.swapped_loss([self.prototypes(rows) for rows in z], [], queue)
        self.queue = [[rows.detach() for rows in z], *self.queue][: self.queue_batches]
        return loss


class Labels(nn.Module):
    """Classification into the true classes."""

    num_views = 1

    def __init__(self, width, num_clusters, num_classes, steps):
        super().__init__()
        self.classifier = nn.Linear(width, num_classes)

    def optimizer(self, parameters, batch_size):
        return torch.optim.SGD(parameters, 0.1 * batch_size / 128, 0.9, weight_decay=5e-4)

    def forward(self, views, labels, step):
        """views: pooled features [[B, width]]. Returns the loss."""
        return F.cross_entropy(self.classifier(views[0]), labels)


class Views(torch.utils.data.Dataset):
    """Item t is step t's batch: B images, drawn with replacement, each in several views.

    pixels uint8 [views * B, 3, S, S], the first views of all images first; the numbers of Draw
    [views * B, 16]; labels [B].
    """

    def __init__(self, images, augmentation, image_size, batch_size, num_views, steps, seed):
        self.images, self.augmentation, self.image_size = images, augmentation, image_size
        self.batch_size, self.num_views, self.steps, self.seed = batch_size, num_views, steps, seed

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        generator, rows = random.Random(self.seed * 1_000_003 + step), []
        indices = [generator.randrange(len(self.images)) for _ in range(self.batch_size)]
        opened = [self.images.load(index) for index in indices]
        for image in opened * self.num_views:
            drawn = draw_parameters(self.augmentation, generator, *image.size, self.image_size)
            rows.append((crop_and_flip(image, drawn, self.image_size), torch.tensor(drawn)))
        pixels, draws = map(torch.stack, zip(*rows))
        return pixels, draws, self.images.labels[indices]


def first_network(args):
    """The backbone as train.py starts with it. args: train.py's."""
    torch.manual_seed(args.seed)
    return ODC(args.arch, use_small_stem(args.image_size), num_clusters=args.num_clusters).backbone


def train(method, args, images, device):
    """Train a backbone by a class above. args: train.py's; images: an ImageSet with labels."""
    steps = args.epochs * steps_per_epoch(len(images), args.batch_size)
    augmentation = Augmentation(min_scale=args.crop_scale, jitter=tuple(args.jitter))
    batches = torch.utils.data.DataLoader(
        Views(images, augmentation, args.image_size, args.batch_size, method.num_views, steps,
              args.seed), batch_size=None, num_workers=args.workers)
    backbone = first_network(args)
    objective = method(backbone.out_channels[-1], args.num_clusters, len(images.classes), steps)
    network = nn.ModuleList([backbone, objective]).to(device, memory_format=torch.channels_last)
    optimizer = objective.optimizer(network.parameters(), args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for step, (pixels, draws, labels) in enumerate(batches):
        crops = augment_batch(pixels.to(device), draws).contiguous(
            memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            views = [backbone(view)[-1].mean((2, 3)) for view in crops.chunk(method.num_views)]
        views = [view.float() for view in views]
        loss = objective(views, labels.to(device), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return backbone.eval()
