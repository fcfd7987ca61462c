"""Batches of images: which image comes when, and the workers that read them.

Seed, epoch and position in the epoch decide everything about an item, so that the number of workers changes nothing and
a run that is resumed in the middle of an epoch sees the batches it would have seen.
"""

import functools
import hashlib
import os
import random
import signal
import sys
import warnings
from typing import NamedTuple

import torch

from odc.data import augmentation as augment
from odc.distributed import rank, shard, world_size
from odc.errors import UserError
from odc.runtime.program import SIGNALS, dead_worker
from odc.data.images import BadImage

TRIES = 100  # so many unreadable images in a row, drawn at random, are not bad luck


def default_workers(in_memory):
    """--workers where it is not given: none for images in memory, else up to 4, a core for each if there are so many."""
    if in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Batch(NamedTuple):
    """B rows of this process.

    images: uint8 [B, 3, S, S], cropped and flipped. parameters: float32 [B, P], for `augment.finish`, or [B, 0].
    indices: int64 [B], which image each row is.
    failed: int64 [B], -1, or the index of the unreadable image in whose place the row stands.
    """

    images: torch.Tensor
    draws: torch.Tensor
    indices: torch.Tensor
    failed: torch.Tensor


def blank_batch(batch_size, image_size):
    """A black Batch of the first image, for a process that has none to give."""
    return Batch(torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8),
                 torch.zeros(batch_size, 16),
                 torch.zeros(batch_size, dtype=torch.int64), torch.full((batch_size,), -1))


def steps_per_epoch(num_images, batch_size):
    """Steps of `training_batches` in an epoch: the N draws are rounded up to whole global batches of W * B."""
    return -(-num_images // (world_size() * batch_size))


def training_batches(dataset, augmentation, image_size, batch_size, seed, epoch, first_step=0, workers=0,
                     pin_memory=False):
    """This process's batches of one epoch of pre-training, from first_step on.

    N indices are drawn with replacement, the same on all processes (the recipe's sampling). In step t, process r has
    positions t*W*B + r*B up to t*W*B + (r+1)*B of them.
    """
    steps = steps_per_epoch(len(dataset), batch_size)
    shape = (steps, world_size(), batch_size)
    generator = torch.Generator().manual_seed(_number("indices", seed, epoch))
    indices = torch.randint(len(dataset), shape, generator=generator)
    positions = torch.arange(indices.numel()).view(shape)
    make = functools.partial(_augmented, augmentation=augmentation, size=image_size)
    ends = torch.arange(steps - first_step + 1) * batch_size
    part = (slice(first_step, None), rank())
    return Batches(dataset, make, indices[part].flatten(), positions[part].flatten(), ends, (seed, epoch), workers,
                   pin_memory)


def epoch_batches(dataset, augmentation, image_size, batch_size, seed, epoch, first_step=0, workers=0,
                  pin_memory=False):
    """This process's batches of one epoch in which every image comes once, in a seeded order, from first_step on.

    A last global batch of at least W * B / 2 images is kept and split evenly, a smaller one is joined to the batch
    before: no step sees statistics of a handful of images, and the steps are the same for any W that leaves B >= 2.
    So the last batch may be half as large again. Every process has a row in each. Raises UserError if N < W.
    """
    if len(dataset) < world_size():
        raise UserError(f"{dataset.root} has {len(dataset)} images for {world_size()} processes: start fewer with "
                        "--nproc_per_node.")
    generator = torch.Generator().manual_seed(_number("permutation", seed, epoch))
    order = torch.randperm(len(dataset), generator=generator)
    global_batch = world_size() * batch_size
    whole, rest = divmod(len(dataset), global_batch)
    steps = max(1, whole + (rest >= max(global_batch / 2, world_size())))
    positions, ends = [], [0]
    for step in range(first_step, steps):
        start = step * global_batch
        stop = len(dataset) if step == steps - 1 else start + global_batch
        own = shard(stop - start)
        positions.append(torch.arange(start + own.start, start + own.stop))
        ends.append(ends[-1] + len(positions[-1]))
    positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
    make = functools.partial(_augmented, augmentation=augmentation, size=image_size)
    return Batches(dataset, make, order[positions], positions, torch.tensor(ends), (seed, epoch), workers, pin_memory)


def evaluation_batches(dataset, rows, transform, batch_size, workers=0, pin_memory=False):
    """Batches of the given rows in order, each once, the last one as short as need be.

    rows: a slice, or an int64 tensor of indices. transform: an RGB image -> uint8 [3, S, S].
    An unreadable image keeps its row and index; another image's pixels stand in.
    """
    indices = torch.arange(len(dataset))[rows]
    ends = torch.tensor([*range(0, len(indices), batch_size), len(indices)])
    make = functools.partial(_transformed, transform=transform)
    return Batches(dataset, make, indices, indices, ends, None, workers, pin_memory)


class Batches(torch.utils.data.Dataset):
    """An iterable over Batch, made by the functions above; `len()` is the number of steps.

    indices, positions: int64 [M], the image and the place in the epoch of each of this process's items.
    ends: int64 [steps + 1]; step t has the items ends[t] up to ends[t + 1]. seeds: (seed, epoch), None for evaluation.
    """

    def __init__(self, dataset, make, indices, positions, ends, seeds, workers, pin_memory):
        self.dataset, self.make, self.seeds = dataset, make, seeds
        self.indices, self.positions, self.ends = indices, positions, ends
        self.workers, self.pin_memory = workers, pin_memory

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, step):
        """A worker's work: (Batch, {index: reason} of unreadable images); the Batch is None if all else fails, too."""
        items = range(int(self.ends[step]), int(self.ends[step + 1]))
        reasons = {}
        images, parameters, indices, failed = None, [], [], []
        for row, item in enumerate(items):
            index, position = int(self.indices[item]), int(self.positions[item])
            image, used = self._read(index, position, reasons)
            if image is None:
                return None, reasons
            pixels, numbers = self.make(image, random.Random(_number("item", self.seeds, position)))
            if images is None:
                images = torch.empty(len(items), *pixels.shape, dtype=torch.uint8)
            images[row] = pixels
            parameters.append(numbers)
            indices.append(index if self.seeds is None else used)
            failed.append(-1 if used == index else index)
        return Batch(images, torch.tensor(parameters), torch.tensor(indices), torch.tensor(failed)), reasons

    def _read(self, index, position, reasons):
        """An image and its index: the one asked for, or another one, drawn at random, in place of an unreadable one."""
        others = None
        for _ in range(TRIES):
            try:
                return self.dataset.load(index), index
            except BadImage as error:
                reasons[index] = error.reason
            others = others or random.Random(_number("another image", self.seeds, position))
            index = int(others.random() * len(self.dataset))
        return None, index

    def __iter__(self):
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,  # an item is a batch already
            sampler=range(len(self)),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # Forked, workers share the set's names and pixels; started afresh, each would hold its own copy.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )
        for batch, reasons in _watched(loader):
            for index, reason in reasons.items():
                if index not in self.dataset.unreadable:
                    self.dataset.unreadable[index] = reason
                    name = self.dataset.name_of(index)
                    warnings.warn(f"the image {name!r} cannot be read ({reason}); another one takes its place.",
                                  stacklevel=2)
            if batch is None:
                raise UserError(f"{TRIES} images in a row cannot be read, such as {self.dataset.name_of(index)!r} in "
                                f"{self.dataset.root} ({reason}): check the disk and --data.")
            yield batch


def _watched(loader):
    """What the loader gives, with its workers deaf to the signals that ask a run to stop: the training process gets
    them, too, and decides. Raises UserError if the system has killed a worker."""
    # What is held back during the fork stays so in the workers; not one moment are they open to a signal.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if loader.num_workers else None
    try:
        iterator = iter(loader)
    finally:
        if held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # How it shows depends on what the worker was doing: a message of torch's, or a connection that broke.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise dead_worker(error) from None
        yield item


def _augmented(image, generator, augmentation, size):
    parameters = augment.draw(augmentation, generator, *image.size, size)
    return augment.crop_and_flip(image, parameters, size), parameters


def _transformed(image, generator, transform):
    return transform(image), ()


def _number(*words):
    """A number for a random generator that no other words give: 0 <= number < 2**63."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_unreadable(count, total, dataset, example=None):
    if count > 0.01 * total:
        raise UserError(f"{count} of {total} images in {dataset.root} cannot be read, more than 1%, among them {dataset.name_of(example or 0)}: repair or remove them.")
