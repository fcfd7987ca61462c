"""Augmentation in two halves: a loader worker crops one image, the device does the rest in a batch.

The recipe (odc_resnet50_8xb64-steplr-440e_in1k) orders the four colour operations at random for
each image, here it is for each step.
"""

import functools
import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import functional as TF

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, red green blue, in 0..1
STD = (0.229, 0.224, 0.225)
# PCA of ImageNet's colours: eigenvalues, and eigenvectors as columns.
LIGHT_VALUES = (0.2175, 0.0188, 0.0045)
LIGHT_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


@dataclass
class Augmentation:
    """What is random, and how much; the defaults are the recipe's."""

    min_scale: float = 0.08  # the smallest share of the image's area that a crop takes
    flip: float = 0.5  # probability
    rotation: float = 2.0  # degrees to either side
    jitter: tuple = (0.4, 0.4, 1.0, 0.5)  # brightness, contrast, saturation: 1 +- x; hue: +-x turns
    grayscale: float = 0.2  # probability
    lighting: float = 0.0  # standard deviation of PCA lighting
    fixed_scale: bool = False  # crops of one size, from the central square at 256/224 of it
    max_scale: float = 1.0  # the largest share, see min_scale


AUGMENTATIONS = {  # --augmentation of train.py
    "recipe": Augmentation(), "demo": Augmentation(min_scale=0.5),
    # The jitter is SimCLR's, against decisions by brightness.
    "small": Augmentation(min_scale=0.3, jitter=(0.8, 0.8, 0.8, 0.2)),
    "unmirrored": Augmentation(min_scale=0.3, jitter=(0.8, 0.8, 0.8, 0.2), flip=0.0),  # letters
}
_CROP_AND_FLIP = Augmentation(rotation=0.0, jitter=(0.0,) * 4, grayscale=0.0)
LINEAR_AUGMENTATIONS = {  # by protocol
    "imagenet-multihead": replace(_CROP_AND_FLIP, jitter=(0.4, 0.4, 0.4, 0.0), lighting=0.1),
    "imagenet-avgpool": _CROP_AND_FLIP, "inaturalist2018": _CROP_AND_FLIP,
    "places205": replace(_CROP_AND_FLIP, fixed_scale=True),
}

# Random numbers of one crop. angle: degrees, counterclockwise. hue: in turns. order: index into
# ORDERS. red, green, blue: lighting.
Draw = namedtuple("Draw", "top left height width flip angle brightness contrast saturation hue "
                          "order grayscale red green blue")


def to_cut(augmentation, size, image):
    """uint8 [3, height, width], from which all crops of an RGB `PIL.Image` are cut."""
    side = round(size * 256 / 224)
    fixed = augmentation.fixed_scale
    return resize_center_crop(image, side, side) if fixed else TF.pil_to_tensor(image)


def draw_parameters(augmentation, generator, height, width, size=224):
    """The Draw for a tensor of `to_cut` from a `random.Random`, distributed as in torchvision."""
    uniform, jitter = generator.uniform, augmentation.jitter
    crop = ((generator.randint(0, height - size), generator.randint(0, width - size), size, size)
            if augmentation.fixed_scale else _draw_crop(augmentation, generator, height, width))
    flip, grayscale = (generator.random() < p for p in (augmentation.flip, augmentation.grayscale))
    angle = uniform(-augmentation.rotation, augmentation.rotation)
    factors = [uniform(max(0.0, 1 - x), 1 + x) for x in jitter[:3]]
    hue, order = uniform(-jitter[3], jitter[3]), generator.randrange(len(ORDERS))
    alphas = [generator.gauss(0, augmentation.lighting) * value for value in LIGHT_VALUES]
    light = [sum(v * alpha for v, alpha in zip(row, alphas)) for row in LIGHT_VECTORS]
    return Draw(*crop, flip, angle, *factors, hue, order, grayscale, *light)


def _draw_crop(augmentation, generator, height, width):
    """Top, left, height and width: ten tries, then the largest crop in the middle."""
    low, high = 3 / 4, 4 / 3  # of width / height
    for _ in range(10):
        area = width * height * generator.uniform(augmentation.min_scale, augmentation.max_scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_flip(image, drawn, size):
    """Cut, resize (bilinear, antialiased) and flip a tensor of `to_cut`: uint8 [3, size, size]."""
    image = image[:, drawn.top: drawn.top + drawn.height, drawn.left: drawn.left + drawn.width]
    # 4 times as fast as Pillow's resize, from which it differs by one step at most.
    pixels = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
    return (pixels.flip(-1) if drawn.flip else pixels).contiguous()


def resize_center_crop(image, resize=256, crop=224):
    """Resize the shorter edge, cut the middle (all recipes but VOC07's): uint8 [3, crop, crop]."""
    return TF.pil_to_tensor(TF.center_crop(TF.resize(_not_too_long(image), resize), crop))


def resize_exact(image, size=224, resize=256):
    """Resize the shorter edge to 256, then both edges to exactly 224 (the VOC07 recipe)."""
    return TF.pil_to_tensor(TF.resize(TF.resize(image, resize), [size, size]))


def evaluation_transform(image_size):
    """`resize_center_crop` at 256 to 224; square images of up to 64 pixels are not cut."""
    resize = image_size if image_size <= 64 else round(image_size * 256 / 224)
    return functools.partial(resize_center_crop, resize=resize, crop=image_size)


def clustering_transform(image_size, whole_images):
    """For what is clustered and shown: whole images, or as `evaluation_transform`."""
    whole = functools.partial(whole_image, size=image_size)
    return whole if whole_images else evaluation_transform(image_size)


def whole_image(image, size):
    """All of an RGB image, in the middle of a white square: uint8 [3, size, size]."""
    return TF.pil_to_tensor(ImageOps.pad(_not_too_long(image), (size, size),
                                         Image.Resampling.BILINEAR, color="white"))


def _not_too_long(image):  # resized by its shorter edge, a very long one would take gigabytes
    width, height = image.size
    return TF.center_crop(image, [min(height, 8 * width), min(width, 8 * height)])


def normalise(images):
    """uint8 [B, 3, S, S] to float32 with ImageNet's mean 0 and standard deviation 1."""
    mean, std = mean_and_std(images.device)
    return (images * (1 / (255 * std))).sub_(mean / std)


@functools.cache  # else every batch would wait until they are on the device
def mean_and_std(device):
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


def augment_batch(images, draws):
    """All that comes after `crop_and_flip`: normalised float32 [B, 3, S, S] on the images' device.

    images: uint8 [B, 3, S, S]. draws: float [B, 15], on the CPU; the order is the first row's.
    """
    if len(images) == 0:  # none of the batch could be read
        return normalise(images)
    order = ORDERS[int(Draw(*draws[0]).order)]
    # Three megabytes stay in a CPU's cache through all operations: 2.3 times as fast at 224.
    rows = max(1, 700_000 // images[0].numel()) if images.device.type == "cpu" else len(images)
    blocks = zip(images.split(rows), draws.split(rows))
    return torch.cat([_augment(*block, order) for block in blocks])


def _augment(images, draws, order):
    mean, std = mean_and_std(images.device)
    on_device = draws.float().to(images.device, non_blocking=True)[:, :, None, None]
    drawn, values = Draw(*draws.T), Draw(*on_device.split(1, 1))  # [B] here, [B, 1, 1, 1] there
    x = images * (1 / 255)
    if drawn.angle.any():  # what no image needs is skipped, without waiting for the device
        x = _rotate(x, values.angle)
    for operation in order:
        value = getattr(values, operation)
        if (getattr(drawn, operation) == (operation != "hue")).all():  # 0 or 1 changes nothing
            continue
        if operation == "hue":
            _shift_hue(x, value[:, 0])
        elif operation == "brightness":
            x.mul_(value).clamp_(0, 1)
        else:
            gray = TF.rgb_to_grayscale(x)
            gray = gray.mean((1, 2, 3), keepdim=True) if operation == "contrast" else gray
            torch.lerp(gray, x, value, out=x).clamp_(0, 1)
    if drawn.grayscale.any():
        x.lerp_(TF.rgb_to_grayscale(x), values.grayscale)
    return x.add_(on_device[:, -3:] - mean).mul_(1 / std)  # with red, green, blue of the lighting


def _rotate(x, angle):
    """Turn x [B, 3, S, S] by angle [B, 1, 1, 1], in degrees, about its centre; zeros outside."""
    size = x.shape[-1]
    at = (torch.arange(size, device=x.device) * 2 + 1) / size - 1  # pixel centres in -1..1
    points = torch.complex(*torch.meshgrid(at, at, indexing="xy"))  # [S, S]; to turn is a product
    turned = points * torch.polar(torch.ones_like(angle), torch.deg2rad(angle))[:, 0]
    return F.grid_sample(x, torch.view_as_real(turned), mode="nearest", align_corners=False)


def _shift_hue(x, hue):
    """Shift the hue of x [B, 3, S, S] by hue [B, 1, 1] turns, in place: 10 times as fast as HSV."""
    r, g, b = x.unbind(1)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(least)
    # 1 - r + g + b sixths of a turn, r, g, b scaled to 0..1; to green if g > b, else to blue.
    from_red = (g + b).sub_(r).sub_(least).div_(chroma.clamp(min=1e-8)).add_(1)
    turns = torch.copysign(from_red, g - b).mul_(1 / 6).add_(hue)
    sixths = turns.sub_(turns.floor()).mul_(6)
    torch.addcmul(least, chroma, (sixths - 3).abs_().sub_(1).clamp_(0, 1), out=r)
    torch.addcmul(least, chroma, (sixths - 2).abs_().neg_().add_(2).clamp_(0, 1), out=g)
    torch.addcmul(least, chroma, (sixths - 4).abs_().neg_().add_(2).clamp_(0, 1), out=b)
