"""A whole training step against a plain supervised step: same network, batch, images, augmentation.

    python -m tests.benchmarks.step     the demonstration's network on the CPU; resnet50 at 224
                                        pixels, in bf16, with --device cuda

Ours is train.train_epoch itself. The images are made up and lie in memory.
"""

import random
from unittest import mock

import torch
import torch.nn.functional as F

import train
from odc import settings
from odc.data.augmentation import Augmentation, augment_batch, draw_parameters
from odc.data.images import ImageSet
from odc.data.loader import Batch
from odc.memory import ODCMemory
from odc.model import ODC
from tests.benchmarks.timing import interleave, make_parser, table


class MadeUp:
    """What a step needs: arguments, state, and batches of random pixels."""

    def __init__(self, device, arch, size, batch, num_images, num_clusters, steps, amp="off"):
        self.args, _ = settings.parse([
            "--data", "made up", "--arch", arch, "--image-size", str(size), "--batch-size",
            str(batch), "--num-clusters", str(num_clusters), "--checkpoint-interval", str(10**9),
            "--log-interval", str(10**9)])
        self.device, self.steps, self.batch = device, steps, batch
        self.dataset = ImageSet("folder", "train", "made up", pixels=range(batch * steps))
        torch.manual_seed(0)
        network = ODC(arch, size <= 64, num_clusters=num_clusters)
        network = network.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
        memory = ODCMemory(num_images, 256, num_clusters, device=device)
        memory.initialize(torch.rand(num_images, 256, device=device),
                          torch.arange(num_images) % num_clusters)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.state = train.State(network, optimizer, scaler, memory, train.Progress())
        self.autocast = torch.autocast(
            device.type, enabled=amp != "off",
            dtype=torch.float16 if amp == "fp16" else torch.bfloat16)
        generator = random.Random(0)
        images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
        draws = torch.tensor([draw_parameters(Augmentation(), generator, size, size, size)
                              for _ in range(batch)])
        if device.type == "cuda":
            images = images.pin_memory()
        self.parts = images, draws, torch.full((batch,), -1)

    def batches(self, *_, **__):
        images, draws, failed = self.parts
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            indices = torch.randint(len(self.state.memory.labels), (self.batch,),
                                    generator=generator)
            yield Batch(images, draws, indices, failed)


def odc_epoch(made_up, model):
    """train.train_epoch on made-up batches."""
    made_up.state.progress.step = 0
    with mock.patch.object(train, "training_batches", made_up.batches):
        train.train_epoch(made_up.args, made_up.state, model, made_up.dataset, None,
                          made_up.autocast)


def plain_epoch(made_up, model):
    """The same number of steps of supervised training with fixed labels."""
    state, device = made_up.state, made_up.device
    model.train()
    for batch in made_up.batches():
        labels = state.memory.labels[batch.indices.to(device, non_blocking=True)]
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        images = images.contiguous(memory_format=torch.channels_last)
        with made_up.autocast:
            _, logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if not torch.isfinite(loss):  # every training loop looks at its loss
            raise FloatingPointError


def measure(made_up, rounds=8, compiled=False):
    """{"ODC step", "plain supervised step": [seconds a step, one for each round]}."""
    model = torch.compile(made_up.state.network) if compiled else made_up.state.network
    times = interleave({"ODC step": lambda: odc_epoch(made_up, model),
                        "plain supervised step": lambda: plain_epoch(made_up, model)}, rounds)
    return {name: [seconds / made_up.steps for seconds in values]
            for name, values in times.items()}


def rates(times, batch):
    """{name: images a second, as text} at the median."""
    return {name: f"{batch / sorted(values)[len(values) // 2]:,.0f} images/s"
            for name, values in times.items()}


if __name__ == "__main__":
    device = make_parser(__doc__).parse_args().device
    if device.type == "cuda":
        made_up = MadeUp(device, "resnet50", 224, 512, 1_281_167, 10_000, steps=10, amp="bf16")
        title = "resnet50, 224, bf16, B = 512, N = 1,281,167, K = 10,000"
    else:
        made_up = MadeUp(device, "narrow", 32, 64, 5000, 60, steps=20)
        title = "narrow, 32, B = 64, N = 5,000, K = 60"
    times = measure(made_up)
    table(title, times, "ODC step", rates(times, made_up.batch), device)
