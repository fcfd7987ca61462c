"""Run a test's function, or a script, in real processes, which share a gloo group, one thread each.

They are forked from a server that has imported torch once, which takes seconds.
"""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "train"])


def _redirect(out, err):
    """Let what this process prints go to two files."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), *(open(n, "w", buffering=1) for n in (1, 2))


def _child(function, arguments, variables, path):
    """Run in a child: join the group, call the function, and leave its result and output."""
    _redirect(f"{path}.log", f"{path}.log")
    os.environ.update(variables)
    import torch
    from odc import distributed
    torch.set_num_threads(1)
    distributed.init("cpu")
    result = function(*arguments)
    Path(path).write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**extra):
    """The environment of a child process: this repository importable, one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def run_processes(function, world_size, *arguments, timeout=300):
    """Call function(*arguments) in world_size processes; the list of their results in rank order.

    function: defined at the top level of a test module. Arguments and results must be picklable.
    Raises AssertionError with every process's output if one fails.
    """
    codes, outputs, results = run_to_exit(function, world_size, *arguments, timeout=timeout)
    assert codes == [0] * world_size, "\n--- ".join(outputs)
    return results


def run_to_exit(function, world_size, *arguments, timeout=300, port=None, **extra):
    """As `run_processes` for a function that may end its process: exit codes, outputs, results."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(rank)) for rank in range(world_size)]
        group = dict(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(port or _free_port()), **extra)
        children = [FORKS.Process(target=_child, args=(
            function, arguments, {**group, "RANK": path.name, "LOCAL_RANK": path.name}, str(path)))
            for path in paths]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout)
            child.kill()
            child.join()
        return ([child.exitcode for child in children],
                [Path(f"{path}.log").read_text() for path in paths],
                [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths])


def command(script, *arguments, processes=1, restarts=0):
    """The command line of a script at the top level, with torchrun for more than one process."""
    start = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", restarts,
             "--nproc_per_node", processes]
    return list(map(str, [sys.executable, *(start if processes > 1 else []), ROOT / script,
                          *arguments]))


def _script(script, arguments, variables, out, err):
    """Run in a child: a script at the top level, as a command would."""
    _redirect(out, err)
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class ForkedScript(FORKS.Process):
    """A script in a process of its own that need not import torch, with Popen's methods."""

    def __init__(self, script, *arguments, out=os.devnull, err=os.devnull, **variables):
        super().__init__(target=_script, args=(script, [*map(str, arguments)], variables, out, err))
        self.start()

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            raise TimeoutError(f"no end in {timeout} s")
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


def fork_ranks(script, *arguments, processes):
    """The processes of a group that run a script, a ForkedScript each, without torchrun."""
    group = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return [ForkedScript(script, *arguments, **group, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(processes)]


def run_script(script, *arguments, processes=1, timeout=300, **extra):
    """Run a script to its end; a CompletedProcess with text output."""
    if processes > 1:
        return subprocess.run(command(script, *arguments, processes=processes), text=True,
                              env=environment(**extra), capture_output=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = ForkedScript(script, *arguments, out=out, err=err, **extra).wait(timeout)
        return subprocess.CompletedProcess([script, *arguments], code, out.read_text(),
                                           err.read_text())
