"""The augmentations, parameter by parameter, against torchvision given the same parameters."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import functional as TF

from odc.data import augmentation as augment
from odc.data.augmentation import (LINEAR_AUGMENTATIONS, ORDERS, Augmentation, Draw,
                                   draw_parameters)

NOTHING = Draw(0, 0, 32, 32, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def photograph():
    """A real photograph, 640 x 427."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def a_batch(photograph, count=24, size=48):
    """Crops of the photograph, after images of one colour, of all primary colours and of noise."""
    odd = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    odd[0] = 128
    cube = torch.cartesian_prod(*[torch.tensor([0, 127, 255])] * 3).byte()
    odd[1] = cube[torch.arange(size * size) % 27].T.view(3, size, size)
    odd[2] = torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(0))
    draws = drawn(count - 3, photograph.height, photograph.width, size=size)
    crops = [augment.crop_and_flip(TF.pil_to_tensor(photograph), p, size) for p in draws]
    return torch.cat([odd, torch.stack(crops)])


def drawn(count, *arguments, augmentation=Augmentation(), **options):
    generator = random.Random(0)
    return [draw_parameters(augmentation, generator, *arguments, **options) for _ in range(count)]


@pytest.mark.parametrize("width, height, size", [
    (640, 427, 64), (1, 1, 32), (1, 300, 32), (300, 1, 16), (3, 2, 64), (32, 32, 32)])
def test_crop_is_pillows_to_one_step(photograph, width, height, size):
    image = photograph.crop((0, 0, width, height))
    for p in drawn(20, height, width, size=size):
        expected = TF.resized_crop(image, p.top, p.left, p.height, p.width, [size, size])
        expected = TF.pil_to_tensor(TF.hflip(expected) if p.flip else expected)
        ours = augment.crop_and_flip(augment.to_cut(Augmentation(), size, image), p, size)
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        difference = (ours.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.03


def test_fixed_scale_crop_is_places205s_recipe(photograph):
    places205 = LINEAR_AUGMENTATIONS["places205"]
    ours = augment.to_cut(places205, 224, photograph)
    p, *draws = drawn(3000, *ours.shape[1:], augmentation=places205, size=224)
    assert (p.height, p.width) == (224, 224)
    square = TF.center_crop(TF.resize(photograph, 256), [256, 256])
    expected = TF.pil_to_tensor(TF.crop(square, p.top, p.left, 224, 224))
    assert torch.equal(augment.crop_and_flip(ours, p._replace(flip=0), 224), expected)
    for places in zip(*((p.top, p.left) for p in draws)):
        counts = torch.tensor(places).bincount()
        assert len(counts) == 33 and counts.min() > 40  # every place, evenly: 91 expected


def same_distribution(ours, theirs):
    """Chance alone gives False once in 10,000 times."""
    return ks_2samp(np.array(ours, float), np.array(theirs, float)).pvalue > 1e-4


@pytest.mark.parametrize("width, height, scale", [
    (500, 375, 0.08), (60, 400, 0.08), (400, 60, 0.5), (7, 5, 0.08)])
def test_crops_are_drawn_as_torchvision_draws_them(width, height, scale):
    """The tall and the wide image cannot hold most ratios: the ten tries and the fallback count."""
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    theirs = [transforms.RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3])
              for _ in range(2000)]
    ours = drawn(6000, height, width, augmentation=Augmentation(min_scale=scale))
    for column, values in zip(("top", "left", "height", "width"), zip(*theirs)):
        assert same_distribution([getattr(p, column) for p in ours], values), column
    assert same_distribution([p.height * p.width for p in ours], [t[2] * t[3] for t in theirs])
    assert same_distribution([p.width / p.height for p in ours], [t[3] / t[2] for t in theirs])


def test_colours_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    count, jitter = 6000, transforms.ColorJitter(0.4, 0.4, 1.0, 0.5)
    limits = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [jitter.get_params(*limits) for _ in range(2000)]
    ours = drawn(count, 50, 40)
    for k, column in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        assert same_distribution([getattr(p, column) for p in ours], [t[k] for t in theirs]), column
    angles = [transforms.RandomRotation.get_params([-2, 2]) for _ in range(2000)]
    assert same_distribution([p.angle for p in ours], angles)
    orders = torch.tensor([p.order for p in ours]).bincount(minlength=24)
    assert len(set(ORDERS)) == len(orders) == 24  # 250 expected, standard deviation 15.5
    assert orders.min() > 185 and orders.max() < 315
    assert abs(sum(p.flip for p in ours) / count - 0.5) < 0.025
    assert abs(sum(p.grayscale for p in ours) / count - 0.2) < 0.02


def test_lighting_is_drawn_from_the_eigenvectors():
    ours = drawn(20000, 9, 9, augmentation=LINEAR_AUGMENTATIONS["imagenet-multihead"])
    light = np.array([(p.red, p.green, p.blue) for p in ours])
    vectors, values = np.array(augment.LIGHT_VECTORS), np.array(augment.LIGHT_VALUES)
    expected = 0.01 * (vectors * values**2) @ vectors.T
    assert np.allclose(np.cov(light.T), expected, atol=0.03 * expected.max())


def test_defaults_are_the_recipes_values():
    assert Augmentation() == Augmentation(0.08, 0.5, 2.0, (0.4, 0.4, 1.0, 0.5), 0.2, 0.0, False)


def test_nothing_drawn_nothing_done_but_to_normalise(photograph):
    images = a_batch(photograph)
    expected = TF.normalize(images / 255, augment.MEAN, augment.STD)
    unchanged = augment.augment_batch(images, torch.tensor([NOTHING] * len(images)))
    for ours in (augment.normalise(images), unchanged):
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [32, 33, 224])
def test_rotation_is_pillows(photograph, size):
    """But for pixels that lie half-way between two."""
    images = a_batch(photograph, 12, size)
    angles = [0.0, 2.0, -2.0, 0.7, -1.3, 1.9, 0.05, 10.0, 45.0, -90.0, 179.0, 1e-3]
    rows = torch.tensor([NOTHING._replace(angle=angle) for angle in angles])
    for image, angle, mine in zip(images, angles, augment.augment_batch(images, rows)):
        expected = TF.pil_to_tensor(TF.rotate(TF.to_pil_image(image), angle))
        expected = augment.normalise(expected[None])[0]
        assert ((mine - expected).abs().amax(0) > 0.01).float().mean() < 0.002, angle


def in_turn(image, p, order):
    """The simple form: one image, one operation after the other, torchvision on float tensors."""
    image = TF.pil_to_tensor(TF.rotate(TF.to_pil_image(image), p.angle)) / 255
    for operation in order:
        image = getattr(TF, f"adjust_{operation}")(image, getattr(p, operation))
    if p.grayscale:
        image = TF.rgb_to_grayscale(image, 3)
    light = torch.tensor([p.red, p.green, p.blue]).view(3, 1, 1)
    return TF.normalize(image + light, augment.MEAN, augment.STD)  # the sum is not clamped


@pytest.mark.parametrize("order, size", [*((k, 48) for k in range(24)), (7, 224)])
def test_whole_recipe_in_a_batch(photograph, order, size):
    """Every order of the colour operations, and more images than one block, against `in_turn`."""
    images = a_batch(photograph, 9, size)
    rows = drawn(9, 9, 9, augmentation=Augmentation(lighting=0.1))
    rows[0] = rows[0]._replace(order=order, hue=0.5, saturation=0)
    rows[1] = rows[1]._replace(grayscale=1)
    rows[2] = rows[2]._replace(angle=0, brightness=1, contrast=1, saturation=2, hue=-0.5)
    expected = torch.stack([in_turn(image, row, ORDERS[order]) for image, row in zip(images, rows)])
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        ours = augment.augment_batch(images.to(device), torch.tensor(rows)).cpu()
        steps = (ours - expected).abs() * 255 * 0.225
        assert (steps > 0.5).float().mean() < 0.001  # pixels half-way between two


def test_a_batch_without_a_readable_image():
    images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    assert augment.augment_batch(images, torch.empty(0, 16)).shape == images.shape


@pytest.mark.parametrize("width, height", [
    (500, 375), (256, 256), (100, 30), (33, 77), (1, 1), (30, 3), (3, 30), (3000, 3), (2, 3000)])
def test_evaluation_transforms_are_torchvisions(photograph, width, height):
    """A long image loses no row."""
    image = photograph.resize((width, height))
    pairs = [(augment.evaluation_transform(32), transforms.CenterCrop(32), 32)]
    if max(width, height) <= 500:
        pairs += [(augment.evaluation_transform(224), transforms.CenterCrop(224), 256),
                  (augment.resize_exact, transforms.Resize((224, 224)), 256)]
    for ours, theirs, resize in pairs:
        assert torch.equal(ours(image), TF.pil_to_tensor(theirs(TF.resize(image, resize))))


def test_a_very_long_image_does_not_fill_the_memory():
    """Resized as a whole, it would take 10 GB; only its middle counts."""
    image = augment.resize_center_crop(Image.new("RGB", (40000, 1), (10, 200, 30)))
    assert torch.equal(image, torch.tensor([10, 200, 30]).byte().view(3, 1, 1).expand_as(image))
