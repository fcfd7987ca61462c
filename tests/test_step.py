"""train_epoch against the paper's steps, written out one after the other."""

import argparse
import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import train
from odc import distributed, settings
from odc.data.augmentation import augment_batch
from odc.data.images import ImageSet
from odc.memory import ODCMemory
from odc.model import ODC
from tests.benchmarks.step import make_batches
from tests.test_memory import SimpleMemory, draw

N, K, D, B, STEPS = 40, 5, 16, 8, 5


@pytest.mark.parametrize("crops, plain", [(1, False), (4, True)])
def test_every_step_is_the_papers(monkeypatch, crops, plain):
    args = argparse.Namespace(**settings.RECIPE | dict(
        workers=0, image_size=16, batch_size=B, centroids_interval=3, crops=crops))
    torch.manual_seed(0)
    network = ODC("narrow", True, D, K, plain_neck=plain)
    optimizer = torch.optim.SGD([
        {"params": [*network.backbone.parameters(), *network.neck.parameters()]},
        {"params": network.head.parameters(), "momentum": 0.0}], 1.0, 0.9, weight_decay=1e-5)
    simple, features_and_labels = copy.deepcopy(network).train(), draw(N, D, K)[:2]
    reference = SimpleMemory(*features_and_labels, K, args.memory_momentum, 6)
    memory = ODCMemory(N, D, K, args.memory_momentum, 6)
    memory.initialize(*features_and_labels)
    state = train.State(network, optimizer, torch.amp.GradScaler("cpu", enabled=False), {}, None,
                        memory)
    batches = make_batches(torch.device("cpu"), 16, B, N, STEPS)
    for batch in batches:
        batch.indices.copy_(batch.indices[::crops].repeat_interleave(crops))
    monkeypatch.setattr(train, "training_batches", lambda *_, **__: batches)
    train.train_epoch(args, state, network, ImageSet("", "", "", pixels=range(N)), mock.Mock(),
                      torch.autocast("cpu", enabled=False))

    velocity = [torch.zeros_like(p) for p in simple.parameters()]
    for step, batch in enumerate(batches):
        distributed.seed(args.seed, 0, step)
        z, logits = simple(augment_batch(batch.images, batch.draws))
        weights = reference.sizes().clamp(min=1) ** -0.5
        loss = F.cross_entropy(logits, reference.y[batch.indices], weight=weights / weights.sum())
        gradients = torch.autograd.grad(loss, list(simple.parameters()))
        z = F.normalize(z.detach()).view(B // crops, crops, D).mean(1)
        reference.update_samples(batch.indices[::crops], z)
        for (name, p), v, g in zip(simple.named_parameters(), velocity, gradients):
            v.mul_(0 if name.startswith("head") else 0.9).add_(g + 1e-5 * p.detach())
            p.data -= args.lr * v
        if step % 3 == 2:
            reference.update_centroids()
        reference.split_small_clusters()
    assert torch.equal(memory.labels, reference.y)
    torch.testing.assert_close(memory.features.double(), reference.F, atol=1e-4, rtol=0)
    for p, expected in zip(network.parameters(), simple.parameters()):
        torch.testing.assert_close(p, expected, atol=1e-4, rtol=1e-3)
