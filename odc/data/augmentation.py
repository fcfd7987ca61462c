"""The augmentations: what a loader worker does to one image, and what the device does to a batch.

The recipe (odc_resnet50_8xb64-steplr-440e_in1k), in this order: random resized crop, horizontal flip, rotation, colour
jitter, random grayscale, normalisation. All that is random is drawn in the worker, by `draw`, as one row of numbers
for each image. The worker crops and flips (`crop_and_flip`); the rest, 70% of the cost where it is done image by image,
is left to the device, in a batch (`finish`).
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, red green blue, in 0..1
STD = (0.229, 0.224, 0.225)
GRAY = (0.299, 0.587, 0.114)  # luma, as Pillow weighs it
LIGHT_VALUES = (0.2175, 0.0188, 0.0045)  # PCA of ImageNet's colours: eigenvalues, and eigenvectors as columns
LIGHT_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass
class Augmentation:
    """What is random, and how much; the defaults are the recipe's.

    min_scale: smallest share of the image's area that a crop takes (the largest is all of it).
    ratio: smallest and largest width / height of a crop.
    fixed_scale: instead, a crop of the wanted size out of the central square of the image, which is made 256/224 of
        that size (Places205's recipe).
    flip, grayscale: probabilities. rotation: degrees to either side.
    jitter: brightness, contrast, saturation (factors within 1 +- x, not below 0) and hue (shift within +-x of a turn).
    lighting: standard deviation of PCA lighting.
    """

    min_scale: float = 0.08
    ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotation: float = 2.0
    jitter: tuple = (0.4, 0.4, 1.0, 0.5)
    grayscale: float = 0.2
    lighting: float = 0.0
    fixed_scale: bool = False


# The training transforms of the linear evaluation, by protocol.
_CROP_AND_FLIP = Augmentation(rotation=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grayscale=0.0)
LINEAR_AUGMENTATIONS = {
    "imagenet-multihead": Augmentation(rotation=0.0, jitter=(0.4, 0.4, 0.4, 0.0), grayscale=0.0, lighting=0.1),
    "imagenet-avgpool": _CROP_AND_FLIP,
    "places205": Augmentation(rotation=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grayscale=0.0, fixed_scale=True),
    "inaturalist2018": _CROP_AND_FLIP,
}


class Parameters(NamedTuple):
    """Everything random about one image; a batch of them is a float tensor [B, P], P = 16, with these columns."""

    resize: float  # the image's central square is first made this large; 0: not at all
    top: float  # the crop, in pixels
    left: float
    height: float
    width: float
    flip: float  # 0 or 1
    angle: float  # degrees, counter-clockwise
    brightness: float  # factors
    contrast: float
    saturation: float
    hue: float  # part of a turn
    order: float  # of these four operations: an index into ORDERS
    grayscale: float  # 0 or 1
    red: float  # added to the colour, in 0..1
    green: float
    blue: float


ORDERS = tuple(itertools.permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue


# --- in the worker: one image ----------------------------------------------------------------------------------------


def draw(augmentation, generator, width, height, size=224):
    """Draw the Parameters of one image of width x height pixels, of which a crop size x size is wanted.

    generator: a `random.Random`. The distributions are torchvision's.
    """
    uniform = generator.uniform
    if augmentation.fixed_scale:
        resize = _larger(size)
        top, left = int(generator.random() * (resize - size + 1)), int(generator.random() * (resize - size + 1))
        crop = (resize, top, left, size, size)
    else:
        crop = (0, *_draw_crop(augmentation, generator, width, height))
    flip = generator.random() < augmentation.flip
    angle = uniform(-augmentation.rotation, augmentation.rotation)
    factors = [uniform(max(0.0, 1 - x), 1 + x) for x in augmentation.jitter[:3]]
    hue = uniform(-augmentation.jitter[3], augmentation.jitter[3])
    order = int(generator.random() * len(ORDERS))
    grayscale = generator.random() < augmentation.grayscale
    light = (0.0, 0.0, 0.0)
    if augmentation.lighting > 0:
        alphas = [generator.gauss(0, augmentation.lighting) * value for value in LIGHT_VALUES]
        light = [sum(v * alpha for v, alpha in zip(row, alphas)) for row in LIGHT_VECTORS]
    return Parameters(*crop, flip, angle, *factors, hue, order, grayscale, *light)


def _draw_crop(augmentation, generator, width, height):
    """Top, left, height and width of a random resized crop: ten tries, then the largest central crop."""
    low, high = augmentation.ratio
    log_low, log_high = math.log(low), math.log(high)
    for _ in range(10):
        area = width * height * generator.uniform(augmentation.min_scale, 1.0)
        ratio = math.exp(generator.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.random() * (height - h + 1)), int(generator.random() * (width - w + 1)), h, w
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_flip(image, parameters, size):
    """Cut, resize (bilinear, antialiased) and flip an RGB `PIL.Image`: uint8 [3, size, size]."""
    if parameters.resize:
        image = _central_square(image, parameters.resize, parameters.resize)
    top, left, height, width = parameters[1:5]
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    pixels = _to_tensor(image)
    if (height, width) != (size, size):
        # A quarter of the time of Pillow's resize, which this was written after; they differ by one step at most.
        pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    if parameters.flip:
        pixels = pixels.flip(-1)
    return pixels.contiguous()


def _to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- evaluation transforms: an RGB image to uint8 [3, size, size] ----------------------------------------------------


def resize_center_crop(image, resize=256, crop=224):
    """Resize the shorter edge, then cut the middle: the validation transform of all recipes but VOC's."""
    return _to_tensor(_central_square(image, resize, crop)).contiguous()


def resize_exact(image, size=224, resize=256):
    """Resize the shorter edge to 256, then both to exactly 224, which keeps the whole image (the VOC07 recipe)."""
    width, height = _shorter_edge(image, resize)
    longest = 8 * resize  # a thread of an image would take gigabytes in between
    image = image.resize((min(width, longest), min(height, longest)), Image.Resampling.BILINEAR)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR)).contiguous()


def evaluation_transform(image_size):
    """`resize_center_crop` for an image size, in the proportion of 256 to 224; small images are not cut."""
    resize = image_size if image_size <= 64 else _larger(image_size)
    return functools.partial(resize_center_crop, resize=resize, crop=image_size)


def _larger(size):
    return round(size * 256 / 224)


def _shorter_edge(image, resize):
    """Width and height after a resize of the shorter edge, as torchvision rounds them."""
    width, height = image.size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _central_square(image, resize, crop):
    """Resize the shorter edge of an image, then cut crop x crop pixels out of the middle."""
    width, height = image.size
    if max(width, height) > 8 * min(width, height):
        # A thread of an image would take gigabytes when resized, though only its middle counts.
        half_width, half_height = min(width, 8 * height) // 2, min(height, 8 * width) // 2
        x, y = width // 2, height // 2
        box = (max(0, x - half_width), max(0, y - half_height), x + max(1, half_width), y + max(1, half_height))
        image = image.crop(box)
    width, height = _shorter_edge(image, resize)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))


# --- on the device: a batch ------------------------------------------------------------------------------------------


def normalise(images):
    """uint8 [B, 3, S, S] to float32 of ImageNet's mean 0 and standard deviation 1."""
    scale = torch.tensor([1 / (255 * s) for s in STD], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(MEAN, STD)], device=images.device).view(1, 3, 1, 1)
    return (images * scale).sub_(shift)


def finish(images, parameters):
    """Rotate, jitter the colours, make some gray, light and normalise a batch that `crop_and_flip` has cut.

    images: uint8 [B, 3, S, S], on any device. parameters: float [B, P], in CPU memory, so that what is switched off is
    skipped without waiting for the device. Returns float32 [B, 3, S, S] on the images' device.
    """
    columns = Parameters(*parameters.double().cpu().unbind(1))
    batch = len(images)
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # On a CPU, few images at a time, about a megabyte, stay in its cache through all operations.
    block = batch if images.device.type != "cpu" else max(1, 350_000 // max(1, images[:1].numel()))
    for start in range(0, batch, block):
        rows = slice(start, start + block)
        _finish_block(images[rows], Parameters(*(column[rows] for column in columns)), result[rows])
    return result


def _finish_block(images, p, result):
    device = images.device
    if bool((p.angle != 0).any()):
        images = _rotate(images, p.angle)
    slots = torch.tensor(ORDERS)[p.order.long()]  # [B, 4]: which operation is first, second, ...
    has_hue = bool((p.hue != 0).any())
    by_hue = None
    if has_hue:
        # Sorted by when their hue is shifted, the images that are due together are neighbours: no copies.
        hue_slot = (slots == 3).int().argmax(1)
        by_hue = hue_slot.argsort(stable=True)
        p = Parameters(*(column[by_hue] for column in p))
        slots, hue_slot = slots[by_hue], hue_slot[by_hue]
        hue_ends = [int((hue_slot < slot).sum()) for slot in range(5)]
        by_hue = by_hue.to(device, non_blocking=True)
        images = images[by_hue]
    x = images * (1 / 255)
    if has_hue or any(bool((factor != 1).any()) for factor in (p.brightness, p.contrast, p.saturation)):
        factors = torch.stack([p.brightness, p.contrast, p.saturation, torch.ones_like(p.hue)], 1).gather(1, slots)
        to_mean = (1 - factors) * (slots == 1)
        to_gray = (1 - factors) * (slots == 2)
        blends = torch.stack([factors, to_mean, to_gray]).float().to(device, non_blocking=True)
        hue = p.hue.float().to(device, non_blocking=True)
        for slot in range(4):
            _blend(x, *blends[:, :, slot])
            if has_hue:
                due = slice(hue_ends[slot], hue_ends[slot + 1])
                _shift_hue(x[due], hue[due])
    gray_rows = torch.where(p.grayscale != 0)[0].to(device, non_blocking=True)
    if len(gray_rows):
        x.index_copy_(0, gray_rows, _gray(x[gray_rows]).expand(-1, 3, -1, -1))
    shift = torch.tensor(MEAN)[None] - torch.stack([p.red, p.green, p.blue], 1).float()
    x.sub_(shift[:, :, None, None].to(device, non_blocking=True))
    x.mul_((1 / torch.tensor(STD))[None, :, None, None].to(device, non_blocking=True))
    if by_hue is None:
        result.copy_(x)
    else:
        result.index_copy_(0, by_hue, x)


def _gray(x):
    """Luma [B, 1, S, S] of x [B, 3, S, S]."""
    gray = x[:, :1] * GRAY[0]
    return gray.add_(x[:, 1:2], alpha=GRAY[1]).add_(x[:, 2:], alpha=GRAY[2])


def _blend(x, factor, to_mean, to_gray):
    """Brightness, contrast and saturation are one operation: x * factor + what is 1 - factor of black, of the image's
    mean gray, or of each pixel's gray. In place; x [B, 3, S, S], all others [B]."""
    gray = _gray(x)
    mean = gray.mean((1, 2, 3)) * to_mean
    gray.mul_(to_gray[:, None, None, None]).add_(mean[:, None, None, None])
    x.mul_(factor[:, None, None, None]).add_(gray).clamp_(0, 1)


def _shift_hue(x, hue):
    """Turn the hue of x [n, 3, S, S] by hue [n], in turns, in place.

    Saturation and value stay, so least and chroma do. With r, g, b from 0 (the least) to 1 (the most), the hue lies
    1 - r + g + b sixths of a turn from red, towards green if g > b, else towards blue: no case has to be told apart,
    which is 10 times as fast as selecting on a CPU.
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
    """Turn images [B, 3, S, S] by angle [B] in degrees about their centre: the nearest pixel, black from outside.

    Source coordinates are in 1/65536 of a pixel, as Pillow has them, so that the result is Pillow's to the last pixel.
    """
    batch, channels, size, _ = images.shape
    turn = -torch.deg2rad(angle.double())
    cos, sin, half = turn.cos(), turn.sin(), size / 2
    # Output pixel (column, row) comes from x = cos * column + sin * row + x0, y = -sin * column + cos * row + y0.
    x0 = half - half * (cos + sin) + 0.5 * (cos + sin)
    y0 = half - half * (cos - sin) + 0.5 * (cos - sin)
    fixed = torch.stack([cos, sin, x0, -sin, cos, y0]).mul_(65536).add_(0.5).floor_().int()
    fixed = fixed.to(images.device, non_blocking=True)[:, :, None, None]
    column = torch.arange(size, dtype=torch.int32, device=images.device)
    row = column[:, None]
    x = ((fixed[0] * column + (fixed[1] * row + fixed[2])) >> 16).clamp_(-1, size)
    y = ((fixed[3] * column + (fixed[4] * row + fixed[5])) >> 16).clamp_(-1, size)
    # With a black pixel around the image, all that lies outside is black.
    source = (y.add_(1).mul_(size + 2).add_(x).add_(1)).long().view(batch, 1, -1).expand(-1, channels, -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, source).view_as(images)


augment_batch = finish
