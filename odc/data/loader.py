"""Batches of images: which image comes when, and the loader workers that read them.

Seed, epoch and position alone decide an item, for any number of workers and after a resume.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from odc.data import augmentation as augment
from odc.data.images import ImageSet, UnreadableImage, digest
from odc.distributed import environment, raise_everywhere, rank, shard, world_size
from odc.errors import Interrupted, UserError
from odc.runtime import launch

POLL, LONGEST_WAIT = 5, 600  # seconds: for a signal, and for a batch


class Batch(NamedTuple):
    """B rows of this process, fewer where images are unreadable."""

    images: torch.Tensor  # uint8 [B, 3, S, S], cropped and flipped
    draws: torch.Tensor  # float32 [B, 15], rows of augmentation.Draw; [0, 15] in an evaluation
    indices: torch.Tensor  # int64 [B], the image of each row
    unreadable: dict  # {index: reason} of images that have no row


def default_workers(in_memory):
    """--workers if not given: 0 for images in memory, or with one core a process; else 2 to 4."""
    if in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // environment("LOCAL_WORLD_SIZE", 1)
    return min(4, share) if share > 1 else 0  # a worker would take the core from its process


def check_shared_memory(workers, batch_size, image_size):
    """Raise UserError if a machine lacks room for two batches of each worker. A collective."""
    with raise_everywhere():
        if workers and os.path.isdir("/dev/shm"):
            status, needed = os.statvfs("/dev/shm"), 2 * workers * batch_size * 3 * image_size**2
            if status.f_bavail * status.f_frsize < needed:
                raise UserError(f"--workers {workers}: {needed >> 20} MiB are needed in /dev/shm: "
                                "use fewer, or give a container more with --shm-size.")


def steps_per_epoch(num_images, batch_size):
    """Steps of `training_batches`: N draws, rounded up to whole global batches of W * B."""
    return -(-num_images // (world_size() * batch_size))


def training_batches(dataset, augmentation, image_size, batch_size, seed, epoch, first_step=0,
                     workers=0, pin_memory=False, crops=1):
    """This process's batches of one epoch of pre-training, from first_step on.

    The images are drawn with replacement (the recipe's sampling), each `crops` times in a row. In
    step t, process r has positions t*W*B + r*B up to t*W*B + (r+1)*B. Unreadable ones: UserError.
    """
    global_batch = world_size() * batch_size
    steps = steps_per_epoch(len(dataset), batch_size)
    generator = torch.Generator().manual_seed(_hash("indices", seed, epoch))
    order = torch.randint(len(dataset), (steps * global_batch // crops,), generator=generator)
    order = order.repeat_interleave(crops)
    starts = [step * global_batch + rank() * batch_size for step in range(first_step, steps)]
    positions = [range(start, start + batch_size) for start in starts]
    return BatchLoader(_Batches(dataset, order, positions, (seed, epoch), augmentation, image_size),
                       workers, pin_memory)


def epoch_batches(dataset, augmentation, image_size, batch_size, seed, epoch, workers=0,
                  pin_memory=False):
    """This process's batches of an epoch with every image once, in a seeded order.

    A last global batch of less than W * B / 2 images joins the one before, so that no step sees
    statistics of a handful of images; a larger one is split evenly. Raises UserError if N < W.
    """
    N, W, global_batch = len(dataset), world_size(), world_size() * batch_size
    if N < W:
        raise UserError(f"{dataset.root} has {N} images for {W} processes: start fewer with "
                        "--nproc_per_node.")
    generator = torch.Generator().manual_seed(_hash("permutation", seed, epoch))
    order = torch.randperm(N, generator=generator)
    steps = max(1, N // global_batch + (N % global_batch >= max(global_batch / 2, W, 2)))
    ends = [*range(0, steps * global_batch, global_batch), N]
    positions = [range(start, end)[shard(end - start)] for start, end in zip(ends, ends[1:])]
    return BatchLoader(_Batches(dataset, order, positions, (seed, epoch), augmentation, image_size),
                       workers, pin_memory, unreadable_limit=0.01 * N / W)


def evaluation_batches(dataset, rows, transform, batch_size, workers=0, pin_memory=False,
                       unreadable_limit=0):
    """Batches of rows, a slice or indices, in order. transform: RGB image -> uint8 [3, S, S]."""
    order = torch.arange(len(dataset))
    positions = order[rows].split(batch_size)
    return BatchLoader(_Batches(dataset, order, positions, transform=transform), workers,
                       pin_memory, unreadable_limit)


class BatchLoader(torch.utils.data.DataLoader):
    """An iterable over Batch, made by the functions above; `len()` is the number of steps.

    Raises UserError if a worker dies or hangs, or if more than unreadable_limit images of this
    process are unreadable; Interrupted on a signal. At limit 0 a failed read is tried for longer.
    """

    def __init__(self, batches, workers, pin_memory, unreadable_limit=0):
        self.unreadable_limit, batches.patient = unreadable_limit, unreadable_limit == 0
        # Forked, workers share the names and pixels; started afresh, each would hold its own copy.
        context = "fork" if workers and sys.platform == "linux" else None
        super().__init__(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory,
                         multiprocessing_context=context, timeout=POLL if workers else 0)

    def __iter__(self):
        images, num_unreadable = self.dataset.image_set, 0
        # Workers inherit the blocked signals; the training process gets them, too, and decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, launch.SIGNALS)
        batches = super().__iter__()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while batch := self._next(batches):
            num_unreadable += len(batch.unreadable)
            if num_unreadable > self.unreadable_limit:
                index, reason = next(iter(batch.unreadable.items()))
                path = os.path.join(images.root, images.name_of(index))
                more = f" and {num_unreadable - 1} others" if num_unreadable > 1 else ""
                raise UserError(f"{path}{more} cannot be read ({reason}): restore it, and start "
                                "the same command again.")
            yield batch

    def _next(self, batches):
        """The next Batch, or None at the end."""
        for _ in range(LONGEST_WAIT // POLL):
            try:
                return next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if launch.is_dead_worker(error):
                    raise launch.dead_worker(error) from None
                if "timed out" not in str(error):
                    raise
            if launch.signal_is_pending():
                raise Interrupted("Stopped, as a signal asked.")
        raise launch.dead_worker(f"no batch in {LONGEST_WAIT} s")


@dataclass
class _Batches(torch.utils.data.Dataset):
    """Item t is step t's Batch, as a loader worker makes it."""

    image_set: ImageSet
    order: torch.Tensor  # int64 [M], the image at each position of the epoch
    positions: Sequence  # for each step, the positions of this process's rows
    seeds: tuple | None = None  # (seed, epoch)
    augmentation: augment.Augmentation | None = None
    image_size: int | None = None
    transform: Callable | None = None  # for an evaluation, instead of the three above
    patient: bool = False  # see `ImageSet.load`

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, step):
        pixels, draws, indices, unreadable = [], [], [], {}
        cut = self.transform or (lambda x: augment.to_cut(self.augmentation, self.image_size, x))
        # The same on all processes and after a resume, as it counts the steps from here to the end.
        order = _hash("order", self.seeds, len(self) - step) % len(augment.ORDERS)
        for position in map(int, self.positions[step]):
            index = int(self.order[position])
            if index in unreadable:  # an earlier crop of it has waited
                continue
            try:
                if not indices or index != indices[-1]:  # else another crop of it
                    image = cut(self.image_set.load(index, self.patient))
            except UnreadableImage as error:
                unreadable[index] = str(error)
                continue
            indices.append(index)
            if self.transform:
                pixels.append(image)
                continue
            generator = random.Random(_hash("item", self.seeds, position))
            drawn = augment.draw_parameters(self.augmentation, generator, *image.shape[1:],
                                            self.image_size)
            draws.append(drawn._replace(order=order))
            pixels.append(augment.crop_and_flip(image, draws[-1], self.image_size))
        pixels = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        draws = torch.tensor(draws) if draws else torch.empty(0, len(augment.Draw._fields))
        return Batch(pixels, draws, torch.tensor(indices, dtype=torch.int64), unreadable)


def _hash(*words):
    """A seed for a random generator that no other words give: 0 <= seed < 2**63."""
    return int.from_bytes(digest(repr(words).encode()), "little") >> 1
