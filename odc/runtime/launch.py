"""How a program ends: signals that ask it to stop, mistakes as one sentence, and exit codes."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from odc import distributed
from odc.errors import Interrupted, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # these ask to stop
_in_program = False  # True within run_program
_signal_received = None  # the number of the first signal
_signal_time = 0.0


def _on_signal(number, frame):
    global _signal_received, _signal_time
    if _signal_received is None:
        _signal_received, _signal_time = number, time.monotonic()
    elif time.monotonic() - _signal_time > 1:
        os._exit(128 + number)  # within a second it is the first one again, from torchrun


def catch_signals():
    """In `run_program`, let the first of SIGNALS ask for a stop, and a second one stop at once."""
    for number in SIGNALS if _in_program else ():
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: keep it so
            signal.signal(number, _on_signal)


def signal_is_pending():
    """True once this process has received a signal. The others may not know of it."""
    return _signal_received is not None


def check_signals():
    """Raise Interrupted on every process if any has received a signal. A collective."""
    if distributed.any_process(signal_is_pending()):
        raise Interrupted("Stopped, as a signal asked.")


def is_dead_worker(error):
    """True if torch raised this as a loader worker is gone, or found no room in shared memory."""
    return isinstance(error, (EOFError, ConnectionError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in (
            "DataLoader worker", "Pin memory thread", "</torch_", "shared memory")))


def dead_worker(error):
    """The UserError for a loader worker that was killed or could not do its work."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return UserError(f"a loader worker has died ({reason}); if memory or /dev/shm is full, use "
                     "fewer --workers, or give a container more with --shm-size.")


def _explain(error):
    """(sentence, exit code) of an error; it is raised again if it is a mistake of ours."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return f"there is too little memory ({text.splitlines()[0]}); lower --batch-size.", 2
    if is_dead_worker(error):
        return dead_worker(error), 2
    if not isinstance(error, RuntimeError):
        return text, 2
    if isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text:
        return f"another process has stopped, or cannot be reached ({text.splitlines()[0]})", 1
    raise error


def _kill_workers():
    """Kill the loader workers that are left. They block SIGTERM, so Python would wait for them."""
    if children := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for child in children:
            child.kill()


class _LastingStream:
    """A stream that may fail: the terminal is gone, or nobody reads the pipe. log.jsonl has all."""

    def __init__(self, stream):
        self.stream = getattr(stream, "stream", stream)  # never one around another
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # paths need not be UTF-8

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def run_program(main, *arguments):
    """Call the main function of a program and end the process.

    Exit codes: 0 done; 2 a user's mistake; 128 + n after signal n; 1 a lost process or our mistake.
    """
    global _in_program, _signal_received
    code, _in_program, _signal_received = 0, True, None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed (`2>&-`): take its number,
        pass  # before a file of ours gets it
    os.close(number)
    sys.stdout, sys.stderr = (_LastingStream(stream or open(os.devnull, "w"))
                              for stream in (sys.stdout, sys.stderr))
    try:
        main(*arguments)
    except (UserError, RuntimeError, OSError, MemoryError) as error:
        sentence, code = _explain(error)
        # Every process raises a UserError alike. Of the others, this process alone may know.
        if distributed.is_main() or not isinstance(error, UserError):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        if distributed.world_size() > 1:
            # The others may be in any collective: leaving the group in good order could hang.
            sys.stdout.flush()
            _kill_workers()
            os._exit(code)
    except Interrupted as stop:
        distributed.print_main(stop)
        code = 128 + (_signal_received or signal.SIGTERM)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        _in_program = False
        _kill_workers()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
