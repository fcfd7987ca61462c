"""Which device a process takes, collectives, and how processes leave."""

import time
import warnings

import pytest
import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import launch
from tests.processes import run_processes, run_to_exit


@pytest.mark.parametrize("devices, local, world, answer", [
    (0, 1, 1, "cpu"), (0, 2, 2, "cpu"), (1, 1, 1, "cuda"), (1, 2, 2, "cpu"), (2, 2, 2, "cuda"),
    (8, 8, 16, "cuda"), (7, 8, 16, "cpu")])  # the last is told by check_same_device
def test_auto_takes_cuda_if_each_process_has_a_device(
        monkeypatch, capsys, devices, local, world, answer):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    for name, value in (("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("RANK", "0")
    assert distributed.choose_device("auto").type == answer
    assert ("run on the CPU" in capsys.readouterr().out) == (answer == "cpu" and devices > 0)
    if devices and devices < local:
        with pytest.raises(UserError, match=f"{devices} CUDA device"):
            distributed.choose_device("cuda")


def test_a_local_rank_without_torchrun(monkeypatch, capsys):
    """One that is left over in an environment made process "1" silent, of the wrong device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("LOCAL_RANK", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert distributed.choose_device("auto") == torch.device("cuda", 0)
    with pytest.raises(SystemExit):
        launch.run_program(distributed.choose_device, "gpu")
    assert "error: --device gpu: choose" in capsys.readouterr().err


def test_processes_on_different_devices():
    store = torch.distributed.HashStore()
    store.set("device 1", "cuda")
    distributed.check_same_device(store, 0, 2, "cuda")
    for rank, own in ((0, "cuda"), (1, "cpu")):
        store.set("device 1", "cpu")
        with pytest.raises(UserError, match="Process 1 would run on cpu and others on cuda"):
            distributed.check_same_device(store, rank, 2, own)


def test_a_product_is_not_rounded_to_tf32(monkeypatch):
    """Though a container's environment may ask for it."""
    torch.set_float32_matmul_precision("high")
    distributed.init("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_of_a_group_in_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK expected, but not set: start with torchrun"):
        distributed.init("cpu")


def leave(error):
    """Process 1 has an error while process 0 waits for it. NCCL may not leave in good order."""
    def main():
        with distributed.raise_everywhere():
            if distributed.rank() == 1 and isinstance(error, UserError):
                raise error
        if distributed.rank() == 1:
            raise error
        distributed.all_reduce(torch.ones(1))

    torch.distributed.destroy_process_group = lambda: time.sleep(600)
    launch.run_program(main)


@pytest.mark.parametrize("error, exits, said", [
    (RuntimeError("a mistake of ours"), [1, 1], ["error: another process has stopped, or cannot",
                                                 "RuntimeError: a mistake of ours"]),
    (MemoryError(), [1, 2], ["error: another process has stopped, or cannot be reached (",
                             "error: there is too little memory (MemoryError)"]),
    (UserError("the disk is full."), [2, 2], ["error: the disk is full.", ""])])  # for both
def test_an_error_leaves_no_process_waiting(error, exits, said):
    codes, outputs, _ = run_to_exit(leave, 2, error)
    assert codes == exits
    for lines, words in zip(outputs, said):
        assert words in lines and lines.count("error: ") == words.startswith("error")
        assert ("Traceback" in lines) == words.startswith("RuntimeError")


def gather_and_share():
    """Gathered rows, one uneven, and the buffers of a network; a warning is an error."""
    rank = distributed.rank()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = distributed.all_gather_rows(torch.tensor([[rank, 1]]))
        uneven = distributed.all_gather_uneven_rows(torch.full((2 * rank,), rank))
        empty = distributed.all_gather_uneven_rows(torch.zeros(0, 3))
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean += rank + 5
        distributed.share_statistics(norm)
    return rows.tolist(), uneven.tolist(), empty.shape, norm.running_mean.tolist()


def test_gathered_rows_and_shared_statistics():
    expected = ([[0, 1], [1, 1], [2, 1]], [1, 1, 2, 2, 2, 2], (0, 3), [5, 5])
    assert run_processes(gather_and_share, 3) == [expected] * 3
