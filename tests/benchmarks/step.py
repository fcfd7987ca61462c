"""A whole training step against a plain supervised step: same network, batch, images and augmentation.

    python -m tests.benchmarks.step     the demonstration's network on the CPU; resnet50 at 224, bf16, if there is a GPU

Both go through train.py's own loop or a copy of it without the memory; the images are made up and lie in memory.
"""

import contextlib
import random
import types

import torch
import torch.nn.functional as F

import train
from odc.data.augmentation import Augmentation, draw
from odc.data.loader import Batch
from odc.memory import ODCMemory
from odc.model import ODC
from odc.run import Run
from tests.benchmarks.timing import interleave, table


class MadeUpRun(Run):
    """What train_epoch needs of a run, without data, log and checkpoints."""

    def __init__(self, device, arch, size, batch, num_images, num_clusters, steps):
        self.device, self.size = device, size
        self.args, _ = train.parse(["--data", "made up", "--num-clusters", str(num_clusters)])
        self.args.checkpoint_interval = self.args.log_interval = 10**9
        self.output, self.global_step, self.steps, self.global_batch = "", 0, steps, batch
        self.interval = dict(steps=0, loss=0.0, change_ratio=0.0, splits=0)
        self.steps_here, self.error, self.log = 0, None, types.SimpleNamespace(error=None)
        torch.manual_seed(0)
        self.model = ODC(arch, size <= 64, num_clusters=num_clusters).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
        self.memory = ODCMemory(num_images, 256, num_clusters, device=device)
        labels = torch.arange(num_images) % num_clusters
        self.memory.initialize(torch.rand(num_images, 256), labels)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.autocast = contextlib.nullcontext
        if device.type == "cuda":
            self.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
        generator = random.Random(0)
        images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
        parameters = torch.tensor([draw(Augmentation(), generator, size, size, size) for _ in range(batch)])
        if device.type == "cuda":
            images = images.pin_memory()
        self.parts = images, parameters, torch.full((batch,), -1)

    def batches(self, epoch, first_step):
        images, parameters, failed = self.parts
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(first_step, self.steps):
            indices = torch.randint(len(self.memory.labels), (len(images),), generator=generator)
            yield Batch(images, parameters, indices, failed)


def plain_epoch(run):
    """The same number of steps of supervised training with fixed labels."""
    run.model.train()
    for batch in run.batches(0, 0):
        labels = run.memory.labels[batch.indices.to(run.device, non_blocking=True)]
        images = run.finish(batch)
        with run.autocast():
            _, logits = run.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        if not torch.isfinite(loss):  # every training loop looks at its loss
            raise FloatingPointError


def measure(title, run, rounds):
    functions = {"ODC step": lambda: train.train_epoch(run, 0, 0), "plain supervised step": lambda: plain_epoch(run)}
    times = {name: [seconds / run.steps for seconds in values]
             for name, values in interleave(functions, rounds=rounds).items()}
    rate = {name: f"{run.global_batch / sorted(values)[len(values) // 2]:,.0f} images/s" for name, values in times.items()}
    table(title, times, "ODC step", rate)


if __name__ == "__main__":
    if torch.cuda.is_available():
        run = MadeUpRun(torch.device("cuda", 0), "resnet50", 224, 512, 1_281_167, 10_000, steps=10)
        measure("resnet50, 224, bf16, channels_last, B = 512, N = 1,281,167, K = 10,000", run, rounds=8)
    else:
        run = MadeUpRun(torch.device("cpu"), "narrow", 32, 64, 5000, 60, steps=20)
        measure("narrow, 32, B = 64, N = 5,000, K = 60", run, rounds=8)
