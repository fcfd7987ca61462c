"""Linear classifiers on the maps of a frozen backbone, trained together on one forward pass.

The batch is split over the processes, and everything that mixes its images is summed over all of them: statistics,
losses, gradients and counts of correct answers. One process and eight compute the same.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from odc.runtime import program
from odc import distributed
from odc.runtime import checkpoint
from odc.data import loader
from odc.data.augmentation import LINEAR_AUGMENTATIONS, finish
from odc.distributed import print_main
from odc.errors import Interrupted, UserError
from odc.features import MAP_NAMES, extract_rows, map_pools, map_shapes, pooled_shapes, weights_fingerprint
from odc.runtime.log import plain_line, progress_bar

COLUMNS = [name.capitalize() for name in MAP_NAMES]  # Feature1 ... Feature5
AVGPOOL = "AvgPool"


@dataclass(frozen=True)
class Protocol:
    """How one benchmark trains and judges classifiers; lr is multiplied by lr_gamma at each epoch of lr_steps."""

    recipe: str
    columns: tuple  # of COLUMNS and AVGPOOL
    classes: int
    epochs: int
    lr: float
    lr_steps: tuple
    weight_decay: float
    nesterov: bool
    train_transform: str  # a key of odc.data.augmentation.LINEAR_AUGMENTATIONS
    report: str  # "last": the last epoch's accuracy, "best": that of the epoch with the best top-1
    batch_size: int = 256  # of all processes together
    lr_gamma: float = 0.1
    momentum: float = 0.9

    def shortened(self, epochs):
        """The same for another number of epochs, the steps of the learning rate moved in proportion."""
        steps = tuple(max(1, round(step * epochs / self.epochs)) for step in self.lr_steps)
        return dataclasses.replace(self, epochs=epochs, lr_steps=steps)


class GlobalNorm(nn.Module):
    """BatchNorm2d without affine parameters, with the statistics of the batch of all processes.

    Nothing before it learns, so its statistics need no gradient: two sums over the processes are all.
    """

    def __init__(self, channels, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @torch.no_grad()
    def forward(self, x):
        """[B, C, h, w] -> the same, standardised for each channel."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            # In double precision the difference of two large sums is harmless.
            count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
            wide = x.double()
            sums = torch.cat([count, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
            count, total, squares = distributed.all_reduce(sums).split([1, x.shape[1], x.shape[1]])
            mean = total / count
            var = (squares / count - mean.square()).clamp(min=0)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(unbiased.float(), self.momentum)
        scale = (var + self.eps).rsqrt().float()
        return (x - mean.float()[:, None, None]) * scale[:, None, None]


class Classifiers(nn.Module):
    """One linear classifier for each column.

    columns: of COLUMNS and AVGPOOL. shapes: [(C, h, w)] of the backbone's five maps. A FeatureN column is the recipe's
    pool -> GlobalNorm -> flatten -> Linear, AVGPOOL is the global average of the last map -> Linear.
    Linear layers start with N(0, 0.01) weights, drawn from the seed, and zero bias.
    """

    def __init__(self, columns, shapes, num_classes, seed=0):
        super().__init__()
        pools, pooled = map_pools(shapes), pooled_shapes(shapes)
        generator = torch.Generator().manual_seed(seed)
        self.pools = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.linears = nn.ModuleDict()
        for column in columns:
            i = COLUMNS.index(column) if column != AVGPOOL else 4
            channels, height, width = pooled[i] if column != AVGPOOL else (shapes[4][0], 1, 1)
            self.pools[column] = pools[i] if column != AVGPOOL else nn.AdaptiveAvgPool2d(1)
            self.norms[column] = GlobalNorm(channels) if column != AVGPOOL else nn.Identity()
            linear = nn.Linear(channels * height * width, num_classes)
            linear.weight.data.normal_(0, 0.01, generator=generator)
            linear.bias.data.zero_()
            self.linears[column] = linear

    def forward(self, maps):
        """The backbone's five maps -> {column: logits [B, classes]}."""
        logits = {}
        for column, linear in self.linears.items():
            feature_map = maps[COLUMNS.index(column)] if column != AVGPOOL else maps[4]
            features = self.norms[column](self.pools[column](feature_map.float()))
            logits[column] = linear(features.flatten(1))
        return logits


def train_step(classifiers, optimizer, maps, labels):
    """One step on this process's part of the batch; returns the mean loss [columns] over the batch of all processes.

    The gradient is that of the mean over the whole batch, also when the processes have parts of different sizes.
    """
    count = distributed.all_reduce(torch.tensor(float(len(labels)), device=labels.device))
    logits = classifiers(maps)
    losses = torch.stack([F.cross_entropy(values, labels, reduction="sum") / count for values in logits.values()])
    optimizer.zero_grad()
    losses.sum().backward()
    for parameter in classifiers.parameters():
        distributed.all_reduce(parameter.grad)
    optimizer.step()
    return distributed.all_reduce(losses.detach().clone())


class Training:
    """The classifiers of one run: trained, judged after each epoch, kept in a checkpoint. Every method is a collective.

    frozen: odc.evaluation.frozen.Frozen. protocols: the first sets epochs, batch and augmentation; all have columns of their
    own, for which they set the optimiser and which epoch is reported.
    path: where the checkpoint is written, and continued from if it is there; None for none.
    """

    def __init__(self, frozen, protocols, seed, path=None, checkpoint_interval=1000):
        self.frozen, self.protocols, self.protocol, self.seed = frozen, protocols, protocols[0], seed
        self.path, self.checkpoint_interval = path, checkpoint_interval
        self.columns = [column for protocol in protocols for column in protocol.columns]
        self.batch_size, uneven = divmod(self.protocol.batch_size, distributed.world_size())
        if uneven or self.batch_size < min(2, distributed.world_size()):
            raise UserError(f"a batch of {self.protocol.batch_size} images cannot be split evenly over "
                            f"{distributed.world_size()} processes, at least 2 each: choose a --batch-size that can.")
        shapes = map_shapes(frozen.backbone, frozen.image_size)
        self.classifiers = Classifiers(self.columns, shapes, self.protocol.classes, seed).to(frozen.device)
        self.optimizer = torch.optim.SGD([
            dict(params=[p for column in protocol.columns for p in self.classifiers.linears[column].parameters()],
                 lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay,
                 nesterov=protocol.nesterov and protocol.momentum > 0)
            for protocol in protocols
        ])
        self.epoch, self.step = 0, 0  # where to go on
        self.losses = torch.zeros(len(self.columns), device=frozen.device)  # sums over the epoch's steps so far
        self.history = []  # for every epoch {column: [top-1, top-5]}
        if path is not None:
            self.resume()

    def run(self):
        """Train to the end; `history` is complete afterwards."""
        while self.epoch < self.protocol.epochs:
            self.train_epoch()
            try:
                self.history.append(self.evaluate())
            except Interrupted:
                raise self.interrupted() from None
            self.epoch, self.step = self.epoch + 1, 0
            self.losses.zero_()
            self.save()

    def train_epoch(self):
        frozen, device = self.frozen, self.frozen.device
        for protocol, group in zip(self.protocols, self.optimizer.param_groups):
            group["lr"] = protocol.lr * protocol.lr_gamma ** sum(self.epoch >= step for step in protocol.lr_steps)
        augmentation = LINEAR_AUGMENTATIONS[self.protocol.train_transform]
        batches = loader.epoch_batches(
            frozen.train, augmentation, frozen.image_size, self.batch_size, self.seed, self.epoch, self.step,
            frozen.workers, pin_memory=device.type == "cuda")
        self.classifiers.train()
        failed, iterator, name = 0, iter(batches), f"epoch {self.epoch + 1}/{self.protocol.epochs}"
        with progress_bar(self.step + len(batches), self.step, name) as bar:
            for _ in range(len(batches)):
                with distributed.together():
                    batch = next(iterator)
                images = finish(batch.images.to(device, non_blocking=True), batch.parameters)
                labels = frozen.train.labels[batch.indices].to(device)
                self.losses += train_step(self.classifiers, self.optimizer, frozen.maps(images), labels)
                failed += int((batch.failed >= 0).sum())
                self.step += 1
                bar.update()
                stop = distributed.any_process(program.signal_is_pending())
                if stop or self.step % self.checkpoint_interval == 0:
                    self.save()
                if stop:
                    raise self.interrupted()
        failed = int(distributed.all_reduce(torch.tensor(failed)))
        if failed > 0.01 * len(frozen.train):
            raise UserError(f"{frozen.train.root}: {failed} of {len(frozen.train)} images cannot be read, over 1%; "
                            "repair or remove them.")
        self.save()

    def interrupted(self):
        """The exception for a stop at this step, which has been saved if it can be."""
        return Interrupted(f"Stopped in epoch {self.epoch + 1} after step {self.step}, as a signal asked"
                                       + ("; the same command continues." if self.path else "."))

    def evaluate(self):
        """Accuracy on the val split, in percent: {column: [top-1, top-5]}."""
        frozen, k = self.frozen, min(5, self.protocol.classes)
        self.classifiers.eval()

        def best_classes(images):
            """[B, 3, S, S] -> [B, columns * k], best first: what extract_rows takes for features."""
            logits = self.classifiers(frozen.maps(images))
            return torch.cat([values.topk(k).indices for values in logits.values()], dim=1)

        best = extract_rows(best_classes, frozen.val, frozen.transform, len(self.columns) * k, frozen.device,
                            self.batch_size, frozen.workers, name="val")
        labels = frozen.val.labels[distributed.shard(len(frozen.val))].to(frozen.device)
        hits = (best.view(len(best), len(self.columns), k) == labels[:, None, None]).double()
        correct = distributed.all_reduce(torch.stack([hits[:, :, 0].sum(0), hits.sum((0, 2))], dim=1))
        accuracy = dict(zip(self.columns, (100 * correct / len(frozen.val)).tolist()))
        losses = (self.losses / max(1, self.step)).tolist()
        plain_line(f"epoch {self.epoch + 1}/{self.protocol.epochs}: " + ", ".join(
            f"{column} loss {loss:.3f} top-1 {accuracy[column][0]:.2f}" for column, loss in zip(self.columns, losses)))
        return accuracy

    def results(self):
        """{column: {"top1", "top5", "epoch"}} of the epoch that the column's protocol reports."""
        results = {}
        for protocol in self.protocols:
            for column in protocol.columns:
                epoch = len(self.history) - 1
                if protocol.report == "best":
                    epoch = max(range(len(self.history)), key=lambda e: self.history[e][column][0])
                top1, top5 = self.history[epoch][column]
                results[column] = dict(top1=top1, top5=top5, epoch=epoch + 1)
        return results

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def settings(self):
        """What must be the same for a run to be continued."""
        frozen = self.frozen
        settings = dict(seed=self.seed, image_size=frozen.image_size, amp=frozen.amp,
                        weights=weights_fingerprint(frozen.backbone)[:16],
                        train_images=frozen.train.labelled_fingerprint, val_images=frozen.val.labelled_fingerprint)
        for protocol in self.protocols:
            for name, value in dataclasses.asdict(protocol).items():
                settings[f"{name} of {' '.join(protocol.columns)}"] = str(value)
        return settings

    def save(self):
        """Write the checkpoint, if there is to be one. Raises UserError if the training has failed."""
        if not self.losses.isfinite().all():
            raise UserError(f"the loss is not finite in epoch {self.epoch + 1}, by step {self.step}: lower --lr.")
        if self.path is not None:
            with distributed.together():
                if distributed.is_main():
                    checkpoint.save(self.path, dict(
                        program="odc eval_linear", settings=self.settings(), epoch=self.epoch, step=self.step,
                        classifiers=self.classifiers.state_dict(), optimizer=self.optimizer.state_dict(),
                        losses=self.losses, history=self.history))

    def resume(self):
        """Continue from the checkpoint if there is one. Raises UserError if it is another run's."""
        state = None
        with distributed.together():
            if self.path.exists():
                state = checkpoint.load(self.path)
                remedy = "give the same, or another --output, or delete the file."
                if state.get("program") != "odc eval_linear":
                    raise UserError(f"{self.path} is not a checkpoint of eval_linear.py: {remedy}")
                before, now = state["settings"], self.settings()
                for name in sorted(before.keys() | now.keys()):
                    if before.get(name) != now.get(name):
                        what = name.replace("_", " ")
                        raise UserError(f"{self.path} holds a run with {what} {before.get(name)}, not {now.get(name)}: "
                                        f"{remedy}")
        if state is not None:
            self.classifiers.load_state_dict(state["classifiers"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
            self.losses.copy_(state["losses"])
            done = self.epoch == self.protocol.epochs
            print_main(f"{self.path} holds the finished run." if done else
                       f"Continuing {self.path} at epoch {self.epoch + 1}, step {self.step + 1}.")
