"""Augmentation in two halves: a loader worker crops one image, the device does the rest in a batch.

The recipe (odc_resnet50_8xb64-steplr-440e_in1k), in this order: random resized crop, horizontal
flip, rotation, colour jitter, random grayscale, normalisation. A worker draws all random numbers of
an image (`draw`), then crops and flips it (`crop_and_flip`). The device does the rest for a whole
batch (`augment_batch`); image by image, the rest would be 70% of the work. The results are those of
torchvision but for rounding. tests/data/test_augmentation.py has the simple form.

Brightness, contrast, saturation and hue come in an order that is drawn for each image. So there are
four slots, and in each slot every image needs another operation:

- Brightness, contrast and saturation are one formula, x * f + (1 - f) * y, where y is black, the
  image's mean gray, or the gray of each pixel. `_blend` computes it for the whole batch. Each image
  has its own f and its own weights of the two grays: 1 - f or 0. If its hue is due, f is 1.
- Images are sorted by the slot in which their hue is due. So those due in a slot are neighbours, a
  slice that `_shift_hue` changes in place. The last copy restores the order of the batch.
"""

import functools
import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, red green blue, in 0..1
STD = (0.229, 0.224, 0.225)
GRAY = (0.299, 0.587, 0.114)  # luma, as Pillow weighs it
# PCA of ImageNet's colours: eigenvalues, and eigenvectors as columns.
LIGHT_VALUES = (0.2175, 0.0188, 0.0045)
LIGHT_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
ORDERS = tuple(itertools.permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue


@dataclass
class Augmentation:
    """What is random, and how much; the defaults are the recipe's."""

    min_scale: float = 0.08  # the smallest share of the image's area that a crop takes
    ratio: tuple = (3 / 4, 4 / 3)  # the smallest and largest width / height of a crop
    flip: float = 0.5  # probability
    rotation: float = 2.0  # degrees to either side
    # Brightness, contrast, saturation: factors of 1 +- x, at least 0. Hue: +-x of a turn.
    jitter: tuple = (0.4, 0.4, 1.0, 0.5)
    grayscale: float = 0.2  # probability
    lighting: float = 0.0  # standard deviation of PCA lighting
    # If true, crops of the wanted size from the central square, resized to 256/224 of that size.
    fixed_scale: bool = False


# The training transforms of the linear evaluation, by protocol.
_CROP_AND_FLIP = Augmentation(rotation=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grayscale=0.0)
LINEAR_AUGMENTATIONS = {
    "imagenet-multihead": replace(_CROP_AND_FLIP, jitter=(0.4, 0.4, 0.4, 0.0), lighting=0.1),
    "imagenet-avgpool": _CROP_AND_FLIP,
    "places205": replace(_CROP_AND_FLIP, fixed_scale=True),
    "inaturalist2018": _CROP_AND_FLIP,
}

# All random numbers of one image; a batch of them is a float tensor [B, 16]. resize: edge of the
# central square from which the crop is taken, or 0. top, left, height, width: the crop, in pixels.
# flip, grayscale: 0 or 1. angle: degrees, counter-clockwise. brightness, contrast, saturation:
# factors. hue: part of a turn. order: an index into ORDERS. red, green, blue: added last, in 0..1.
Draw = namedtuple("Draw", "resize top left height width flip angle brightness contrast saturation "
                          "hue order grayscale red green blue")


# --- in the worker: one image --------------------------------------------------------------------

def draw(augmentation, generator, width, height, size=224):
    """Draw the numbers of an image of width x height pixels, of which a crop size x size is wanted.

    generator: a `random.Random`. The distributions are torchvision's. Returns a Draw.
    """
    uniform, jitter, light = generator.uniform, augmentation.jitter, (0.0, 0.0, 0.0)
    if augmentation.fixed_scale:
        resize = _square_for(size)
        top, left = (int(generator.random() * (resize - size + 1)) for _ in range(2))
        crop = (resize, top, left, size, size)
    else:
        crop = (0, *_draw_crop(augmentation, generator, width, height))
    flip = generator.random() < augmentation.flip
    angle = uniform(-augmentation.rotation, augmentation.rotation)
    factors = [uniform(max(0.0, 1 - x), 1 + x) for x in jitter[:3]]
    hue = uniform(-jitter[3], jitter[3])
    order = int(generator.random() * len(ORDERS))
    grayscale = generator.random() < augmentation.grayscale
    if augmentation.lighting > 0:
        alphas = [generator.gauss(0, augmentation.lighting) * value for value in LIGHT_VALUES]
        light = [sum(v * alpha for v, alpha in zip(row, alphas)) for row in LIGHT_VECTORS]
    return Draw(*crop, flip, angle, *factors, hue, order, grayscale, *light)


def _draw_crop(augmentation, generator, width, height):
    """Top, left, height and width: ten tries, then the largest crop in the middle."""
    low, high = augmentation.ratio
    for _ in range(10):
        area = width * height * generator.uniform(augmentation.min_scale, 1.0)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = generator.random() * (height - h + 1), generator.random() * (width - w + 1)
            return int(top), int(left), h, w
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_flip(image, drawn, size):
    """Cut, resize (bilinear, antialiased) and flip an RGB `PIL.Image`: uint8 [3, size, size]."""
    if drawn.resize:
        image = _central_square(image, drawn.resize, drawn.resize)
    box = (drawn.left, drawn.top, drawn.left + drawn.width, drawn.top + drawn.height)
    pixels = _to_tensor(image.crop(box))
    if (drawn.height, drawn.width) != (size, size):
        # 4 times as fast as Pillow's resize, from which it differs by one step at most.
        pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return (pixels.flip(-1) if drawn.flip else pixels).contiguous()


def _to_tensor(image):  # half the time of torchvision's pil_to_tensor for a small image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- evaluation transforms: an RGB image to uint8 [3, size, size] --------------------------------

def resize_center_crop(image, resize=256, crop=224):
    """Resize the shorter edge, then cut the middle: the transform of all recipes but VOC07's."""
    return _to_tensor(_central_square(image, resize, crop))


def resize_exact(image, size=224, resize=256):
    """Resize the shorter edge to 256, then both edges to exactly 224 (the VOC07 recipe)."""
    # A very long image would take gigabytes in between.
    edges = [min(int(resize * edge / min(image.size)), 8 * resize) for edge in image.size]
    image = image.resize(edges, Image.Resampling.BILINEAR)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def evaluation_transform(image_size):
    """`resize_center_crop` in the proportion of 256 to 224; images of up to 64 are not cut."""
    resize = image_size if image_size <= 64 else _square_for(image_size)
    return functools.partial(resize_center_crop, resize=resize, crop=image_size)


def _square_for(size):
    return round(size * 256 / 224)


def _central_square(image, resize, crop):
    """Resize the shorter edge of an image, then cut crop x crop pixels out of the middle."""
    width, height = image.size
    if max(width, height) > 8 * min(width, height):
        # A very long image would take gigabytes when resized, though only its middle counts.
        left, top = max(0, width // 2 - 4 * height), max(0, height // 2 - 4 * width)
        image = image.crop((left, top, width - left, height - top))
    return TF.center_crop(TF.resize(image, resize), crop)


# --- on the device: a batch ----------------------------------------------------------------------

def normalise(images):
    """uint8 [B, 3, S, S] to float32 with ImageNet's mean 0 and standard deviation 1."""
    scale, shift = _scale_and_shift(images.device)
    return (images * scale).sub_(shift)


@functools.cache  # else every batch would wait until they are on the device
def _scale_and_shift(device):
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(MEAN, STD)], device=device).view(1, 3, 1, 1)
    return scale, shift


def augment_batch(images, draws):
    """Rotate, jitter the colours, make some gray, light and normalise what `crop_and_flip` has cut.

    images: uint8 [B, 3, S, S], on any device. draws: float [B, 16] of Draw's columns, on the CPU:
    what no image needs is skipped without waiting for the device.
    Returns float32 [B, 3, S, S] on the images' device.
    """
    draws = Draw(*draws.double().cpu().unbind(1))
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    on_cpu = images.device.type == "cpu"
    block = max(1, 350_000 // images.shape[1:].numel() if on_cpu else len(images))
    for start in range(0, len(images), block):
        rows = slice(start, start + block)
        _augment_block(images[rows], Draw(*(column[rows] for column in draws)), result[rows])
    return result


def _augment_block(images, draws, result):
    """Write augmented images into result; images, draws and result hold the same rows.

    On a CPU they are about a megabyte, which stays in the cache through all operations.
    """
    to_device = functools.partial(torch.Tensor.to, device=images.device, non_blocking=True)
    if (draws.angle != 0).any():
        images = _rotate(images, draws.angle)
    slots = torch.tensor(ORDERS)[draws.order.long()]  # [B, 4]: the operation in each slot
    rows, has_hue = slice(None), bool((draws.hue != 0).any())
    if has_hue:
        hue_slot = (slots == 3).int().argmax(1)
        hue_ends = [0, *hue_slot.bincount(minlength=4).cumsum(0).tolist()]
        rows = hue_slot.argsort(stable=True)
        draws, slots, rows = Draw(*(column[rows] for column in draws)), slots[rows], to_device(rows)
        images = images[rows]
    x = images * (1 / 255)
    factors = [draws.brightness, draws.contrast, draws.saturation, torch.ones_like(draws.hue)]
    factors = torch.stack(factors, 1).gather(1, slots)
    if has_hue or (factors != 1).any():
        blends = torch.stack([factors, (1 - factors) * (slots == 1), (1 - factors) * (slots == 2)])
        blends, hue = to_device(blends.float()), to_device(draws.hue.float())
        for slot in range(4):
            _blend(x, *blends[:, :, slot])
            if has_hue:
                due = slice(hue_ends[slot], hue_ends[slot + 1])
                _shift_hue(x[due], hue[due])
    gray_rows = to_device(torch.where(draws.grayscale != 0)[0])
    if len(gray_rows):
        x[gray_rows] = _gray(x[gray_rows])
    shift = torch.tensor(MEAN) - torch.stack([draws.red, draws.green, draws.blue], 1).float()
    x.sub_(to_device(shift)[:, :, None, None]).mul_(to_device(1 / torch.tensor(STD))[:, None, None])
    result[rows] = x


def _gray(x):
    """Luma [B, 1, S, S] of x [B, 3, S, S]."""
    gray = x[:, :1] * GRAY[0]
    return gray.add_(x[:, 1:2], alpha=GRAY[1]).add_(x[:, 2:], alpha=GRAY[2])


def _blend(x, factor, to_mean, to_gray):
    """x * factor + to_mean * the mean gray of each image + to_gray * the gray of each pixel.

    x [B, 3, S, S] is changed in place; the others are [B].
    """
    gray = _gray(x)
    mean = gray.mean((1, 2, 3)) * to_mean
    gray.mul_(to_gray[:, None, None, None]).add_(mean[:, None, None, None])
    x.mul_(factor[:, None, None, None]).add_(gray).clamp_(0, 1)


def _shift_hue(x, hue):
    """Turn the hue of x [n, 3, S, S] by hue [n], in turns, in place, 10 times as fast as by HSV.

    Saturation and value stay, so the least channel and the chroma (largest - least) stay. With
    r, g, b scaled to 0 (least) and 1 (largest), the hue lies 1 - r + g + b sixths of a turn from
    red, towards green if g > b, else towards blue. No case has to be selected.
    """
    r, g, b = x.unbind(1)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(least)
    from_red = (g + b).sub_(r).sub_(least).div_(chroma.clamp(min=1e-8)).add_(1)
    turns = torch.copysign(from_red, g - b).mul_(1 / 6).add_(hue[:, None, None])
    sixths = turns.sub_(turns.floor()).mul_(6)
    torch.addcmul(least, chroma, (sixths - 3).abs_().sub_(1).clamp_(0, 1), out=r)
    torch.addcmul(least, chroma, (sixths - 2).abs_().neg_().add_(2).clamp_(0, 1), out=g)
    torch.addcmul(least, chroma, (sixths - 4).abs_().neg_().add_(2).clamp_(0, 1), out=b)


def _rotate(images, angle):
    """Turn images [B, 3, S, S] by angle [B] in degrees about their centre, to the nearest pixel.

    In 1/65536 of a pixel, as Pillow does, so every pixel is Pillow's.
    """
    batch, channels, size, _ = images.shape
    turn = -torch.deg2rad(angle.double())
    cos, sin, half = turn.cos(), turn.sin(), size / 2
    # The pixel at (column, row) comes from x = cos * column + sin * row + x0,
    # y = -sin * column + cos * row + y0.
    x0 = half - half * (cos + sin) + 0.5 * (cos + sin)
    y0 = half - half * (cos - sin) + 0.5 * (cos - sin)
    fixed = torch.stack([cos, sin, x0, -sin, cos, y0]).mul_(65536).add_(0.5).floor_().int()
    fixed = fixed.to(images.device, non_blocking=True)[:, :, None, None]
    column = torch.arange(size, dtype=torch.int32, device=images.device)
    row = column[:, None]
    x = ((fixed[0] * column + (fixed[1] * row + fixed[2])) >> 16).clamp_(-1, size)
    y = ((fixed[3] * column + (fixed[4] * row + fixed[5])) >> 16).clamp_(-1, size)
    # A border of one black pixel makes black what lies outside.
    source = y.add_(1).mul_(size + 2).add_(x).add_(1).long().view(batch, 1, -1)
    source = source.expand(-1, channels, -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, source).view_as(images)
