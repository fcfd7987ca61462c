"""Features of all images by a frozen network: one row for every image."""

import collections
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import mean_and_std, normalise
from odc.data.loader import evaluation_batches
from odc.errors import UserError
from odc.runtime import checkpoint, launch
from odc.runtime.log import progress_bar


@torch.no_grad()
def extract(forward, dataset, transform, dim, device, batch_size=64, workers=0, name="features",
            unreadable_share=0.01):
    """Features of this process's shard of the images, in order: float32 [n, dim]. A collective.

    forward: normalised images [B, 3, S, S] -> [B, dim]. transform: an RGB image -> uint8 [3, S, S].
    Images that cannot be read leave `dataset`. Raises UserError for more than unreadable_share.
    """
    rows, unreadable = distributed.shard(len(dataset)), {}
    features = torch.empty(rows.stop - rows.start, dim, device=device)
    batches = iter(evaluation_batches(
        dataset, rows, transform, batch_size, workers, pin_memory=device.type == "cuda",
        unreadable_limit=len(dataset) if unreadable_share else 0))
    # Numbers of batches may differ by one: all count to the larger, as collectives want it.
    longest, done = -(-len(dataset) // distributed.world_size()), 0
    bar = progress_bar(len(features), name, "img")
    for _ in range(0, longest, batch_size):
        launch.check_signals()
        with distributed.raise_everywhere():
            batch = next(batches, None)
            if batch is not None:
                unreadable |= batch.unreadable
            if batch is not None and len(batch.indices):
                pixels = normalise(batch.images.to(device, non_blocking=True))
                features[done : done + len(pixels)] = forward(pixels)
                done += len(pixels)
                bar.update(len(pixels))
    bar.close()
    if distributed.any_process(unreadable):
        leave_out(dataset, unreadable, unreadable_share)
        features = reshard(features[:done])
    return features


def leave_out(dataset, unreadable, share):
    """Remove the images that any process found unreadable, {index: reason}. A collective."""
    own = {dataset.name_of(index): reason for index, reason in unreadable.items()}
    everywhere = dict(collections.ChainMap(*distributed.all_gather_objects(own)))
    name, reason = min(everywhere.items())
    text = (f"{len(everywhere):,} of {len(dataset):,} images in {dataset.root} cannot be read, "
            f"such as {name!r} ({reason})")
    if len(everywhere) > share * len(dataset) or len(everywhere) == len(dataset):
        raise UserError(f"{text}: repair or remove them.")
    distributed.print_main(f"{text}; they are left out.")
    dataset.leave_out(everywhere)


def reshard(rows):
    """Deal rows [n_r, ...] of uneven parts anew, a shard of all to each process. A collective."""
    counts = distributed.all_gather_rows(torch.tensor([len(rows)])).tolist()
    own, start, parts = distributed.shard(sum(counts)), 0, []
    for r, count in enumerate(counts):
        part = rows if r == distributed.rank() else rows.new_empty(count, *rows.shape[1:])
        part = distributed.broadcast(part.contiguous(), source=r)
        parts.append(part[max(own.start - start, 0) : max(own.stop - start, 0)])
        start += count
    return torch.cat(parts)


def unit_pixels(images):
    """Pixels in 0..1 of normalised images [B, 3, S, S], 32 x 32 at most, as unit vectors."""
    mean, std = mean_and_std(images.device)
    side = min(images.shape[-1], 32)
    return F.normalize(F.adaptive_avg_pool2d(images * std + mean, side).flatten(1))


def write_rows(path, features, num_rows):
    """Write features [n, d] of each process as one .npy file. A collective. Raises UserError."""
    token = distributed.all_gather_objects(checkpoint.TOKEN)[0]  # of process 0: see checkpoint.py
    partial = f"{path}.{token}.partial"
    try:
        for turn in range(distributed.world_size()):
            with distributed.raise_everywhere(path):
                if turn == distributed.rank():
                    with open(partial, "ab" if turn else "wb") as file:
                        if turn == 0:
                            shape = (num_rows, *features.shape[1:])
                            np.lib.format.write_array_header_1_0(
                                file, dict(descr="<f4", fortran_order=False, shape=shape))
                        for part in features.split(65536):
                            file.write(part.cpu().numpy().tobytes())
                        file.flush()
                        os.fsync(file.fileno())
        with distributed.raise_everywhere():
            if distributed.is_main():
                os.replace(partial, path)
    except UserError:
        if distributed.is_main():
            Path(partial).unlink(missing_ok=True)
        raise


def weights_fingerprint(network):
    """A hexadecimal string that changes with any parameter or buffer of a network."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
