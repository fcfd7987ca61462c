"""The process group, and the few collectives that the method needs.

Letters used in all shapes of this repository: N images, B batch on this process, K clusters, d feature width,
W processes.

Without torchrun there is one process and no process group: every function here then returns at once. With torchrun
the group is gloo for CPU tensors and, on a CUDA device, NCCL for CUDA tensors.
"""

import contextlib
import datetime
import multiprocessing
import os
import re
import signal
import sys
import time
import uuid

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one sentence with the value or path and the remedy.

    Raise it on every process alike or within `together`, so that none is left waiting for the others.
    """


class Interrupted(Exception):
    """A signal asked the run to stop; raised on every process at the same point of the program."""


GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # a process that has not come to a collective by then is lost

_store = None  # what the processes share besides the group, and still do when a collective is no longer possible


# --- the group -------------------------------------------------------------------------------------------------------


def init(device="auto"):
    """Join the process group that torchrun describes, if there is one, and choose this process's device.

    device: "auto" (CUDA if there is a device for each process), "cpu", "cuda" or "cuda:3".
    Raises UserError for a device that is not there. Returns a torch.device.
    """
    if device == "auto":
        device = _auto_device()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:INDEX.")
    if device == "cpu":
        device = torch.device("cpu")
    else:
        device = _cuda_device(device)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        global _store
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"The environment has WORLD_SIZE, but not {' and '.join(missing)}: start with torchrun, or unset "
                            "WORLD_SIZE.")
        store, rank, world_size = next(dist.rendezvous("env://"))
        _store = _unused_part(store, rank, world_size)
        _check_device(device, rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=rank, world_size=world_size,
                                timeout=GROUP_TIMEOUT)
    return device


def _unused_part(store, rank, world_size):
    """A part of a store that no earlier start of the processes has written to, the same for all of this start.

    torchrun restarts lost processes on the store of the lost ones. Where their old addresses still stand there, gloo
    connects to them and fails or waits for ever. So process 0 opens a round under a name of its own, and each other one
    joins the rounds that it reads of until one lists it as a member: a round of an earlier start never does.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("round", me)
        others = [f"{me}/{r}" for r in range(1, world_size)]
        store.wait(others)
        store.set(f"{me}/members", " ".join(store.get(other).decode() for other in others))
        return dist.PrefixStore(me, store)
    deadline = time.monotonic() + GROUP_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("round").decode()
        store.set(f"{name}/{rank}", me)
        if store.check([f"{name}/members"]) and me in store.get(f"{name}/members").decode().split():
            return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise UserError(f"Process {rank} found no process 0 in {GROUP_TIMEOUT}: start as many as --nproc_per_node says.")


def _check_device(device, rank):
    """Refuse a mixture of CPUs and GPUs, such as a machine whose driver does not work, before it waits for ever."""
    if rank == 0:
        _store.set("device", device.type)
    expected = _store.get("device").decode()
    if device.type != expected:
        raise UserError(f"Process {rank} would run on {device.type} and process 0 on {expected}: give --device cpu, or look "
                        "why the devices of a machine are not seen.")


def _auto_device():
    """What --device auto means here: cuda or cpu, the same on all processes."""
    available, processes = _num_cuda_devices(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # On one machine all processes come to the same answer; on several, too few devices are a mistake to be told of.
    if 0 < available < processes == int(os.environ.get("WORLD_SIZE", 1)):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{processes} processes for {available} CUDA device(s): they run on the CPU. To use CUDA, start as many "
                  "processes as devices.", flush=True)
        return "cpu"
    return "cuda" if available else "cpu"


def _num_cuda_devices():
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda_device(device):
    """One CUDA device for each process of this machine; what is wrong is wrong for all of them alike."""
    available = _num_cuda_devices()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not available:
        raise UserError(f"--device {device}: no CUDA device is available here; use --device cpu.")
    if device != "cuda" and processes > 1:
        raise UserError(f"--device {device}: with several processes each takes a device of its own; use --device cuda.")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else int(device.split(":")[1])
    if max(processes - 1, index) >= available:
        raise UserError(f"--device {device}: this machine has {available} CUDA device(s), numbered from 0; start at most "
                        "one process a device with --nproc_per_node.")
    return torch.device("cuda", index)


def rank():
    """This process's number, 0 <= rank < W."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on the one process that writes files and speaks."""
    return rank() == 0


def print_main(*words, **options):
    """`print`, on the main process only, flushed at once."""
    if is_main():
        print(*words, **options, flush=True)


def shard(num_rows, of_rank=None):
    """The contiguous rows [start, stop) of num_rows that a process holds, as a slice; sizes differ by one at most."""
    r, W = rank() if of_rank is None else of_rank, world_size()
    return slice(num_rows * r // W, num_rows * (r + 1) // W)


def seed_step(seed, epoch, step):
    """Seed torch's global generators from the place in the run and the process, whatever came before."""
    torch.manual_seed((((seed * 1_000_003 + epoch) * 1_000_003 + step) * 65_537 + rank()) % 2**63)


# --- collectives -----------------------------------------------------------------------------------------------------


def all_reduce(tensor):
    """Sum a tensor over the processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor):
    """Give every process the main process's values of a tensor, in place; returns it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather_rows(tensor):
    """Concatenate the rows of every process in rank order: [n_r, ...] on rank r -> [n_0 + n_1 + ..., ...] everywhere.

    The numbers of rows may differ and may be zero.
    """
    if world_size() == 1:
        return tensor
    own = torch.tensor([len(tensor)])
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    counts = [int(count) for count in counts]
    longest = max(counts)
    if longest == 0:
        return tensor
    # Collectives want equal shapes: pad to the longest and cut the padding off again.
    padded = tensor
    if len(tensor) < longest:
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def gather_rows(tensor, chunk_rows=65536):
    """As `all_gather_rows`, but the result exists, in CPU memory, on the main process only; elsewhere None."""
    if world_size() == 1:
        return tensor.detach().cpu().clone()
    own = torch.tensor([len(tensor)])
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    counts = [int(count) for count in counts]
    result = torch.empty(sum(counts), *tensor.shape[1:], dtype=tensor.dtype) if is_main() else None
    done = 0
    for source, count in enumerate(counts):
        for start in range(0, count, chunk_rows):
            size = min(chunk_rows, count - start)
            part = None
            if rank() == source:
                part = tensor[start : start + size].detach().cpu().contiguous()
            if source != 0:
                if is_main():
                    part = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype)
                    dist.recv(part, src=source)
                elif rank() == source:
                    dist.send(part, dst=0)
            if is_main():
                result[done : done + size] = part
                done += size
    return result


def same_everywhere(value):
    """True everywhere if every process has an equal value."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def any_process(flag):
    """True everywhere if `flag` is true on any process."""
    if world_size() == 1:
        return bool(flag)
    count = torch.tensor([int(bool(flag))])
    dist.all_reduce(count)
    return bool(count)


@contextlib.contextmanager
def together():
    """Run a block on every process and agree on how it went.

    If the block raises UserError or OSError on any process, every process leaves the block with the UserError of the
    lowest such rank, so that no process waits in a collective for one that has stopped. The block itself must not
    contain collectives.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}."
    messages = [message]
    if world_size() > 1:
        messages = [None] * world_size()
        dist.all_gather_object(messages, message)
    failures = [m for m in messages if m is not None]
    if failures:
        raise UserError(failures[0])


# --- signals and the exit code ---------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # those that ask a run to stop

_signal_received = None  # number of the first signal, or None
_signal_time = 0.0


def _on_signal(number, frame):
    global _signal_received, _signal_time
    if _signal_received is None:
        _signal_received, _signal_time = number, time.monotonic()
    elif time.monotonic() - _signal_time > 1:
        # The second signal: at once, without clean-up. Within a second it is the first one again, from torchrun.
        os._exit(128 + number)


def catch_signals():
    """Turn the first of SIGNALS into a request to stop (see `check_signals`); a second one exits at once."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup ignores stays ignored
            signal.signal(number, _on_signal)


def signal_is_pending():
    """True once this process has received a signal; the others may not know."""
    return _signal_received is not None


def check_signals():
    """Raise Interrupted on every process once any process has received a signal. A collective."""
    if any_process(signal_is_pending()):
        raise Interrupted


def _first_to_say(message):
    """True on one process of those that stop with the same message."""
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store.add(f"said: {message}", 1) == 1
    except RuntimeError:  # its host is gone
        return True


def _is_lost_peer(error):
    """True if a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def dead_worker(error):
    """The UserError for a loader worker that the system has killed, or that could not do its work."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # the first may be a traceback's
    return UserError(f"a loader worker has died ({reason}); if memory or shared memory has run out, use fewer --workers or a "
                     "smaller --batch-size.")


def _kill_workers():
    """End what loader workers an error has left: they are deaf to the SIGTERM with which Python would, and wait, at exit."""
    if children := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for child in children:
            child.kill()


def run(main, *arguments):
    """Run a script's main function and exit.

    Exit codes: 0 done; 2 the user's mistake, said in one sentence; 128 + n after signal n; 1 when another process was
    lost, and for mistakes of ours, with a traceback.
    """
    code = 0
    try:
        main(*arguments)
    except (UserError, RuntimeError, OSError, MemoryError) as error:
        message, reason, code = str(error), "", 2
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in message:
            message = f"there is too little memory ({_first_line(error)}); lower --batch-size or --image-size."
        elif isinstance(error, RuntimeError) and "DataLoader worker" in message:  # torch raises it wherever it is
            message = str(dead_worker(error))
        elif isinstance(error, RuntimeError):
            if not _is_lost_peer(error):
                raise
            message, reason, code = "another process has stopped, or cannot be reached", f" ({_first_line(error)})", 1
        if _first_to_say(message):
            print(f"error: {message}{reason}", file=sys.stderr, flush=True)
        if world_size() > 1:
            sys.stdout.flush()
            _kill_workers()
            os._exit(code)  # the others may be anywhere: leaving the group in good order could wait for ever
    except Interrupted as stop:
        print_main(str(stop) or "Stopped, as a signal asked.")
        code = 128 + (_signal_received or signal.SIGTERM)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        _kill_workers()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
