"""A data set of images, and how one image is read."""

import array
import contextlib
import errno
import functools
import hashlib
import os
import time
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

# Only these decoders are tried, whatever a file is called. Pillow has others that start programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MiB as 24-bit RGB
DROPPED = "odc: transparency dropped"  # a key of `image.info`
PAUSES = (0.1, 0.4)  # seconds before a file that could not be read is read again


class BadImage(Exception):
    """An image that cannot be read; the message is the reason."""


def digest(*parts):
    """8 bytes that change with any byte of the parts."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


class Names:
    """N file names as one block of bytes and an array of numbers; `names[i]` is a str.

    Loader workers are forks of the training process. A list of Python strings would be copied into
    each of them, as reading a string changes its reference count. Names that are not valid UTF-8
    are kept as they are.
    """

    def __init__(self, names):
        """names: an iterable of str; from a generator, they never exist all at once."""
        block, ends = bytearray(), array.array("q")
        for name in names:
            block += os.fsencode(name)
            ends.append(len(block))
        self.block, self.ends = np.frombuffer(block, np.uint8), np.array(ends, np.int64)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1] if i > 0 else 0
        return os.fsdecode(self.block[start : self.ends[i]].tobytes())


@dataclass
class ImageSet:
    """N images, perhaps with labels; made by `odc.data.datasets.open_dataset`."""

    name: str  # which data set: "imagenet", "voc07", ...; "folder" for a folder of the user's own
    split: str  # "train" or "val"
    root: str  # the folder that file names are relative to; for "shapes" the word itself
    names: Names | None = None  # of files
    pixels: np.ndarray | None = None  # or uint8 [N, height, width] or [N, height, width, 3]
    labels: torch.Tensor | None = None  # int64 [N]
    classes: list | None = None  # their names
    targets: torch.Tensor | None = None  # for "voc07": int8 [N, classes], 0 is difficult, else +-1
    background: str | None = None  # "white" or "black", see `read_image`
    taken: np.ndarray | None = None  # int64 [N], where these images lie in the set they are part of
    # The loader writes {index: reason} of images that cannot be read, and the first image found
    # whose transparency was dropped.
    unreadable: dict = field(default_factory=dict)
    transparent: int | None = None

    def __len__(self):
        return len(self.names) if self.pixels is None else len(self.pixels)

    def take(self, indices):
        """The ImageSet of some of these images, without targets."""
        return replace(
            self, names=self.names and Names(self.names[i] for i in indices),
            pixels=None if self.pixels is None else self.pixels[indices],
            labels=None if self.labels is None else self.labels[indices], targets=None,
            taken=np.asarray(indices), unreadable={}, transparent=None)

    def typical_side(self):
        """The median of the shorter sides of 100 images, in pixels."""
        if self.pixels is not None:
            return min(self.pixels.shape[1:3])
        sides = []
        for i in np.linspace(0, len(self) - 1, min(100, len(self))).round():
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with it, the loader will say
                with Image.open(os.path.join(self.root, self.name_of(i)), formats=FORMATS) as image:
                    sides.append(min(image.size))
        return int(np.median(sides)) if sides else 224

    def name_of(self, i):
        """The path of image i relative to the root; for images in memory, the index as text."""
        return self.names[int(i)] if self.pixels is None else str(int(i))

    @functools.cached_property
    def fingerprint(self):
        """16 hexadecimal digits that change with names, order and number, not with the root."""
        content = [v for v in (self.labels, self.taken) if v is not None]
        if self.pixels is None:
            content = [self.names.block, self.names.ends]
        return digest(f"{self.name} {self.split} {len(self)}".encode(),
                      *map(np.asarray, content)).hex()

    @functools.cached_property
    def labelled_fingerprint(self):
        """16 hexadecimal digits that change with labels and targets, too."""
        values = [b"none" if v is None else v.numpy() for v in (self.labels, self.targets)]
        return digest(self.fingerprint.encode(), *values).hex()

    def content_stamp(self):
        """63 bits that change with root, background, pixels in memory, and a file's size or time.
        """
        content = self.pixels
        if content is None:
            content = np.full((len(self), 2), -1, np.int64)
            for i in range(len(self)):
                with contextlib.suppress(OSError):  # not there: the loader will say so
                    status = os.stat(os.path.join(self.root, self.names[i]))
                    content[i] = status.st_size, status.st_mtime_ns
        place = f"{self.background} {os.path.realpath(self.root)}"
        stamp = digest(os.fsencode(place), np.ascontiguousarray(content))
        return int.from_bytes(stamp, "little") >> 1

    def load(self, i):
        """Image i as an RGB `PIL.Image`. Raises BadImage."""
        if self.pixels is not None:
            return Image.fromarray(np.asarray(self.pixels[int(i)])).convert("RGB")
        path = os.path.join(self.root, self.name_of(i))
        for pause in (*PAUSES, None):
            try:
                return read_image(path, self.background)
            except Exception as error:  # for broken files, decoders raise anything
                # Errors of a disk or a network have a number, those of a decoder have none.
                number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
                if isinstance(error, UnidentifiedImageError):
                    reason = "not an image in a known format"
                if number in (None, errno.ENOENT, errno.EACCES) or pause is None:
                    reason = reason or str(error).replace(repr(path), "it") or type(error).__name__
                    raise BadImage(reason) from None
                time.sleep(pause)


def read_image(path, background=None):
    """The first frame of a file as an RGB `PIL.Image`, as torchvision reads it: EXIF is ignored.

    Transparent images are laid on background, "white" or "black"; if it is None, transparency is
    dropped, and `image.info[DROPPED]` is true. 16-bit gray is scaled to 8 bits, where Pillow alone
    would clip it to white.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for images that are merely odd
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:  # nothing is decoded yet
            raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")
        image.load()
        if image.mode.startswith("I"):  # "I;16", "I;16B" and "I" hold 0..65535
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers, of unknown range")
        transparent = False
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            transparent = layer.getchannel("A").getextrema()[0] < 255
            if transparent and background:
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), layer)
        image = image if image.mode == "RGB" else image.convert("RGB")
        image.info[DROPPED] = transparent and not background
        return image
