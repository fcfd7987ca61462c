"""Which device a process takes, and how processes leave. Other tests cover the collectives."""

import subprocess
import sys

import pytest
import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import launch
from tests.processes import environment, free_port


@pytest.mark.parametrize("devices, local, world, answer", [
    (0, 1, 1, "cpu"), (0, 2, 2, "cpu"), (1, 1, 1, "cuda"), (1, 2, 2, "cpu"), (2, 2, 2, "cuda"),
    (8, 8, 16, "cuda"), (7, 8, 16, None)])  # in the last, one of two machines lacks a device
def test_auto_takes_cuda_if_each_process_has_a_device(
        monkeypatch, capsys, devices, local, world, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    for name, value in (("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    if answer is None:
        with pytest.raises(UserError, match=f"{devices} CUDA device"):
            distributed.choose_device("auto")
        return
    assert distributed.choose_device("auto").type == answer
    assert ("run on the CPU" in capsys.readouterr().out) == (answer == "cpu" and devices > 0)
    if devices and devices < local:
        with pytest.raises(UserError, match=f"{devices} CUDA device"):
            distributed.choose_device("cuda")


def test_processes_on_different_devices():
    store = torch.distributed.HashStore()
    distributed.check_same_device(store, 0, "cuda")
    distributed.check_same_device(store, 1, "cuda")
    with pytest.raises(UserError, match="Process 2 would run on cpu and process 0 on cuda"):
        distributed.check_same_device(store, 2, "cpu")


def test_half_of_a_group_in_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    words = "not RANK and MASTER_ADDR and MASTER_PORT: start with torchrun"
    with pytest.raises(UserError, match=words):
        distributed.init("cpu")


def test_too_little_memory_on_the_device(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    with pytest.raises(SystemExit) as stopped:
        launch.run_program(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("lower --batch-size") == 1


LEAVE = """
import time, torch
from odc import distributed
from odc.errors import UserError
from odc.runtime import launch
# NCCL's may take so long while others wait in a collective.
torch.distributed.destroy_process_group = lambda: time.sleep(600)
def main():
    distributed.init("cpu")
    if distributed.rank() == 1:
        raise UserError("process 1 cannot go on.")
    distributed.all_reduce(torch.ones(1))
launch.run_program(main)
"""


def test_an_error_of_one_process_alone_leaves_none_waiting():
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = [subprocess.Popen([sys.executable, "-c", LEAVE], stderr=subprocess.PIPE, text=True,
                                 env=environment(**group, RANK=str(rank))) for rank in range(2)]
    try:
        assert [child.wait(60) for child in children] == [1, 2]
        assert "error: process 1 cannot go on." in children[1].stderr.read()
        said = children[0].stderr.read()
        assert "error: another process has stopped, or cannot be reached (" in said
        assert "Traceback" not in said
    finally:
        for child in children:
            child.kill()
