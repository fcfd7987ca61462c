"""The average pools of the five feature maps leave the recipe's grids."""

import pytest
import torch

from odc.evaluation.pooling import map_pools, map_shapes
from odc.model import ResNet


@pytest.mark.parametrize("arch, size, grids", [
    ("resnet50", 224, [12, 6, 4, 3, 2]), ("resnet18", 224, [12, 6, 4, 3, 2]),
    ("resnet50", 160, [12, 6, 4, 3, 2]), ("narrow", 32, [12, 6, 4, 3, 2]),
    ("resnet18", 32, [12, 6, 4, 2, 1])])  # no larger than maps of 16, 8, 4, 2, 1
def test_grids(arch, size, grids):
    shapes = map_shapes(ResNet(arch, arch == "narrow"), size)
    pooled = [pool(torch.zeros(2, *shape)) for pool, shape in zip(map_pools(shapes), shapes)]
    assert [tuple(x.shape) for x in pooled] == [
        (2, channels, grid, grid) for (channels, *_), grid in zip(shapes, grids)]
    if (arch, size) == ("resnet50", 224):
        assert [channels for channels, *_ in shapes] == [64, 256, 512, 1024, 2048]
        assert [x[0].numel() for x in pooled] == [9216, 9216, 8192, 9216, 8192]


def test_first_pool_counts_its_padding():
    pool = map_pools(map_shapes(ResNet("resnet50"), 224))[0]
    corner = pool(torch.ones(1, 1, 112, 112))[0, 0, 0, 0]
    assert corner == pytest.approx(36 / 100)  # 6 x 6 pixels of 10 x 10 are in the map
