"""Features of a frozen network: one matrix row for every image, and the pooled maps that the benchmarks use."""

import contextlib
import glob
import hashlib
import os
import shutil
import sys
import time
import uuid

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from odc.runtime import program
from odc import distributed
from odc.data.augmentation import normalise
from odc.errors import UserError
from odc.data.loader import evaluation_batches

# --- pooled maps, about 9000 numbers each (recipes of the linear and SVM benchmarks) ---------------------------------

# (channels, height) of ResNet-50's five maps at 224, and for each the (kernel, stride, padding) of its average pool.
RESNET50_MAPS = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
RESNET50_POOLS = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]
GRIDS = [12, 6, 4, 3, 2]  # what these pools leave; the target for other networks and image sizes
MAP_NAMES = ["feature1", "feature2", "feature3", "feature4", "feature5"]


def map_shapes(backbone, image_size):
    """[(channels, height, width)] of the five maps for one image size."""
    device = next(backbone.parameters()).device
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    return [tuple(feature_map.shape[1:]) for feature_map in maps]


def map_pools(shapes):
    """The five pooling modules for maps of these shapes: the recipe's for ResNet-50 at 224, else adaptive ones.

    Adaptive pools have the recipe's grid, capped by the map's own size.
    """
    if [(channels, height) for channels, height, _ in shapes] == RESNET50_MAPS:
        return [nn.AvgPool2d(kernel, stride, padding) for kernel, stride, padding in RESNET50_POOLS]
    return [
        nn.AdaptiveAvgPool2d((min(grid, height), min(grid, width))) for grid, (_, height, width) in zip(GRIDS, shapes)
    ]


def pooled_shapes(shapes):
    """[(channels, height, width)] of the five maps after `map_pools`."""
    pools = map_pools(shapes)
    return [(shape[0], *pool(torch.zeros(1, 1, *shape[1:])).shape[2:]) for pool, shape in zip(pools, shapes)]


# --- extraction ------------------------------------------------------------------------------------------------------


def extract_rows(forward, dataset, transform, dims, device, batch_size=64, workers=0, cache=None, name="features",
                 images=None):
    """Features of this process's contiguous shard of a data set, in the order of its images.

    forward: normalised images [B, 3, S, S] on `device` -> features [B, d], or a list of them; called without gradients.
    transform: what the loader's workers make of an image, a name or function that gives uint8 [3, S, S].
    dims: d, or the list of widths where forward gives a list.
    cache: a `Cache`, or None. With one, rows come from its files if they are complete, else they are written there.
    name: what the progress bar says. images: int64 [N] indices of the images to take, in this order; None takes all.
    Returns float32 [n_local, d] on `device` (with a cache: on the CPU, memory-mapped), or the list of them.
    Raises UserError if more than 1% of the images cannot be read, or the cache cannot be written. A collective.
    """
    images = torch.arange(len(dataset)) if images is None else images
    rows = distributed.shard(len(images))
    if cache is not None:
        if not cache.is_complete():
            with cache.writing(len(images), dims) as write:
                _fill(forward, dataset, images, transform, device, batch_size, workers, name, write)
        matrices = [matrix[rows] for matrix in cache.read(dims)]
    else:
        matrices = [torch.empty(rows.stop - rows.start, dim, device=device) for dim in _as_list(dims)]

        def write(start, features):
            for matrix, part in zip(matrices, features):
                matrix[start : start + len(part)] = part

        _fill(forward, dataset, images, transform, device, batch_size, workers, name, write)
    return matrices[0] if isinstance(dims, int) else matrices


def extract(forward, dataset, transform, dims, device, batch_size=64, workers=0, cache=None, name="features",
            images=None):
    """As `extract_rows`, but the rows of all images on every process: [N, d] on the CPU, or the list of them."""
    rows = extract_rows(forward, dataset, transform, dims, device, batch_size, workers, cache, name, images)
    if cache is not None:
        matrices = cache.read(dims)
    else:
        matrices = [distributed.all_gather_uneven_rows(part).cpu() for part in ([rows] if isinstance(dims, int) else rows)]
    return matrices[0] if isinstance(dims, int) else matrices


def _as_list(dims):
    return [dims] if isinstance(dims, int) else list(dims)


@torch.no_grad()
def _fill(forward, dataset, images, transform, device, batch_size, workers, name, write):
    """Call write(first row within the shard, [features [B, d], ...]) for every batch of this process's shard."""
    rows = images[distributed.shard(len(images))]
    # Shards differ by one row, so the number of batches may, too; the collectives below need the larger one.
    longest = -(-len(images) // distributed.world_size())
    batches = iter(evaluation_batches(
        dataset, rows, transform, batch_size, workers=workers, pin_memory=device.type == "cuda"
    ))
    done, failed = 0, 0
    bar = tqdm(total=len(rows), desc=name, unit="img", leave=False,
               disable=not (distributed.is_main() and sys.stderr.isatty()))
    for _ in range(-(-longest // batch_size)):
        program.check_signals()
        with distributed.together():
            batch = next(batches, None)
            if batch is None:
                continue
            features = forward(normalise(batch.images.to(device, non_blocking=True)))
            features = [features] if torch.is_tensor(features) else features
            write(done, [part.float() for part in features])
            done += len(batch.images)
            failed += int((batch.failed >= 0).sum())
            bar.update(len(batch.images))
    bar.close()
    failed = int(distributed.all_reduce(torch.tensor(failed)))
    if failed > 0.01 * len(images):
        raise UserError(f"{dataset.root}: {failed} of {len(images)} images cannot be read; more than 1% is too many.")


# --- the cache -------------------------------------------------------------------------------------------------------


class Cache:
    """Matrices [N, d] in a folder of their own, named after what they were made from; read memory-mapped.

    folder: what --features-cache names. parts: everything that decides the numbers: `weights_fingerprint`, the data
    set's fingerprint, the transform, the maps. Another value of any of them is another folder.
    All processes must see the same file system. A folder with its final name is complete.
    """

    def __init__(self, folder, *parts):
        digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()
        self.path = os.path.join(folder, digest[:16])

    def is_complete(self):
        """True everywhere if every process finds the matrices."""
        return not distributed.any_process(not os.path.isdir(self.path))

    def read(self, dims):
        """[N, d] memory-mapped float32 tensors, one for each of dims."""
        with distributed.together():
            try:
                arrays = [np.load(_file(self.path, i), mmap_mode="c") for i in range(len(_as_list(dims)))]
            except (ValueError, EOFError, FileNotFoundError) as error:
                raise UserError(f"--features-cache: {self.path} is damaged; delete it.") from error
        return [torch.from_numpy(array) for array in arrays]

    def writing(self, num_rows, dims):
        return _Writer(self.path, num_rows, _as_list(dims))


def _file(path, i):
    return os.path.join(path, f"{i}.npy")


class _Writer:
    """Each process writes its rows into files that all share; the folder gets its final name when all are done.

    Plain writes rather than a memory-mapped array, because a full disk is an OSError for the first and a crash for
    the second.
    """

    def __init__(self, path, num_rows, dims):
        self.path, self.num_rows, self.dims = path, num_rows, dims
        # A name of this run's own, as two runs may make the same features at the same time.
        self.partial = f"{path}.partial-{int(distributed.broadcast(torch.tensor(uuid.uuid4().int >> 65))):016x}"
        self.files = []

    def __enter__(self):
        try:
            self._open()
        except UserError as error:
            self.__exit__(type(error), error, None)
            raise
        return self.write

    @contextlib.contextmanager
    def _naming_the_folder(self):
        """Errors of the disk become sentences that name the cache and the remedy."""
        try:
            yield
        except OSError as error:
            raise UserError(f"--features-cache: {os.path.dirname(self.path)} cannot be written ({error.strerror or error}); "
                            "make room, or choose another folder.") from None

    def _open(self):
        with distributed.together(), self._naming_the_folder():
            if distributed.is_main():
                for left in glob.glob(f"{glob.escape(self.path)}.partial-*"):  # of a run that was killed, if it is old
                    with contextlib.suppress(OSError):  # its owner may be done with it at this moment
                        if time.time() - max(map(os.path.getmtime, [left, *glob.glob(f"{glob.escape(left)}/*")])) > 86400:
                            shutil.rmtree(left, ignore_errors=True)
                os.makedirs(self.partial, exist_ok=True)
                for i, dim in enumerate(self.dims):
                    np.lib.format.open_memmap(_file(self.partial, i), "w+", np.float32, (self.num_rows, dim))
        with distributed.together(), self._naming_the_folder():
            first = distributed.shard(self.num_rows).start
            for i, dim in enumerate(self.dims):
                offset = np.load(_file(self.partial, i), mmap_mode="r").offset
                self.files.append(open(_file(self.partial, i), "r+b"))
                self.files[-1].seek(offset + first * dim * 4)

    def write(self, start, features):
        with self._naming_the_folder():
            for file, part in zip(self.files, features):
                file.write(part.cpu().contiguous().numpy().data)

    def __exit__(self, kind, error, traceback):
        try:
            with distributed.together(), self._naming_the_folder():
                for file in self.files:
                    if kind is None:
                        file.flush()
                        os.fsync(file.fileno())
                    file.close()
            if kind is None:
                with distributed.together(), self._naming_the_folder():
                    # Another run may have been faster, with the same numbers.
                    if distributed.is_main() and not os.path.isdir(self.path):
                        os.rename(self.partial, self.path)
        finally:
            if distributed.is_main():
                shutil.rmtree(self.partial, ignore_errors=True)


def weights_fingerprint(network):
    """A hexadecimal string that changes with any parameter or buffer of a network."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
