"""Checkpoint files: whole or not there, and nothing but data."""

import errno
import os
import pickle
import random
import resource
import signal

import pytest
import torch

from odc.runtime import checkpoint
from odc.errors import UserError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {"weights": torch.arange(5000.0).view(50, 100), "epoch": 3, "settings": {"lr": 0.06, "steps": [1, 2]}}
    checkpoint.save(path, state)
    return path, state


def test_round_trip_and_plain_torch_load(saved):
    path, state = saved
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["weights"], state["weights"]) and loaded["settings"] == state["settings"]


def test_truncated_anywhere(saved):
    path, _ = saved
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete checkpoint|checksum"):
            checkpoint.load(path)


def test_a_flipped_byte_anywhere(saved):
    path, _ = saved
    whole = path.read_bytes()
    for place in [0, len(whole) - 1, len(whole) - 8, *random.Random(1).sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(UserError, match="not a complete checkpoint|checksum"):
            checkpoint.load(path)


class Evil:
    def __reduce__(self):
        return os.system, ("echo this must not run > evil",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, {"weights": Evil()})  # even with the right checksum
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "evil").exists()


def test_another_programs_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="another program"):
        checkpoint.load(path)


def test_a_full_disk_keeps_the_checkpoint_from_before(saved):
    """A limit on the size of files is the full disk of a test: the write fails in the middle."""
    path, state = saved
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(UserError, match="could not be written.*from before is kept") as error:
            checkpoint.save(path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_failing_sync_keeps_the_checkpoint_from_before(saved, monkeypatch):
    path, state = saved

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    before = path.read_bytes()
    with pytest.raises(UserError, match="Input/output error"):
        checkpoint.save(path, state)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_leftovers_are_removed(tmp_path):
    (tmp_path / "checkpoint.pth.partial").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("stays")
    checkpoint.remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
