"""The built-in set: ten forms, light on dark, that vary in all that is not the form."""

import torch
import torch.nn.functional as F

from odc.data.datasets import open_dataset
from odc.data.shapes import FORMS, draw_shapes


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


def test_forms_differ_and_keep_their_shape():
    """Place, size, rotation and colour hide the forms from raw pixels, but the forms are there.

    Centred and brought to one size, most are nearest to the mean silhouette of their form.
    """
    images, labels = draw_shapes(1000, 7)
    images, at = images.float() / 255, torch.arange(32.0)
    values = images.amax(3)  # the form is lighter than the ground
    middle = (values.flatten(1).amax(1) + values.flatten(1).quantile(0.1, 1)) / 2
    mask = (values > middle[:, None, None]).float()
    area = mask.sum((1, 2))
    x, y = (mask * at).sum((1, 2)) / area, (mask * at[:, None]).sum((1, 2)) / area
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
