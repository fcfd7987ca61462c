"""A set of images, and how one image is read.

A set keeps its file names as one block of bytes and two arrays of numbers, never as a list of Python strings: loader
workers are forks of the training process, and reference counts would copy such a list into every one of them.
"""

import functools
import hashlib
import os
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

# Only these decoders are tried, whatever a file is called: Pillow has others that start programs (PostScript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own limit of what is not a decompression bomb: 256 MiB as 24-bit RGB


class BadImage(Exception):
    """An image that cannot be read: its name and the reason."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return BadImage, (self.name, self.reason)


class Names:
    """N file names, kept compactly; `names[i]` is a str. Names that are not valid UTF-8 survive, too."""

    def __init__(self, names):
        """names: an iterable of str; it may be a generator, so that the strings never exist all at once."""
        lengths = []
        block = bytearray()
        for name in names:
            encoded = os.fsencode(name)
            lengths.append(len(encoded))
            block += encoded
        self.block = np.frombuffer(bytes(block), np.uint8)
        self.ends = np.cumsum(np.array(lengths, np.int64))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1] if i > 0 else 0
        return os.fsdecode(self.block[start : self.ends[i]].tobytes())


@dataclass
class ImageSet:
    """N images with, perhaps, their labels; made by `odc.data.layouts.open_dataset`.

    name: which data set it is, "imagenet", "voc07", ...; "folder" for a folder of the user's own.
    split: "train" or "val".
    root: the folder that file names are relative to; for "shapes" the word itself.
    names: file names, or None for images that are in memory.
    pixels: uint8 array [N, height, width] or [N, height, width, 3] of images in memory, or None.
    labels: int64 tensor [N], or None.
    classes: the names of the classes, or None.
    targets: int8 tensor [N, classes] of 1, -1 and 0 (present, absent, difficult), of "voc07" only.
    unreadable: the images found unreadable so far, by index, and why; the loader writes it.
    """

    name: str
    split: str
    root: str
    names: Names | None = None
    pixels: np.ndarray | None = None
    labels: torch.Tensor | None = None
    classes: list | None = None
    targets: torch.Tensor | None = None
    unreadable: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.names) if self.pixels is None else len(self.pixels)

    def name_of(self, i):
        """The path of image i relative to the root, or, for images in memory, its index as text."""
        return self.names[int(i)] if self.pixels is None else str(int(i))

    @functools.cached_property
    def fingerprint(self):
        """A short hexadecimal string that changes with the names, their order or their number, not with the root."""
        digest = hashlib.blake2b(f"{self.name} {self.split} {len(self)}".encode(), digest_size=8)
        if self.pixels is None:
            digest.update(self.names.block)
            digest.update(self.names.ends)
        elif self.labels is not None:
            digest.update(self.labels.numpy())
        return digest.hexdigest()

    @functools.cached_property
    def labelled_fingerprint(self):
        """As `fingerprint`, but it changes with labels and targets, too."""
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=8)
        for values in (self.labels, self.targets):
            digest.update(b"none" if values is None else values.numpy())
        return digest.hexdigest()

    def content_stamp(self):
        """A number of 63 bits that changes with the pixels in memory, or with any file's size or time of change."""
        digest = hashlib.blake2b(digest_size=8)
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels))
        else:
            stamps = np.empty((len(self), 2), np.int64)
            for i in range(len(self)):
                try:
                    status = os.stat(os.path.join(self.root, self.names[i]))
                    stamps[i] = status.st_size, status.st_mtime_ns
                except OSError:  # not there: the loader will say so
                    stamps[i] = -1
            digest.update(stamps)
        return int.from_bytes(digest.digest(), "little") >> 1

    def load(self, i):
        """Image i as an RGB `PIL.Image`. Raises BadImage."""
        i = int(i)
        if self.pixels is not None:
            image = Image.fromarray(np.asarray(self.pixels[i]))
            return image if image.mode == "RGB" else image.convert("RGB")
        path = os.path.join(self.root, self.names[i])
        try:
            return read_image(path)
        except Exception as error:  # decoders raise whatever they like on a broken file, from OSError to IndexError
            reason = getattr(error, "strerror", None) or str(error).replace(repr(path), "it") or type(error).__name__
            raise BadImage(self.name_of(i), reason) from None


def read_image(path):
    """Read a file as an RGB `PIL.Image`: the first frame, transparency dropped, EXIF rotation ignored, as torchvision
    does; but 16-bit gray is scaled to 8 bits, where Pillow alone would clip it to white."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are merely odd
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:  # nothing is decoded yet
            raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read")
        if image.mode == "RGB":
            image.load()
            return image
        if image.mode.startswith("I"):  # "I;16", "I;16B" and "I" hold 0..65535
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
