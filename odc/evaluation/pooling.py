"""The five feature maps, average-pooled to about 9000 numbers each (linear and SVM recipes)."""

import torch
from torch import nn

MAP_NAMES = ["feature1", "feature2", "feature3", "feature4", "feature5"]
# (channels, height) of ResNet-50's five maps at 224, and (kernel, stride, padding) of their pools.
RESNET50_MAPS = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
RESNET50_POOLS = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]
GRIDS = [12, 6, 4, 3, 2]  # what these pools leave


def map_shapes(backbone, image_size):
    """[(channels, height, width)] of the five maps for one image size."""
    device = next(backbone.parameters()).device
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    return [tuple(feature_map.shape[1:]) for feature_map in maps]


def map_pools(shapes):
    """The pools for `map_shapes`: for ResNet-50 at 224 the recipe's, else adaptive to its grid."""
    if [(channels, height) for channels, height, _ in shapes] == RESNET50_MAPS:
        return [nn.AvgPool2d(kernel, stride, padding) for kernel, stride, padding in RESNET50_POOLS]
    return [nn.AdaptiveAvgPool2d((min(grid, height), min(grid, width)))
            for grid, (_, height, width) in zip(GRIDS, shapes)]
