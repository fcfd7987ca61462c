"""The average pools of the five feature maps leave the recipe's grids."""

import pytest
import torch

from odc.evaluation.pooling import map_pools, map_shapes
from odc.model import ResNet


def pooled_shapes(shapes):
    """The shapes of maps of such shapes after their pools."""
    return [tuple(pool(torch.zeros(shape)).shape) for pool, shape in zip(map_pools(shapes), shapes)]


def test_pooled_dims_of_resnet50_at_224():
    shapes = map_shapes(ResNet("resnet50"), 224)
    assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [c * h * w for c, h, w in pooled_shapes(shapes)] == [9216, 9216, 8192, 9216, 8192]
    assert [h for _, h, _ in pooled_shapes(shapes)] == [12, 6, 4, 3, 2]


def test_first_pool_counts_its_padding():
    pool = map_pools(map_shapes(ResNet("resnet50"), 224))[0]
    corner = pool(torch.ones(1, 1, 112, 112))[0, 0, 0, 0]
    assert corner == pytest.approx(36 / 100)  # 6 x 6 pixels of 10 x 10 are in the map


@pytest.mark.parametrize("arch, size", [("resnet18", 224), ("resnet50", 160), ("narrow", 32),
                                        ("resnet18", 48)])
def test_other_sizes_pool_to_the_same_grid(arch, size):
    shapes = map_shapes(ResNet(arch, size <= 64), size)
    pooled = pooled_shapes(shapes)
    grids = [12, 6, 4, 3, 2]
    assert [h for _, h, _ in pooled] == [min(grid, h) for grid, (_, h, _) in zip(grids, shapes)]
    for pool, shape, expected in zip(map_pools(shapes), shapes, pooled):
        assert pool(torch.zeros(2, *shape)).shape == (2, *expected)


def test_a_grid_is_no_larger_than_its_map():
    shapes = map_shapes(ResNet("resnet18"), 32)  # maps of 16, 8, 4, 2, 1
    assert [h for _, h, _ in pooled_shapes(shapes)] == [12, 6, 4, 2, 1]
