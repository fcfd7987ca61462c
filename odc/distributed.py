"""The process group, and the few collectives that the method needs.

Letters in all shapes of this repository: N images, B batch on this process, K clusters,
d feature width, W processes. Without torchrun there is one process and no group.
"""

import contextlib
import datetime
import os
import re
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from odc.errors import Interrupted, UserError

TIMEOUT = datetime.timedelta(minutes=30)  # a process that misses a collective for so long is lost


def init(device="auto"):
    """Choose this process's device and join the process group that torchrun describes.

    device: "auto" (CUDA if each process can have a device of its own), "cpu", "cuda" or "cuda:3".
    Returns a torch.device. Raises UserError if it does not exist, or is a CPU beside others' GPUs.
    """
    device = choose_device(device)
    torch.set_float32_matmul_precision("highest")  # no TF32, though the environment asks for it
    if on_cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    if not os.environ.get("WORLD_SIZE") or dist.is_initialized():
        return device
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except ValueError as error:
        raise UserError(f"{error}: start with torchrun, or unset WORLD_SIZE.") from None
    # torchrun's store outlives lost processes, to whose addresses gloo would connect.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    check_same_device(store, rank, world_size, device.type)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT,
                            store=store, rank=rank, world_size=world_size,
                            device_id=device if on_cuda else None)
    return device


def choose_device(device):
    if not (match := re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:INDEX.")
    processes, available = environment("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if device == "auto" and 0 < available < processes:
        print_main(f"{processes} processes run on the CPU; for CUDA start at most {available}.")
    if device == "cpu" or device == "auto" and available < processes:
        return torch.device("cpu")
    index = int(match[1] or environment("LOCAL_RANK", 0))
    if max(index, processes - 1) >= available or match[1] and processes > 1:
        raise UserError(f"--device {device}: this machine has {available} CUDA device(s), numbered "
                        "from 0, and each process needs its own; start fewer, or give cpu.")
    return torch.device("cuda", index)


def check_same_device(store, rank, world_size, kind):
    """Raise UserError everywhere if kinds differ: NCCL would wait for a CPU for ever."""
    store.set(f"device {rank}", kind)
    kinds = [store.get(f"device {r}").decode() for r in range(world_size)]
    if len(set(kinds)) > 1:
        raise UserError(f"Process {kinds.index('cpu')} would run on cpu and others on cuda: give "
                        "--device cpu, or find out why the GPUs of a machine are not seen.")


def environment(name, default):
    """A number that torchrun sets, or the default if torchrun has not started this process."""
    return int(os.environ.get(name) or default) if os.environ.get("WORLD_SIZE") else default


def rank():
    """The number of this process, 0 <= rank < W."""
    return dist.get_rank() if dist.is_initialized() else environment("RANK", 0)


def world_size():
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on process 0, the only one that prints and that writes most files."""
    return rank() == 0


def print_main(*words):
    """`print` on process 0 alone, flushed at once, above a progress bar if there is one."""
    if is_main():
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def shard(num_rows, of_rank=None):
    """The contiguous rows that a process holds of num_rows, as a slice; sizes differ by one."""
    r, W = rank() if of_rank is None else of_rank, world_size()
    return slice(num_rows * r // W, num_rows * (r + 1) // W)


def seed(number, epoch, step):
    """Seed torch's global generators from the place in the run and the process."""
    place = ((number * 1_000_003 + epoch) * 1_000_003 + step) * 65_537 + rank()
    torch.manual_seed(place % 2**63)


def all_reduce(tensor):
    """Sum a tensor over the processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor, source=0):
    """Copy one process's values of a tensor to all processes, in place, and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def share_statistics(network):
    """Copy process 0's running statistics to all: they measure and save the same network."""
    for buffer in network.buffers():
        broadcast(buffer)


def all_gather_rows(tensor):
    """Concatenate equal numbers of rows in rank order: [n, ...] -> [W * n, ...] everywhere."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)  # the forms with a single output have other names in torch 2.14
    return torch.cat(parts)


def all_gather_uneven_rows(tensor):
    """As `all_gather_rows` for [n_r, ...] on rank r; the numbers of rows may differ or be zero."""
    if world_size() == 1:
        return tensor
    counts = all_gather_rows(torch.tensor([len(tensor)])).tolist()
    padded = tensor.new_zeros(max(1, *counts), *tensor.shape[1:])  # collectives want equal shapes
    padded[: len(tensor)] = tensor
    parts = all_gather_rows(padded).split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def all_gather_objects(value):
    """The values of all processes, any objects that can be pickled, in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """True everywhere if `flag` is true on any process."""
    return bool(all_reduce(torch.tensor(int(bool(flag)))))


def same_everywhere(value):
    """True everywhere if every process has an equal value (any object that can be pickled)."""
    first, *others = all_gather_objects(value)
    return all(other == first for other in others)


@contextlib.contextmanager
def raise_everywhere(path=None):
    """Run a block without collectives on every process, and let all processes leave it alike.

    All raise the UserError, Interrupted or OSError (as a UserError about path) of the lowest rank.
    """
    error = None
    try:
        yield
    except (UserError, Interrupted) as caught:
        error = caught
    except OSError as caught:
        error = UserError(f"{path or caught.filename or 'a file'}: {caught.strerror or caught}; "
                          "put this right, and start the same command again.")
    if any_process(error):
        raise next(filter(None, all_gather_objects(error))) from None
