"""Which device a process takes, and how processes leave. The collectives are tested where they are used."""

import subprocess
import sys

import pytest
import torch

from odc import distributed
from tests.processes import environment, free_port


@pytest.mark.parametrize("devices, local, world, answer", [
    (0, 1, 1, "cpu"), (0, 2, 2, "cpu"), (1, 1, 1, "cuda"), (1, 2, 2, "cpu"), (2, 2, 2, "cuda"), (8, 8, 16, "cuda"),
    (7, 8, 16, "cuda")])  # the last one is refused then: one machine lacks a device
def test_auto_takes_cuda_if_each_process_has_a_device(monkeypatch, capsys, devices, local, world, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    for name, value in (("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    assert distributed._auto_device() == answer
    assert ("run on the CPU" in capsys.readouterr().out) == (answer == "cpu" and devices > 0)
    if devices and devices < local:
        with pytest.raises(distributed.UserError, match=f"{devices} CUDA device"):
            distributed._cuda_device("cuda")


LEAVE = """
import time, torch
from odc import distributed
torch.distributed.destroy_process_group = lambda: time.sleep(600)  # as NCCL's may while others wait in a collective
def main():
    distributed.init("cpu")
    if distributed.rank() == 1:
        raise distributed.UserError("process 1 cannot go on.")
    distributed.all_reduce(torch.ones(1))
distributed.run(main)
"""


def test_an_error_of_one_process_alone_leaves_none_waiting():
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = [subprocess.Popen([sys.executable, "-c", LEAVE], env=environment(**group, RANK=str(rank)),
                                 stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        assert [child.wait(60) for child in children] == [1, 2]
        assert "error: process 1 cannot go on." in children[1].stderr.read()
        said = children[0].stderr.read()
        assert "error: another process has stopped" in said and "Traceback" not in said
    finally:
        for child in children:
            child.kill()
