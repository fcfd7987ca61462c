"""A whole training step against a plain supervised step: same network, batch, images, augmentation.

    python -m tests.benchmarks.step     the demonstration's network on the CPU; resnet50 at 224
                                        pixels, in bf16, with --device cuda

Ours is train.train_epoch itself. The images are made up and lie in memory.
"""

import argparse
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


def make_state(device, arch, size, num_images, num_clusters):
    """train.State on made-up features."""
    torch.manual_seed(0)
    network = ODC(arch, size <= 64, num_clusters=num_clusters)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    memory = ODCMemory(num_images, 256, num_clusters, device=device)
    memory.initialize(torch.rand(num_images, 256, device=device),
                      torch.arange(num_images) % num_clusters)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return train.State(network, optimizer, scaler, {}, None, memory)


def make_batches(device, size, batch, num_images, steps):
    """Batches of one set of random pixels and draws, and of other images each."""
    generator = random.Random(0)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    images = images.pin_memory() if device.type == "cuda" else images
    draws = torch.tensor([draw_parameters(Augmentation(), generator, size, size, size)
                          for _ in range(batch)])
    return [Batch(images, draws, torch.randint(num_images, (batch,)), {})
            for _ in range(steps)]


def plain_epoch(state, batches, autocast):
    """Steps of supervised training with fixed labels."""
    model, device = state.network.train(), state.memory.labels.device
    for batch in batches:
        labels = state.memory.labels[batch.indices.to(device, non_blocking=True)]
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        with autocast:
            _, logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        if not torch.isfinite(loss):  # every training loop looks at its loss
            raise FloatingPointError


def main(device):
    arch, size, batch, N, K, steps = (
        ("resnet50", 224, 512, 1_281_167, 10_000, 10) if device.type == "cuda" else
        ("narrow", 32, 64, 5000, 60, 20))
    args = argparse.Namespace(**settings.RECIPE | dict(
        workers=0, arch=arch, image_size=size, batch_size=batch, num_clusters=K,
        checkpoint_interval=10**9))
    dataset = ImageSet("folder", "train", "made up", pixels=range(batch * steps))
    state = make_state(device, arch, size, N, K)
    batches = make_batches(device, size, batch, N, steps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def odc_epoch():
        state.progress.step = 0
        with mock.patch.object(train, "training_batches", lambda *_, **__: batches), (
                mock.patch.object(train, "LOG_INTERVAL", 10**9)):
            train.train_epoch(args, state, state.network, dataset, mock.Mock(), autocast)

    times = interleave({"ODC step": odc_epoch, "plain supervised step":
                        lambda: plain_epoch(state, batches, autocast)}, rounds=8)
    times = {name: [seconds / steps for seconds in values] for name, values in times.items()}
    rates = {name: f"{batch / sorted(values)[len(values) // 2]:,.0f} images/s"
             for name, values in times.items()}
    table(f"{arch}, {size} pixels, {'bf16' if device.type == 'cuda' else 'float32'}, B = {batch}, "
          f"N = {N:,}, K = {K:,}", times, "ODC step", rates, device)


if __name__ == "__main__":
    main(make_parser(__doc__).parse_args().device)
