"""Run a test's function in W real processes that share a gloo group, one thread each."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_CHILD = """
import importlib, os, pickle, sys, torch
torch.set_num_threads(1)
from odc import distributed
with open(sys.argv[1], "rb") as file:
    module, name, arguments = pickle.load(file)
function = getattr(importlib.import_module(module), name)
distributed.init("cpu")
result = function(*arguments)
with open(sys.argv[1] + "." + os.environ["RANK"], "wb") as file:
    pickle.dump(result, file)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


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
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        port = str(free_port())
        children, logs = [], []
        for rank in range(world_size):
            group = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            logs.append(open(Path(folder) / f"log{rank}", "w+"))
            children.append(subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(call)], cwd=ROOT, env=environment(**group),
                stdout=logs[-1], stderr=subprocess.STDOUT))
        try:
            codes = [child.wait(timeout) for child in children]
        finally:
            for child in children:
                child.kill()
        for log in logs:
            log.seek(0)
        output = "\n".join(f"--- rank {rank}\n{log.read()}" for rank, log in enumerate(logs))
        for log in logs:
            log.close()
        assert codes == [0] * world_size, output
        return [pickle.loads(Path(f"{call}.{rank}").read_bytes()) for rank in range(world_size)]


def command(script, *arguments, processes=1):
    """The command line of a script at the top level, with torchrun for more than one process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(ROOT / script), *map(str, arguments)]


def run_script(script, *arguments, processes=1, timeout=300, **extra):
    """Run a script to its end; a CompletedProcess with text output."""
    return subprocess.run(command(script, *arguments, processes=processes), text=True,
                          env=environment(**extra), capture_output=True, timeout=timeout)
