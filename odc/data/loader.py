"""Batches of images: which image comes when, and the loader workers that read them.

Seed, epoch and position in the epoch decide everything about an item. So the number of workers
changes nothing, and a run that is resumed within an epoch sees the batches it would have seen.
A batch comes from `BatchLoader`, `_Batches.__getitem__`, `ImageSet.load`, `read_image`.
"""

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from odc.data import augmentation as augment
from odc.data.images import DROPPED, BadImage, ImageSet, digest
from odc.distributed import all_gather_uneven_rows, rank, shard, world_size
from odc.errors import UserError
from odc.runtime.launch import SIGNALS, dead_worker, is_dead_worker

TRIES = 100  # so many unreadable images in a row, drawn at random, are not bad luck


class Batch(NamedTuple):
    """B rows of this process."""

    images: torch.Tensor  # uint8 [B, 3, S, S], cropped and flipped
    draws: torch.Tensor  # float32 [B, 16], rows of augmentation.Draw; [B, 0] in an evaluation
    indices: torch.Tensor  # int64 [B], the image of each row
    failed: torch.Tensor  # int64 [B], -1, or the unreadable image for which another one stands in


def default_workers(in_memory):
    """--workers if it is not given: 0 for images in memory, else 1 to 4, at most one a core."""
    if in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def gather_unreadable(dataset):
    """The images that any process has found unreadable so far, as sorted indices. A collective."""
    own = torch.tensor(sorted(dataset.unreadable), dtype=torch.int64)
    return sorted(set(all_gather_uneven_rows(own).tolist()))


def readable(dataset):
    """[N] bool: False for the images that any process has found unreadable. A collective."""
    mask = torch.ones(len(dataset), dtype=torch.bool)
    mask[gather_unreadable(dataset)] = False
    return mask


def check_unreadable(count, dataset, num_images=None):
    """Raise UserError if more than 1% of the images cannot be read. A collective.

    count: how many images cannot be read, of num_images (default: all), the same on all processes.
    """
    num_images = num_images or len(dataset)
    if count > 0.01 * num_images:
        known = gather_unreadable(dataset)
        example = f", such as {dataset.name_of(known[0])!r}" if known else ""
        raise UserError(f"{count} of {num_images} images in {dataset.root} cannot be read{example};"
                        " this is more than 1%: repair or remove them.")


def steps_per_epoch(num_images, batch_size):
    """Steps of `training_batches`: N draws, rounded up to whole global batches of W * B."""
    return -(-num_images // (world_size() * batch_size))


def training_batches(dataset, augmentation, image_size, batch_size, seed, epoch, first_step=0,
                     workers=0, pin_memory=False):
    """This process's batches of one epoch of pre-training, from first_step on.

    The images are drawn with replacement, the same on all processes (the recipe's sampling). In
    step t, process r has positions t*W*B + r*B up to t*W*B + (r+1)*B of the draw.
    """
    global_batch = world_size() * batch_size
    steps = steps_per_epoch(len(dataset), batch_size)
    generator = torch.Generator().manual_seed(_hash("indices", seed, epoch))
    order = torch.randint(len(dataset), (steps * global_batch,), generator=generator)
    starts = [step * global_batch + rank() * batch_size for step in range(first_step, steps)]
    positions = [range(start, start + batch_size) for start in starts]
    return BatchLoader(_Batches(dataset, order, positions, (seed, epoch), augmentation, image_size),
                       workers, pin_memory)


def epoch_batches(dataset, augmentation, image_size, batch_size, seed, epoch, first_step=0,
                  workers=0, pin_memory=False):
    """This process's batches of an epoch with every image once, in a seeded order, from first_step.

    A last global batch of at least W * B / 2 images is kept and split evenly; a smaller one is
    joined to the batch before, which may be half as large again. So no step sees statistics of a
    handful of images, every process has a row in each step, and any W that leaves B >= 2 has the
    same steps. Raises UserError if N < W.
    """
    N, W, global_batch = len(dataset), world_size(), world_size() * batch_size
    if N < W:
        raise UserError(f"{dataset.root} has {N} images for {W} processes: start fewer with "
                        "--nproc_per_node.")
    generator = torch.Generator().manual_seed(_hash("permutation", seed, epoch))
    order = torch.randperm(N, generator=generator)
    steps = max(1, N // global_batch + (N % global_batch >= max(global_batch / 2, W)))
    ends = [*range(0, steps * global_batch, global_batch), N]
    positions = [range(start, end)[shard(end - start)] for start, end in zip(ends, ends[1:])]
    return BatchLoader(_Batches(dataset, order, positions[first_step:], (seed, epoch), augmentation,
                                image_size), workers, pin_memory)


def evaluation_batches(dataset, rows, transform, batch_size, workers=0, pin_memory=False):
    """Batches of the given rows in order, each once; the last one is as short as need be.

    rows: a slice, or int64 indices. transform: an RGB image -> uint8 [3, S, S].
    An unreadable image keeps its row and index, but shows another image; `failed` tells.
    """
    order = torch.arange(len(dataset))
    indices = order[rows]
    positions = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return BatchLoader(_Batches(dataset, order, positions, transform=transform), workers,
                       pin_memory)


class BatchLoader(torch.utils.data.DataLoader):
    """An iterable over Batch, made by the functions above; `len()` is the number of steps.

    Iterating raises UserError if a worker has died or nothing can be read.
    """

    def __init__(self, batches, workers, pin_memory):
        # Forked, workers share the names and pixels; started afresh, each would hold its own copy.
        context = "fork" if workers and sys.platform == "linux" else None
        super().__init__(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory,
                         multiprocessing_context=context)

    def __iter__(self):
        images = self.dataset.image_set
        # Workers inherit the blocked signals; the training process gets them, too, and decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if self.num_workers else ())
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            try:
                batch, reasons, transparent = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A dead worker shows as a message of torch's or as a connection that broke.
                if isinstance(error, RuntimeError) and not is_dead_worker(error):
                    raise
                raise dead_worker(error) from None
            for index in sorted(reasons.keys() - images.unreadable.keys()):
                images.unreadable[index] = reasons[index]
                warnings.warn(f"the image {images.name_of(index)!r} cannot be read "
                              f"({reasons[index]}); another one takes its place.", stacklevel=2)
            if transparent is not None and images.transparent is None:
                images.transparent = transparent
                if rank() == 0:
                    print(f"{images.root} has transparent images, such as "
                          f"{images.name_of(transparent)!r}: their transparency is dropped; "
                          "--background white or black lays them on a colour.", flush=True)
            if batch is None:
                index, reason = reasons.popitem()
                raise UserError(f"{TRIES} images in a row cannot be read, such as "
                                f"{images.name_of(index)!r} in {images.root} ({reason}): check the "
                                "disk and --data.")
            yield batch


@dataclass
class _Batches(torch.utils.data.Dataset):
    """Item t is step t's Batch, as a loader worker makes it."""

    image_set: ImageSet
    order: torch.Tensor  # int64 [M], the image at each position of the epoch
    positions: list  # for each step, the positions of this process's rows
    seeds: tuple | None = None  # (seed, epoch)
    augmentation: augment.Augmentation | None = None
    image_size: int | None = None
    transform: Callable | None = None  # for an evaluation, instead of the three above

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, step):
        """(Batch, {index: reason} of unreadable images, a transparent image or None).

        The Batch is None if nothing can be read.
        """
        rows, reasons, transparent = [], {}, None
        for position in map(int, self.positions[step]):
            wanted = int(self.order[position])
            image, index = self.load(wanted, position, reasons)
            if image is None:
                return None, reasons, None
            if image.info.get(DROPPED):
                transparent = index
            failed = -1 if index == wanted else wanted
            if self.transform:
                rows.append((self.transform(image), (), wanted, failed))
            else:
                generator = random.Random(_hash("item", self.seeds, position))
                drawn = augment.draw(self.augmentation, generator, *image.size, self.image_size)
                pixels = augment.crop_and_flip(image, drawn, self.image_size)
                rows.append((pixels, drawn, index, failed))
        pixels, *numbers = zip(*rows)
        return Batch(torch.stack(pixels), *map(torch.tensor, numbers)), reasons, transparent

    def load(self, index, position, reasons):
        """An image and its index; instead of an unreadable one, another one drawn at random."""
        others = None
        for _ in range(TRIES):
            try:
                return self.image_set.load(index), index
            except BadImage as error:
                reasons[index] = str(error)
            others = others or random.Random(_hash("another image", self.seeds, position))
            index = int(others.random() * len(self.image_set))
        return None, index


def _hash(*words):
    """A seed for a random generator that no other words give: 0 <= seed < 2**63."""
    return int.from_bytes(digest(repr(words).encode()), "little") >> 1
