"""The built-in set: ten forms, light on dark, that vary in all that is not the form."""

import pytest
import torch
import torch.nn.functional as F

from odc.data.datasets import open_dataset
from odc.data.shapes import FORMS, draw_shapes


@pytest.fixture(scope="module")
def drawn():
    images, labels = draw_shapes(1000, 7)
    return images.float() / 255, labels


def masks(images):
    """[N, 32, 32] of 0 and 1: the form, which is lighter than the ground."""
    values = images.amax(3)
    middle = (values.flatten(1).amax(1) + values.flatten(1).quantile(0.1, 1)) / 2
    return (values > middle[:, None, None]).float()


def centres(mask):
    """Area, and column and row of the centre, each [N]."""
    at, area = torch.arange(32.0), mask.sum((1, 2))
    return area, (mask * at).sum((1, 2)) / area, (mask * at[:, None]).sum((1, 2)) / area


def test_both_splits_have_every_form_as_often_and_no_image_twice():
    pixels = []
    for split, count in (("train", 5000), ("val", 1000)):
        opened = open_dataset("shapes", split)
        assert len(opened) == count and opened.name == "shapes" and opened.classes == list(FORMS)
        assert opened.labels.bincount().tolist() == [count // 10] * 10
        assert opened.pixels.shape == (count, 32, 32, 3) and opened.pixels.dtype == "uint8"
        assert opened.load(3).size == (32, 32) and opened.name_of(3) == "3"
        assert not torch.equal(opened.labels, torch.arange(count) % 10)  # in a random order
        pixels.append(torch.from_numpy(opened.pixels))
    assert len(torch.cat(pixels).flatten(1).unique(dim=0)) == 6000


def test_forms_differ_and_keep_their_shape(drawn):
    """Place, size, rotation and colour hide the forms from raw pixels, but the forms are there.

    Centred and brought to one size, most are nearest to the mean silhouette of their form.
    """
    images, labels = drawn
    mask, at = masks(images), torch.arange(32.0)
    area, x, y = centres(mask)
    squares = (at - x[:, None, None]) ** 2 + (at[:, None] - y[:, None, None]) ** 2
    spread = ((mask * squares).sum((1, 2)) / area).sqrt()
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = spread / 8
    theta[:, 0, 2], theta[:, 1, 2] = (2 * x + 1) / 32 - 1, (2 * y + 1) / 32 - 1
    grid = F.affine_grid(theta, (len(images), 1, 32, 32), align_corners=False)
    silhouettes = F.grid_sample(mask[:, None], grid, align_corners=False).flatten(1)

    def right(features):
        means = torch.stack([features[:500][labels[:500] == k].mean(0) for k in range(10)])
        return (torch.cdist(features[500:], means).argmin(1) == labels[500:]).float().mean()

    assert right(silhouettes) > 0.75
    assert right(images.flatten(1)) < 0.6


def test_light_on_dark_in_varying_places_sizes_and_colours(drawn):
    images, labels = drawn
    values, mask = images.amax(3).flatten(1), masks(images)
    assert (values.amax(1) > 0.55).all() and (values.quantile(0.2, 1) < 0.45).all()
    area, x, y = centres(mask)
    colour = (images * mask[..., None]).sum((1, 2)) / area[:, None]
    for k in range(10):
        form = labels == k
        assert area[form].std() / area[form].mean() > 0.18
        assert min(x[form].std(), y[form].std()) > 1.2 and (colour[form].std(0) > 0.08).all()
