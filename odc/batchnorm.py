"""Batch norm with the statistics of the batch of all processes.

torch.nn.SyncBatchNorm makes the CPU wait for the GPU three times in every layer and works on CUDA
alone. This one sends one small vector a layer and direction, never waits, and runs on any device.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from odc import distributed


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d over the processes. They may have batches of different sizes."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        """[B, C] or [B, C, h, w] -> the same shape. A collective in training."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _Normalise.apply(x, self.weight, self.bias, self.running_mean, self.running_var,
                                self.momentum, self.eps)


class _Normalise(torch.autograd.Function):
    """y = w (x - mean) / sqrt(var + eps) + b, where mean and var depend on all processes' x."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        dims = [d for d in range(x.dim()) if d != 1]
        own_var, own_mean = torch.var_mean(x.float(), dims, correction=0)
        own_count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        # Means are taken relative to the running mean, so that the squares below stay small.
        offset = running_mean.double()
        own_mean = own_mean.double() - offset
        sums = distributed.all_reduce(torch.cat([
            own_count, own_count * own_mean, own_count * (own_var + own_mean.square())]))
        count, total, squares = sums.split([1, len(offset), len(offset)])
        mean = total / count
        var = (squares / count - mean.square()).clamp(min=0)
        mean += offset
        running_mean.lerp_(mean.float(), momentum)
        running_var.lerp_((var * count / (count - 1).clamp(min=1)).float(), momentum)
        mean, var = mean.float(), var.float()
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, var, count = ctx.saved_tensors
        # As if mean and var were constants: this also sums dy and dy * (x - mean) / sqrt(var).
        ones = torch.ones_like(mean) if weight is None else weight
        unused = mean.new_empty(0)  # CUDA takes no None here
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, ones, mean, var, unused, unused, False, ctx.eps, [True, True, True])
        # What mean and var of all processes add: a number for each channel, and a multiple of x.
        sums = distributed.all_reduce(torch.stack([d_bias, d_weight]).double()) / count
        scale = (var.double() + ctx.eps).rsqrt()
        slope = -ones * scale * scale * sums[1]
        shift = -ones * scale * sums[0] - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        dx = dx + torch.addcmul(shift.to(dx.dtype).view(shape), slope.to(dx.dtype).view(shape), x)
        if weight is None:
            d_weight = d_bias = None
        return dx, d_weight, d_bias, None, None, None, None


def synchronise(module):
    """Turn every BatchNorm1d and BatchNorm2d inside a module into a `SyncBatchNorm`, in place."""
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            child.__class__ = SyncBatchNorm
    return module


def share_statistics(network):
    """Copy process 0's running statistics to all: they measure and save the same network."""
    for buffer in network.buffers():
        distributed.broadcast(buffer)
