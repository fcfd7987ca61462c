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
import time
import uuid

import torch
import torch.distributed as dist

from odc.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # a process that misses a collective for so long is lost

_store = None  # the group's key-value store; it works even when collectives no longer do


# --- the group -----------------------------------------------------------------------------------

def init(device="auto"):
    """Choose this process's device and join the process group that torchrun describes.

    device: "auto" (CUDA if each process can have a device of its own), "cpu", "cuda" or "cuda:3".
    Returns a torch.device. Raises UserError for a device that does not exist.
    """
    global _store
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"The environment has WORLD_SIZE, but not {' and '.join(missing)}: start "
                        "with torchrun, or unset WORLD_SIZE.")
    store, rank, world_size = next(dist.rendezvous("env://"))
    _store = _unused_store(store, rank, world_size)
    check_same_device(_store, rank, device.type)
    on_cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT,
                            store=dist.PrefixStore("group", _store), rank=rank,
                            world_size=world_size, device_id=device if on_cuda else None)
    return device


def choose_device(device):
    """The torch.device of this process. All processes of a machine come to the same answer."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if available else "cpu"
        # On several machines, too few GPUs are a mistake, which the checks below report.
        if 0 < available < processes == int(os.environ.get("WORLD_SIZE", 1)):
            device = "cpu"
            if local_rank == 0:
                print(f"{processes} processes for {available} CUDA device(s): they run on the CPU. "
                      "To use CUDA, start as many processes as devices.", flush=True)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:INDEX.")
    if device == "cpu":
        return torch.device("cpu")
    if not available:
        raise UserError(f"--device {device}: no CUDA device is available; use --device cpu.")
    if device != "cuda" and processes > 1:
        raise UserError(f"--device {device}: each of several processes needs a device of its own; "
                        "use --device cuda.")
    index = local_rank if device == "cuda" else int(device.split(":")[1])
    if max(processes - 1, index) >= available:
        raise UserError(f"--device {device}: this machine has {available} CUDA device(s), numbered "
                        "from 0; start at most one process a device with --nproc_per_node.")
    return torch.device("cuda", index)


def check_same_device(store, rank, device_type):
    """Raise UserError on a process whose device_type, "cpu" or "cuda", is not that of process 0.

    A machine whose GPUs are not seen would otherwise wait for the others for ever.
    """
    if rank == 0:
        store.set("device", device_type)
    if device_type != (first := store.get("device").decode()):
        raise UserError(f"Process {rank} would run on {device_type} and process 0 on {first}: give "
                        "--device cpu, or find out why the GPUs of a machine are not seen.")


def _unused_store(store, rank, world_size):
    """A part of the store that no earlier start of the processes has written to.

    When torchrun restarts lost processes, the store still holds the addresses of the lost ones.
    gloo would connect to those and fail, or wait for ever. So process 0 opens a round under a new
    name. The others join every round that they read of, until one lists them as members. A round
    of an earlier start never lists them.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("round", me)
        others = [f"{me}/{r}" for r in range(1, world_size)]
        store.wait(others)
        store.set(f"{me}/members", " ".join(store.get(other).decode() for other in others))
        return dist.PrefixStore(me, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("round").decode()
        store.set(f"{name}/{rank}", me)
        if store.check([f"{name}/members"]) and me in store.get(f"{name}/members").decode():
            return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise UserError(f"Process {rank} found no process 0 in {TIMEOUT}: start as many processes as "
                    "--nproc_per_node says.")


def rank():
    """The number of this process, 0 <= rank < W."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on process 0, the only one that prints and that writes most files."""
    return rank() == 0


def print_main(*words, **options):
    """`print` on process 0 alone, flushed at once."""
    if is_main():
        print(*words, **options, flush=True)


def is_first(key):
    """True on the first process that asks with this key. Works when collectives no longer do."""
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store.add(key, 1) == 1
    except RuntimeError:  # the machine of process 0 is gone
        return True


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


def all_gather_rows(tensor):
    """Concatenate equal numbers of rows in rank order: [n, ...] -> [W * n, ...] everywhere."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def all_gather_uneven_rows(tensor):
    """As `all_gather_rows` for [n_r, ...] on rank r; the numbers of rows may differ or be zero."""
    if world_size() == 1:
        return tensor
    counts = all_gather_rows(torch.tensor([len(tensor)])).tolist()
    # Collectives want equal shapes: pad to the longest part, and cut the padding off again.
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = all_gather_rows(padded).split(max(counts)) if max(counts) else [tensor] * len(counts)
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


def share_statistics(network):
    """Copy process 0's buffers to all: they measure and save the same network. A collective."""
    for buffer in network.buffers():
        broadcast(buffer)
