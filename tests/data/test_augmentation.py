"""The augmentations, parameter by parameter, against torchvision given the same parameters."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF
from torchvision.transforms import InterpolationMode

from odc.data import augmentation as augment
from odc.data.augmentation import LINEAR_AUGMENTATIONS, ORDERS, Augmentation, Draw

NOTHING = Draw(0, 0, 0, 32, 32, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def photograph():
    """A real photograph, 640 x 427."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def a_batch(photograph, count=24, size=48):
    """Crops of the photograph, after images of one colour, of all primary colours and of noise."""
    generator = random.Random(0)
    draws = [augment.draw(Augmentation(), generator, *photograph.size, size)
             for _ in range(count - 3)]
    odd = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    odd[0] = 128
    levels = (0, 127, 255)
    cube = torch.tensor([[r, g, b] for r in levels for g in levels for b in levels])
    odd[1] = cube.byte()[torch.arange(size * size) % 27].T.view(3, size, size)
    odd[2] = torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(0))
    crops = [augment.crop_and_flip(photograph, p, size) for p in draws]
    return torch.cat([odd, torch.stack(crops)])


def finished(images, rows):
    """What `augment_batch` makes of images, in uint8 steps; rows: a Draw for each image."""
    result = augment.augment_batch(images, torch.tensor(rows))
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (augment.STD, augment.MEAN))
    return 255 * (result * std + mean)


# --- in the worker -------------------------------------------------------------------------------


def test_crop_is_pillows_to_one_step(photograph):
    generator = random.Random(1)
    worst, differ = 0, 0.0
    for _ in range(60):
        p = augment.draw(Augmentation(), generator, *photograph.size, 64)
        expected = TF.resized_crop(photograph, p.top, p.left, p.height, p.width, [64, 64])
        if p.flip:
            expected = TF.hflip(expected)
        ours = augment.crop_and_flip(photograph, p, 64)
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        difference = (ours.int() - as_tensor(expected).int()).abs()
        worst = max(worst, difference.max().item())
        differ = max(differ, (difference > 0).float().mean().item())
    assert worst <= 1 and differ < 0.02


def test_crop_of_odd_sizes():
    for width, height, size in [(1, 1, 32), (1, 300, 32), (300, 1, 16), (3, 2, 64), (32, 32, 32)]:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        for seed in range(20):
            p = augment.draw(Augmentation(), random.Random(seed), width, height, size)
            box = p.top, p.left, p.height, p.width
            expected = as_tensor(TF.resized_crop(image, *box, [size, size]))
            expected = expected.flip(-1) if p.flip else expected
            assert (augment.crop_and_flip(image, p, size).int() - expected.int()).abs().max() <= 1


def test_fixed_scale_crop_is_places205s_recipe(photograph):
    p = augment.draw(LINEAR_AUGMENTATIONS["places205"], random.Random(3), *photograph.size, 224)
    assert (p.resize, p.height, p.width) == (256, 224, 224)
    assert 0 <= p.top <= 32 and 0 <= p.left <= 32
    square = TF.center_crop(TF.resize(photograph, 256), [256, 256])
    expected = as_tensor(TF.crop(square, p.top, p.left, 224, 224))
    expected = expected.flip(-1) if p.flip else expected
    assert torch.equal(augment.crop_and_flip(photograph, p, 224), expected)
    drawn = [augment.draw(LINEAR_AUGMENTATIONS["places205"], random.Random(i), 9, 9, 224)
             for i in range(3000)]
    counts = torch.tensor([q.top for q in drawn]).bincount()
    assert len(counts) == 33 and counts.min() > 40  # every place, evenly: 91 expected


# --- the distributions ---------------------------------------------------------------------------


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov: chance alone gives False once in 10,000 times."""
    ours, theirs = np.sort(np.asarray(ours, float)), np.sort(np.asarray(theirs, float))
    grid = np.concatenate([ours, theirs])
    gap = np.abs(np.searchsorted(ours, grid, side="right") / len(ours)
                 - np.searchsorted(theirs, grid, side="right") / len(theirs)).max()
    return gap < 2.23 * math.sqrt((len(ours) + len(theirs)) / (len(ours) * len(theirs)))


@pytest.mark.parametrize("width, height, scale", [
    (500, 375, 0.08), (60, 400, 0.08), (400, 60, 0.5), (32, 32, 0.08), (7, 5, 0.08)])
def test_crops_are_drawn_as_torchvision_draws_them(width, height, scale):
    """The tall and the wide image cannot hold most ratios: the ten tries and the fallback count."""
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    count = 6000
    theirs = [transforms.RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3])
              for _ in range(count)]
    generator = random.Random(0)
    ours = [augment.draw(Augmentation(min_scale=scale), generator, width, height)
            for _ in range(count)]
    for column, values in zip(("top", "left", "height", "width"), zip(*theirs)):
        assert same_distribution([getattr(p, column) for p in ours], values), column
    assert same_distribution([p.height * p.width for p in ours], [t[2] * t[3] for t in theirs])
    assert same_distribution([p.width / p.height for p in ours], [t[3] / t[2] for t in theirs])


def test_colours_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    count = 6000
    jitter = transforms.ColorJitter(0.4, 0.4, 1.0, 0.5)
    limits = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [jitter.get_params(*limits) for _ in range(count)]
    generator = random.Random(0)
    ours = [augment.draw(Augmentation(), generator, 50, 40) for _ in range(count)]
    for k, column in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        assert same_distribution([getattr(p, column) for p in ours], [t[k] for t in theirs]), column
    angles = [transforms.RandomRotation.get_params([-2, 2]) for _ in range(count)]
    assert same_distribution([p.angle for p in ours], angles)
    orders = torch.tensor([ORDERS.index(tuple(t[0].tolist())) for t in theirs])
    orders = orders.bincount(minlength=24)
    drawn = torch.tensor([p.order for p in ours]).bincount(minlength=24)
    assert len(ORDERS) == len(drawn) == 24
    for counts in (orders, drawn):  # 250 expected, standard deviation 15.5
        assert counts.min() > 185 and counts.max() < 315
    assert abs(sum(p.flip for p in ours) / count - 0.5) < 0.025
    assert abs(sum(p.grayscale for p in ours) / count - 0.2) < 0.02


def test_lighting_is_drawn_from_the_eigenvectors():
    generator = random.Random(0)
    ours = [augment.draw(LINEAR_AUGMENTATIONS["imagenet-multihead"], generator, 9, 9)
            for _ in range(20000)]
    light = np.array([(p.red, p.green, p.blue) for p in ours])
    vectors, values = np.array(augment.LIGHT_VECTORS), np.array(augment.LIGHT_VALUES)
    expected = 0.01 * (vectors * values**2) @ vectors.T
    assert np.allclose(np.cov(light.T), expected, atol=0.03 * expected.max())


def test_defaults_are_the_recipes_values():
    a = Augmentation()
    assert (a.min_scale, a.ratio, a.flip, a.rotation) == (0.08, (3 / 4, 4 / 3), 0.5, 2.0)
    assert (a.jitter, a.grayscale) == ((0.4, 0.4, 1.0, 0.5), 0.2)
    assert (a.lighting, a.fixed_scale) == (0.0, False)
    assert LINEAR_AUGMENTATIONS["imagenet-multihead"].jitter == (0.4, 0.4, 0.4, 0.0)
    assert LINEAR_AUGMENTATIONS["imagenet-multihead"].lighting == 0.1


# --- on the device -------------------------------------------------------------------------------


def test_nothing_drawn_nothing_done(photograph):
    images = a_batch(photograph)
    assert (finished(images, [NOTHING] * len(images)) - images).abs().max() < 1e-3


@pytest.mark.parametrize("size", [32, 33, 224])
def test_rotation_is_pillows_exactly(photograph, size):
    images = a_batch(photograph, 12, size)
    angles = [0.0, 2.0, -2.0, 0.7, -1.3, 1.9, 0.05, 10.0, 45.0, -90.0, 179.0, 1e-3]
    angles = torch.tensor(angles, dtype=torch.float32).tolist()
    ours = finished(images, [NOTHING._replace(angle=angle) for angle in angles])
    for image, angle, mine in zip(images, angles, ours):
        expected = TF.rotate(TF.to_pil_image(image), angle, InterpolationMode.NEAREST)
        assert torch.equal(mine.round().byte(), as_tensor(expected)), angle


COLOUR = [
    # A field of Draw, its values, torchvision's operation, and how far ours may lie, in uint8
    # steps, from torchvision's on float tensors and on PIL images. Pillow rounds in between,
    # and knows 256 hues.
    ("brightness", (0.6, 0.9, 1.0, 1.4), TF.adjust_brightness, 0.001, 1.0),
    ("contrast", (0.6, 0.9, 1.0, 1.4), TF.adjust_contrast, 0.03, 1.5),
    ("saturation", (0.0, 0.5, 1.0, 2.0), TF.adjust_saturation, 0.03, 2.0),
    ("hue", (-0.5, -0.2, 0.1, 0.33, 0.5), TF.adjust_hue, 0.01, 15.1),
]


@pytest.mark.parametrize("name, values, operation, float_steps, pillow_steps", COLOUR,
                         ids=[row[0] for row in COLOUR])
def test_colour_operations(photograph, name, values, operation, float_steps, pillow_steps):
    images = a_batch(photograph)
    for value in torch.tensor(values).tolist():
        ours = finished(images, [NOTHING._replace(**{name: value})] * len(images))
        floats = 255 * torch.stack([operation(image / 255, value) for image in images])
        pillows = [as_tensor(operation(TF.to_pil_image(image), value)) for image in images]
        pillows = torch.stack(pillows)
        print(name, value, (ours - floats).abs().max(), (ours - pillows).abs().max(),
              (ours - pillows).abs().mean())
        assert (ours - floats).abs().max() <= float_steps
        assert (ours - pillows).abs().max() <= pillow_steps
        assert (ours - pillows).abs().mean() < 1


def test_grayscale(photograph):
    images = a_batch(photograph)
    rows = [NOTHING._replace(grayscale=i % 2) for i in range(len(images))]
    for i, mine in enumerate(finished(images, rows)):
        expected = as_tensor(TF.to_grayscale(TF.to_pil_image(images[i]), 3)) if i % 2 else images[i]
        assert (mine - expected).abs().max() < 0.51


def test_lighting_is_added_last(photograph):
    images = a_batch(photograph)
    light = torch.tensor([0.1, -0.05, 0.2])
    row = NOTHING._replace(red=0.1, green=-0.05, blue=0.2)
    ours = augment.augment_batch(images, torch.tensor([row] * len(images)))
    # The sum is not clamped.
    expected = TF.normalize(images / 255 + light.view(3, 1, 1), augment.MEAN, augment.STD)
    assert (ours - expected).abs().max() < 1e-5


def in_turn(image, p):
    """The simple form: one image, one operation after the other, torchvision on float tensors."""
    image = as_tensor(TF.rotate(TF.to_pil_image(image), p.angle, InterpolationMode.NEAREST)) / 255
    for operation in ORDERS[int(p.order)]:
        if operation == 0:
            image = TF.adjust_brightness(image, p.brightness)
        elif operation == 1:
            image = TF.adjust_contrast(image, p.contrast)
        elif operation == 2:
            image = TF.adjust_saturation(image, p.saturation)
        else:
            image = TF.adjust_hue(image, p.hue)
    if p.grayscale:
        image = TF.rgb_to_grayscale(image, 3)
    return TF.normalize(image, augment.MEAN, augment.STD)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
def test_whole_recipe_in_a_batch(photograph, device):
    """Every order of the colour operations, and more images than one block, against `in_turn`."""
    images = a_batch(photograph, 72)
    generator = random.Random(5)
    rows = [augment.draw(Augmentation(), generator, 9, 9)._replace(order=i % 24)
            for i in range(len(images))]
    rows = [Draw(*row) for row in torch.tensor(rows).tolist()]
    ours = augment.augment_batch(images.to(device), torch.tensor(rows)).cpu()
    expected = torch.stack([in_turn(image, row) for image, row in zip(images, rows)])
    steps = (ours - expected).abs() * 255 * 0.225
    print(steps.max())
    assert steps.max() < 0.5


def test_a_row_does_not_depend_on_its_batch(photograph):
    images = a_batch(photograph, 40)
    generator = random.Random(6)
    rows = torch.tensor([augment.draw(Augmentation(), generator, 9, 9) for _ in range(len(images))])
    together = augment.augment_batch(images, rows)
    alone = [augment.augment_batch(images[i : i + 1], rows[i : i + 1]) for i in range(len(images))]
    alone = torch.cat(alone)
    assert (together - alone).abs().max() < 1e-5
    assert augment.augment_batch(images[:0], rows[:0]).shape == (0, 3, 48, 48)


# --- evaluation transforms -----------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [
    (500, 375), (375, 500), (256, 256), (100, 30), (33, 77), (1, 1)])
def test_evaluation_transforms_are_torchvisions(photograph, width, height):
    if height <= 427:
        image = photograph.crop((0, 0, width, height))
    else:
        image = photograph.resize((width, height))
    normal = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    assert torch.equal(augment.resize_center_crop(image), as_tensor(normal(image)))
    assert torch.equal(augment.evaluation_transform(224)(image), as_tensor(normal(image)))
    small = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    assert torch.equal(augment.evaluation_transform(32)(image), as_tensor(small(image)))
    voc = transforms.Compose([transforms.Resize(256), transforms.Resize((224, 224))])
    assert torch.equal(augment.resize_exact(image), as_tensor(voc(image)))


@pytest.mark.parametrize("width, height", [(30, 3), (3, 30), (3000, 3), (2, 3000)])
def test_long_images_of_odd_sizes_lose_no_row(photograph, width, height):
    image = photograph.resize((width, height))
    normal = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64)])
    assert torch.equal(augment.evaluation_transform(64)(image), as_tensor(normal(image)))


@pytest.mark.parametrize("width, height", [(40000, 1), (1, 40000), (9000, 3)])
def test_threads_do_not_fill_the_memory(width, height):
    """Resized as the recipes say, these would take up to 10 GB; only their middle counts."""
    image = Image.new("RGB", (width, height), (10, 200, 30))
    expected = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 224, 224)
    assert torch.equal(augment.resize_center_crop(image), expected)
    assert torch.equal(augment.resize_exact(image), expected)


def test_normalise(photograph):
    images = a_batch(photograph)
    expected = [TF.normalize(TF.to_tensor(TF.to_pil_image(image)), augment.MEAN, augment.STD)
                for image in images]
    assert (augment.normalise(images) - torch.stack(expected)).abs().max() < 1e-5
