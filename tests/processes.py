"""Run a test's function in W real processes that share a gloo group, one thread each."""

import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Children are forked from a server that has imported torch once, which takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "train"])


def _child(function, arguments, group, path):
    """Run in a child: join the group, call the function, and leave its result and output."""
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", closefd=False, buffering=1)
    os.environ.update(group)
    import torch
    from odc import distributed
    torch.set_num_threads(1)
    distributed.init("cpu")
    result = function(*arguments)
    Path(path).write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def free_port():
    """A TCP port that nobody listens on at the moment."""
    import socket

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
    with tempfile.TemporaryDirectory() as folder:
        paths, children, port = [], [], str(free_port())
        for rank in range(world_size):
            group = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            paths.append(Path(folder, str(rank)))
            children.append(FORKS.Process(
                target=_child, args=(function, arguments, group, str(paths[-1]))))
            children[-1].start()
        for child in children:
            child.join(timeout)
            child.kill()
            child.join()
        output = "\n".join(f"--- rank {rank}\n{Path(f'{path}.log').read_text()}"
                           for rank, path in enumerate(paths))
        assert [child.exitcode for child in children] == [0] * world_size, output
        return [pickle.loads(path.read_bytes()) for path in paths]


def command(script, *arguments, processes=1):
    """The command line of a script at the top level, with torchrun for more than one process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(ROOT / script), *map(str, arguments)]


def _script(script, arguments, variables, out, err):
    """Run in a child: a script at the top level, as a command would."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False) for number, mode in ((os.open(os.devnull, 0), "r"),
                                                               (1, "w"), (2, "w")))
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class ForkedScript:
    """A script in a process of its own that need not import torch, with Popen's methods."""

    def __init__(self, script, *arguments, out=os.devnull, err=os.devnull, **variables):
        self.process = FORKS.Process(
            target=_script, args=(script, list(map(str, arguments)), variables, out, err))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"no end in {timeout} s")
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


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
