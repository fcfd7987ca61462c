"""How a program ends: signals that ask it to stop, mistakes as one sentence, and exit codes."""

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

_signal_received = None  # the number of the first signal
_signal_time = 0.0


def _on_signal(number, frame):
    global _signal_received, _signal_time
    if _signal_received is None:
        _signal_received, _signal_time = number, time.monotonic()
    elif time.monotonic() - _signal_time > 1:
        # A second signal stops at once. Within a second it is the first one, sent by torchrun too.
        os._exit(128 + number)


def catch_signals():
    """Let the first of SIGNALS ask this program to stop, and a second one stop it at once."""
    for number in SIGNALS:
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
    """True if torch raised this because a loader worker, or its pinning thread, is gone."""
    return isinstance(error, RuntimeError) and (
        "DataLoader worker" in str(error) or "Pin memory thread" in str(error))


def dead_worker(error):
    """The UserError for a loader worker that was killed or could not do its work."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return UserError(f"a loader worker has died ({reason}); if memory or shared memory has run "
                     "out, use fewer --workers or a smaller --batch-size.")


def _explain(error):
    """(sentence, its technical cause, exit code) of an error, or None for a mistake of ours."""
    text, no_memory = str(error), (torch.OutOfMemoryError, MemoryError)
    first_line = (text.strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, no_memory) or "DefaultCPUAllocator" in text:
        return (f"there is too little memory ({first_line}); lower --batch-size or --image-size.",
                "", 2)
    if is_dead_worker(error):
        return str(dead_worker(error)), "", 2
    if not isinstance(error, RuntimeError):
        return text, "", 2
    if isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text:
        return "another process has stopped, or cannot be reached", f" ({first_line})", 1
    return None


def _kill_workers():
    """Kill the loader workers that are left. They block SIGTERM, so Python would wait for them."""
    if children := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for child in children:
            child.kill()


def run_program(main, *arguments):
    """Call the main function of a program and exit.

    Exit codes: 0 done; 2 a mistake of the user, printed as one sentence; 128 + n after signal n;
    1 if another process was lost, or, with a traceback, for a mistake of ours.
    """
    code = 0
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    try:
        main(*arguments)
    except (UserError, RuntimeError, OSError, MemoryError) as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        sentence, cause, code = explanation
        if distributed.is_first(f"said: {sentence}"):
            print(f"error: {sentence}{cause}", file=sys.stderr, flush=True)
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
        _kill_workers()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
