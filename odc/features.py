"""Features of all images by a frozen network: one row for every image."""

import hashlib
import os
import secrets

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import MEAN, STD, normalise
from odc.data.loader import check_unreadable, evaluation_batches
from odc.errors import UserError
from odc.runtime import launch
from odc.runtime.log import progress_bar


@torch.no_grad()
def extract(forward, dataset, transform, dim, device, batch_size=64, workers=0, cache=None,
            name="features", images=None):
    """Features of this process's shard of the images, in their order: float32 [n, dim] on `device`.

    forward: normalised images [B, 3, S, S] on `device` -> features [B, dim].
    transform: an RGB image -> uint8 [3, S, S]. name: what the progress bar says.
    images: int64 [N] indices of the images to take; by default all. Another image's features stand
    in for those of an unreadable one, see `loader.gather_unreadable`.
    cache: a path of `cache_path`. If the file is there, the rows come from it; else it is written,
    unless an image is unreadable.
    Raises UserError if more than 1% of the images are unreadable. A collective.
    """
    images = torch.arange(len(dataset)) if images is None else images
    rows = distributed.shard(len(images))
    if cache and not distributed.any_process(not os.path.exists(cache)):
        return _read_rows(cache, rows).to(device)
    features = torch.empty(rows.stop - rows.start, dim, device=device)
    batches = iter(evaluation_batches(dataset, images[rows], transform, batch_size, workers,
                                      pin_memory=device.type == "cuda"))
    # Shards differ by one row, so the numbers of batches may differ. All processes count to the
    # larger one, as the collectives below want it.
    longest = -(-len(images) // distributed.world_size())
    done, failed = 0, 0
    bar = progress_bar(len(features), name, "img")
    for _ in range(0, longest, batch_size):
        launch.check_signals()
        with distributed.raise_everywhere():
            batch = next(batches, None)
            if batch is not None:
                pixels = normalise(batch.images.to(device, non_blocking=True))
                features[done : done + len(pixels)] = forward(pixels)
                done += len(pixels)
                failed += int((batch.failed >= 0).sum())
                bar.update(len(pixels))
    bar.close()
    failed = int(distributed.all_reduce(torch.tensor(failed)))
    check_unreadable(failed, dataset, len(images))
    if cache and not failed:
        save_rows(cache, features, len(images), f"--features-cache {os.path.dirname(cache)}")
    return features


def pixel_features(dataset, transform, size, device, batch_size=64, workers=0):
    """The pixels of every image in 0..1, L2-normalised: this process's rows [n, 3 s s].

    size: of the transform's images [3, size, size]. They are averaged to s = 32 if they are larger.
    """
    side = min(size, 32)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def pixels(images):
        return F.normalize(F.adaptive_avg_pool2d(images * std + mean, side).flatten(1))

    return extract(pixels, dataset, transform, 3 * side**2, device, batch_size, workers,
                   name="pixels")


# --- rows of all processes in one file -----------------------------------------------------------

def cache_path(folder, *parts):
    """The file of --features-cache for features that depend on all of these parts, and no others.

    parts: the fingerprints of weights and images, ... All processes must see the same file system.
    """
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return os.path.join(folder, digest[:16] + ".npy")


def save_rows(path, features, num_rows, option):
    """Write the rows of all processes as one .npy file, all of it or nothing. A collective.

    features: [n, d] of this process; in rank order they make up all num_rows. The processes write
    in turn. option: what an error message names. Raises UserError.
    """
    # Two runs may write the same file at once. The one that ends last wins.
    run = int(distributed.broadcast(torch.tensor(secrets.randbits(62))))
    partial = f"{path}.{run:016x}.partial"
    try:
        for turn in range(distributed.world_size()):
            with distributed.raise_everywhere():
                if turn == distributed.rank():
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    with open(partial, "ab" if turn else "wb") as file:
                        if turn == 0:
                            shape = (num_rows, *features.shape[1:])
                            np.lib.format.write_array_header_1_0(
                                file, dict(descr="<f4", fortran_order=False, shape=shape))
                        for part in features.split(65536):
                            file.write(part.cpu().contiguous().numpy().data)
                        file.flush()
                        os.fsync(file.fileno())
        with distributed.raise_everywhere():
            if distributed.is_main():
                os.replace(partial, path)
    except UserError as error:
        if distributed.is_main() and os.path.exists(partial):
            os.remove(partial)
        raise UserError(f"{option}: could not be written ({str(error).rstrip('.')}); make room, or "
                        "choose another folder.") from None


def _read_rows(path, rows):
    """Rows of a file of `save_rows`."""
    with distributed.raise_everywhere():
        try:
            return torch.from_numpy(np.load(path, mmap_mode="c")[rows])
        except (ValueError, EOFError) as error:
            raise UserError(f"--features-cache: {path} is damaged; delete it.") from error


def weights_fingerprint(network):
    """A hexadecimal string that changes with any parameter or buffer of a network."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
