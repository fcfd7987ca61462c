"""Batch norm over the processes against torch's batch norm of the whole batch."""

import pytest
import torch
from torch import nn

from odc import distributed
from odc.batchnorm import SyncBatchNorm, synchronise
from tests.processes import run_processes

ENDS = {1: [0, 12], 2: [0, 5, 12], 4: [0, 3, 6, 8, 12]}  # the parts of 12 rows, of different sizes


def three_steps(dims, affine):
    """Outputs and input gradients of this process's rows, statistics, and summed gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (12, 5) + ((4, 3) if dims == 4 else ())
    x = 3 * torch.randn(shape, generator=generator)
    x += 20 * torch.arange(5.0).view(1, 5, *[1] * (dims - 2))
    gradient = torch.randn(shape, generator=generator)
    norm = (nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d)(5, affine=affine)
    if affine:
        norm.weight.data = torch.rand(5, generator=generator) + 0.5
        norm.bias.data = torch.randn(5, generator=generator)
    if distributed.world_size() > 1:
        norm = synchronise(norm)
    ends = ENDS[distributed.world_size()]
    rows = slice(ends[distributed.rank()], ends[distributed.rank() + 1])
    parts = []
    for step in range(3):
        own = (x[rows] + step).requires_grad_()
        y = norm(own)
        y.backward(gradient[rows])
        parts += [y.detach(), own.grad]
    norm.eval()
    parts.append(norm(x[rows]).detach())
    shared = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    if affine:
        shared += [distributed.all_reduce(p.grad) for p in (norm.weight, norm.bias)]
    return parts, shared


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_torch_on_the_whole_batch(dims, affine):
    parts, shared = three_steps(dims, affine)
    for W in (2, 4):
        results = run_processes(three_steps, W, dims, affine)
        for i, whole in enumerate(parts):
            got = torch.cat([own[i] for own, _ in results])
            torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
        for _, own in results:
            for value, expected in zip(own, shared):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_one_process_is_torchs_own():
    x = torch.randn(6, 3, 4, 4)
    ours, torchs = SyncBatchNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(x), torchs(x)) and torch.equal(ours.running_var, torchs.running_var)


def test_all_layers_are_converted_and_keep_their_tensors():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(64))
    before = network.state_dict()
    synchronise(network)
    assert [type(m) for m in network][1::2] == [SyncBatchNorm, SyncBatchNorm]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
