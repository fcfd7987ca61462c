"""A data set of images, and how one image is read."""

import concurrent.futures
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
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from odc.data.augmentation import whole_image
from odc.distributed import print_main
from odc.errors import Interrupted
from odc.runtime import launch
from odc.runtime.log import progress_bar

# Only these decoders are tried, whatever a file is called. Pillow has others that start programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
PAUSES = (0.1, 0.4)  # seconds before a failed read is tried again
PATIENT_PAUSES = (0.1, 0.4, 1.5, 3, 5)  # the same for a file that this run has read before
KEPT_BYTES = 2**30  # of images in memory, for each process


class UnreadableImage(Exception):
    """An image that cannot be read; the message is the reason."""


def digest(*parts):
    """8 bytes that change with any byte of the parts."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


def file_names(names):
    """file_names as one array of bytes: forked loader workers would each copy a list of str."""
    return np.array([os.fsencode(name) for name in names], dtype=bytes)


@dataclass
class ImageSet:
    """N images, perhaps with labels; made by `odc.data.datasets.open_dataset`."""

    name: str  # which data set: "imagenet", "voc07", ...; "folder" for a folder of the user's own
    split: str  # "train" or "val"
    root: str  # the folder that file names are relative to; for "shapes" the word itself
    names: np.ndarray | None = None  # of files, by `file_names`
    pixels: np.ndarray | None = None  # or uint8 [N, height, width] or [N, height, width, 3]
    labels: torch.Tensor | None = None  # int64 [N]
    classes: list | None = None  # their names
    targets: torch.Tensor | None = None  # for "voc07": int8 [N, classes], 0 is difficult, else +-1
    taken: np.ndarray | None = None  # int64 [N], where these images lie in the set they are part of
    left_out: dict = field(default_factory=dict)  # {name: reason} of images that cannot be read
    kept: list | None = None  # small copies of files, uint8 [h, w, 3], None for an unreadable one

    def __len__(self):
        return len(self.names) if self.pixels is None else len(self.pixels)

    def take(self, indices):
        """The ImageSet of some of these images."""
        chosen = {name: value[indices] for name in ("names", "pixels", "labels", "targets")
                  if (value := getattr(self, name)) is not None}
        kept = self.kept and [self.kept[i] for i in indices]
        return replace(self, taken=np.asarray(indices), kept=kept, **chosen)

    def leave_out(self, unreadable):
        """Remove the images with these names, {name: reason}, from this ImageSet."""
        self.fingerprint  # cached now: it stays that of the set as it was opened
        rest = self.take([i for i in range(len(self)) if self.name_of(i) not in unreadable])
        self.names, self.labels, self.targets = rest.names, rest.labels, rest.targets
        self.kept = rest.kept
        self.left_out = {**self.left_out, **unreadable}

    @property
    def whole_images(self):
        """Whether people expect to see all of an image, turned as they hold it: in own folders."""
        return self.name == "folder"

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

    def mirror_ratio(self, side=32):
        """How far mirrored images lie from their nearest other images, over the images themselves.

        The median of about 1,000, by the cosine of small pictures: about 1 for photographs, 1.2
        for clothes that all face one way, 1.7 for letters.
        """
        def small(i):
            with contextlib.suppress(UnreadableImage):  # the first pass will say so
                return whole_image(self.load(i, draft_side=side), side)

        with concurrent.futures.ThreadPoolExecutor() as threads:
            some = range(0, len(self), -(-len(self) // 1000))
            pictures = [picture for picture in threads.map(small, some) if picture is not None]
        if len(pictures) < 2:
            return 1.0
        pictures = torch.stack(pictures).float()
        unit, mirrored = (F.normalize(x.flatten(1)) for x in (pictures, pictures.flip(-1)))
        own, other = (1 - (rows @ unit.T).fill_diagonal_(0).amax(1) for rows in (unit, mirrored))
        return float((other / own.clamp(min=1e-4)).median())

    def keep_small_copies(self, side):
        """Decode all files once; keep copies with shorter sides of at most `side`, if they fit."""
        def small(i):
            with contextlib.suppress(UnreadableImage):  # the first pass will say so
                image = self.load(i, draft_side=side)
                image.thumbnail([side * max(image.size) // min(image.size)] * 2)
                return np.asarray(image)

        bar, kept, size = progress_bar(len(self), "reading", "img"), [], 0
        with concurrent.futures.ThreadPoolExecutor() as threads:
            for copy in threads.map(small, range(len(self))):
                if launch.signal_is_pending():
                    raise Interrupted("Stopped, as a signal asked.")
                kept.append(copy)
                size += 0 if copy is None else copy.nbytes
                bar.update()
                if size > KEPT_BYTES:
                    return
        self.kept = kept
        print_main(f"{len(kept):,} images are kept in memory: {size >> 20:,} MiB in each process.")

    def name_of(self, i):
        """The path of image i relative to the root; for images in memory, the index as text."""
        return os.fsdecode(self.names[int(i)]) if self.pixels is None else str(int(i))

    @functools.cached_property
    def fingerprint(self):
        """16 hexadecimal digits that change with names, order, labels and number, not the root."""
        return digest(f"{self.name} {self.split} {len(self)}".encode(), *(
            b"none" if part is None else np.asarray(part)
            for part in (self.labels, self.targets, self.taken, self.names))).hex()

    def load(self, i, patient=False, draft_side=None):
        """Image i as an RGB `PIL.Image`. patient: it was read before. Raises UnreadableImage."""
        if self.pixels is not None:
            return Image.fromarray(np.asarray(self.pixels[int(i)])).convert("RGB")
        if self.kept and self.kept[int(i)] is not None:
            return Image.fromarray(self.kept[int(i)])
        path = os.path.join(self.root, self.name_of(i))
        for pause in (*(PATIENT_PAUSES if patient else PAUSES), None):
            try:
                return read_image(path, self.whole_images, draft_side)
            except Exception as error:  # for broken files, decoders raise anything
                # Errors of a disk or a network have a number, those of a decoder have none.
                number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
                if isinstance(error, UnidentifiedImageError):
                    reason = "not an image in a known format"
                final = number in (None, errno.ENOENT, errno.EACCES) and not patient
                if final or pause is None:
                    raise UnreadableImage(reason or str(error) or repr(error)) from None
                time.sleep(pause)


def read_image(path, turn=False, draft_side=None):
    """The first frame of a file as an RGB `PIL.Image`, on white.

    turn: as its EXIF says, unlike torchvision. draft_side: a large JPEG is decoded at a fraction.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for images that are merely odd
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:  # above twice of it, Pillow raises an error
            image.draft("RGB", (width // 4, height // 4))  # JPEG: decoded in a quarter of the size
        elif draft_side:
            image.draft("RGB", (draft_side, draft_side))
        image.load()
        with contextlib.suppress(Exception):  # odd EXIF
            image = ImageOps.exif_transpose(image) if turn else image
        if image.mode.startswith("I"):  # "I;16", "I;16B" and "I": 0..65535, clipped by Pillow
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers, of unknown range")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
