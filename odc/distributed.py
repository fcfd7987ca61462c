"""The process group, and the few collectives that the method needs.

Letters in all shapes of this repository: N images, B batch on this process, K clusters,
d feature width, W processes.

torchrun starts W processes. They share a gloo group for CPU tensors and, on CUDA devices, an NCCL
group for CUDA tensors. Without torchrun there is one process and no group, and every function here
returns at once.
"""

import contextlib
import datetime
import os
import re
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from odc.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # a process that misses a collective for so long is lost


# --- the group -----------------------------------------------------------------------------------

def init(device="auto"):
    """Choose this process's device and join the process group that torchrun describes.

    device: "auto" (CUDA if each process can have a device of its own), "cpu", "cuda" or "cuda:3".
    Returns a torch.device. Raises UserError for a device that does not exist, or on every process
    if they would run on different kinds of devices.
    """
    device = choose_device(device)
    torch.set_float32_matmul_precision("highest")  # no TF32, though the environment asks for it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not os.environ.get("WORLD_SIZE") or dist.is_initialized():
        return device
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise UserError(f"The environment has WORLD_SIZE, but not {' and '.join(missing)}: start "
                        "with torchrun, or unset WORLD_SIZE.")
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # This store outlives the processes. After a restart it still has the addresses of the lost
        # ones, to which gloo would connect.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    check_same_device(store, rank, world_size, device.type)
    on_cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT,
                            store=store, rank=rank, world_size=world_size,
                            device_id=device if on_cuda else None)
    return device


def choose_device(device):
    """The torch.device of this process."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:INDEX.")
    processes = _environment("LOCAL_WORLD_SIZE", 1)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and 0 < available < processes:
        print_main(f"{processes} processes for {available} CUDA device(s): they run on the CPU. To "
                   "use CUDA, start as many processes as devices.")
    if device == "cpu" or device == "auto" and available < processes:
        return torch.device("cpu")
    _, _, index = device.partition(":")
    index = int(index or _environment("LOCAL_RANK", 0))
    if max(index, processes - 1) >= available or ":" in device and processes > 1:
        raise UserError(f"--device {device}: this machine has {available} CUDA device(s), numbered "
                        "from 0, and each process needs one of its own; start fewer processes with "
                        "--nproc_per_node, or use --device cpu.")
    return torch.device("cuda", index)


def check_same_device(store, rank, world_size, device_type):
    """Raise UserError everywhere if some processes have device_type "cpu" and others "cuda".

    A machine whose GPUs are not seen would otherwise wait for the others for ever.
    """
    store.set(f"device {rank}", device_type)
    types = [store.get(f"device {r}").decode() for r in range(world_size)]
    if others := [r for r in range(world_size) if types[r] != types[0]]:
        raise UserError(f"Process {others[0]} would run on {types[others[0]]} and process 0 on "
                        f"{types[0]}: give --device cpu, or find out why the GPUs of a machine are "
                        "not seen.")


def _environment(name, default):
    """A number that torchrun sets. One that is left over from elsewhere has no WORLD_SIZE."""
    return int(os.environ.get(name) or default) if os.environ.get("WORLD_SIZE") else default


def rank():
    """The number of this process, 0 <= rank < W."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on process 0, the only one that prints and that writes most files."""
    return (dist.get_rank() if dist.is_initialized() else _environment("RANK", 0)) == 0


def print_main(*words):
    """`print` on process 0 alone, flushed at once, above a progress bar if there is one."""
    if is_main():
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def shard(num_rows, of_rank=None):
    """The contiguous rows that a process holds of num_rows, as a slice; sizes differ by one."""
    r, W = rank() if of_rank is None else of_rank, world_size()
    return slice(num_rows * r // W, num_rows * (r + 1) // W)


# --- collectives ---------------------------------------------------------------------------------

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
    counts = all_gather_rows(torch.tensor([len(tensor)])).tolist()
    if world_size() == 1 or not max(counts):
        return tensor
    # Collectives want equal shapes: pad to the longest part, and cut the padding off again.
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = all_gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def any_process(flag):
    """True everywhere if `flag` is true on any process."""
    return bool(all_reduce(torch.tensor(int(bool(flag)))))


def same_everywhere(value):
    """True everywhere if every process has an equal value (any object that can be pickled)."""
    values = all_gather_objects(value)
    return all(other == values[0] for other in values)


@contextlib.contextmanager
def raise_everywhere():
    """Run a block on every process, and let all processes leave it alike.

    If the block raises UserError or OSError anywhere, every process raises the UserError of the
    lowest such rank. The block must not contain collectives.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}."
    if any_process(message is not None):
        raise UserError(next(filter(None, all_gather_objects(message))))


def all_gather_objects(value):
    """The values of all processes, any objects that can be pickled, in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def seed(number, epoch, step):
    """Seed torch's global generators from the place in the run and the process."""
    place = ((number * 1_000_003 + epoch) * 1_000_003 + step) * 65_537 + rank()
    torch.manual_seed(place % 2**63)
