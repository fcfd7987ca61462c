"""The built-in set: ten forms, light on dark, that vary in all that is not the form."""

import pytest
import torch

from odc.data import shapes
from odc.data.datasets import open_dataset
from odc.data.shapes import FORMS, draw_shapes


@pytest.fixture(scope="module")
def drawn():
    images, labels = draw_shapes(1000, 7)
    return images.float() / 255, labels


def light(images):
    """Each pixel's largest channel, [N, 32, 32]: the value of a colour."""
    return images.amax(3)


def test_both_splits_have_every_form_as_often():
    for split, count in (("train", 5000), ("val", 1000)):
        opened = open_dataset("shapes", split)
        assert len(opened) == count and opened.name == "shapes" and opened.classes == list(FORMS)
        assert opened.labels.bincount().tolist() == [count // 10] * 10
        assert opened.pixels.shape == (count, 32, 32, 3) and opened.pixels.dtype == "uint8"
        image = opened.load(3)
        assert image.mode == "RGB" and image.size == (32, 32) and opened.name_of(3) == "3"
    assert shapes.SPLITS["train"][1] != shapes.SPLITS["val"][1]


def test_the_seed_decides():
    images, labels = draw_shapes(40, 3)
    again, same_labels = draw_shapes(40, 3)
    other, _ = draw_shapes(40, 4)
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert not torch.equal(images, other)
    assert not torch.equal(labels, torch.arange(40) % 10)  # in a random order


def test_no_image_comes_twice_in_the_two_splits():
    pixels = torch.cat([torch.from_numpy(open_dataset("shapes", split).pixels)
                        for split in ("train", "val")])
    assert len(pixels.flatten(1).unique(dim=0)) == 6000


def test_light_on_dark(drawn):
    images, _ = drawn
    values = light(images).flatten(1)
    assert (values.amax(1) > 0.55).all() and (values.quantile(0.2, 1) < 0.45).all()
    assert (values.amax(1) - values.quantile(0.1, 1) > 0.25).all()


def test_forms_differ_and_keep_their_shape(drawn):
    """Place, size, rotation and colour hide the forms from raw pixels, but the forms are there.

    Cut out, centred and brought to one size, most images are nearest to the mean silhouette of
    their form.
    """
    images, labels = drawn
    value = light(images)
    middle = (value.flatten(1).amax(1) + value.flatten(1).quantile(0.1, 1)) / 2
    mask = (value > middle[:, None, None]).float()
    at = torch.arange(32.0)
    area = mask.sum((1, 2))
    x, y = (mask * at).sum((1, 2)) / area, (mask * at[:, None]).sum((1, 2)) / area
    squares = (at - x[:, None, None]) ** 2 + (at[:, None] - y[:, None, None]) ** 2
    spread = ((mask * squares).sum((1, 2)) / area).sqrt()
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = spread / 8
    theta[:, 0, 2], theta[:, 1, 2] = (2 * x + 1) / 32 - 1, (2 * y + 1) / 32 - 1
    grid = torch.nn.functional.affine_grid(theta, (len(images), 1, 32, 32), align_corners=False)
    silhouettes = torch.nn.functional.grid_sample(mask[:, None], grid, align_corners=False)
    silhouettes = silhouettes.flatten(1)

    def right(features):
        means = torch.stack([features[:500][labels[:500] == k].mean(0) for k in range(10)])
        return (torch.cdist(features[500:], means).argmin(1) == labels[500:]).float().mean()

    assert right(silhouettes) > 0.75
    assert right(images.flatten(1)) < 0.6


def test_place_size_and_colour_vary_within_each_form(drawn):
    images, labels = drawn
    value = light(images)
    middle = (value.flatten(1).amax(1) + value.flatten(1).amin(1)) / 2
    mask = (value > middle[:, None, None]).float()
    area = mask.sum((1, 2))
    x = (mask * torch.arange(32.0)).sum((1, 2)) / area
    y = (mask * torch.arange(32.0)[:, None]).sum((1, 2)) / area
    colour = (images * mask[..., None]).sum((1, 2)) / area[:, None]
    for k in range(10):
        of_form = labels == k
        assert area[of_form].std() / area[of_form].mean() > 0.18
        assert x[of_form].std() > 1.2 and y[of_form].std() > 1.2
        assert (colour[of_form].std(0) > 0.08).all()


def test_edges_are_smooth_and_the_ground_is_textured(drawn):
    images, labels = drawn
    discs = light(images)[labels == list(FORMS).index("disc")]
    low, high = discs.flatten(1).quantile(0.3, 1), discs.flatten(1).amax(1)
    between = discs > (0.7 * low + 0.3 * high)[:, None, None]
    between &= discs < (0.3 * low + 0.7 * high)[:, None, None]
    # Half-covered pixels along the edge.
    assert (between.float().mean((1, 2)) > 0.01).float().mean() > 0.9
    # A very dark ground may be black all over in one corner.
    corner = images[:, :4, :4].flatten(1, 2)
    assert (corner.std(1).mean(1) > 0.005).float().mean() > 0.97
