"""Checkpoint files: whole or not there, and nothing but data."""

import errno
import os
import pickle
import random
import resource
import signal

import pytest
import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import checkpoint
from tests.processes import run_processes


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {"weights": torch.arange(5000.0).view(50, 100), "epoch": 3,
             "settings": {"lr": 0.06, "steps": [1, 2]}}
    checkpoint.save(path, state)
    return path, state


def is_equal(loaded, state):
    return (torch.equal(loaded["weights"], state["weights"]) and loaded["epoch"] == state["epoch"]
            and loaded["settings"] == state["settings"])


def test_round_trip_and_plain_torch_load(saved):
    path, state = saved
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert is_equal(loaded, state)


def test_truncated_anywhere(saved):
    path, _ = saved
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load(path)


def test_a_flipped_byte_anywhere(saved):
    """It is refused, or it lies in padding and dates, which are not read."""
    path, state = saved
    whole = path.read_bytes()
    refused = 0
    for place in [0, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 200)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert is_equal(checkpoint.load(path), state), place
        except UserError:
            refused += 1
    assert refused > 150


class Evil:
    def __reduce__(self):
        return os.system, ("echo this must not run > evil",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, {"weights": Evil()})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 but not for long"])
def test_another_programs_file(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
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


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"epoch": 3}])
def test_files_that_hold_no_checkpoint_of_a_run(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.open_run(tmp_path)
    assert (tmp_path / "checkpoint.pth").exists()


def test_other_files_beside_the_rows_stay(tmp_path):
    (tmp_path / "memory" / ".ipynb_checkpoints").mkdir(parents=True)
    for epoch in (1, 2):
        save_my_rows(tmp_path, epoch)
    assert len(list((tmp_path / "memory").iterdir())) == 2


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    checkpoint.save(tmp_path / "link", {"epoch": 3})
    assert (tmp_path / "link").is_symlink() and checkpoint.load(tmp_path / "file") == {"epoch": 3}


def test_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"name\xe9.pth")
    checkpoint.save(path, {"epoch": 3})
    assert checkpoint.load(path) == {"epoch": 3}


def test_leftovers_are_removed(tmp_path):
    (tmp_path / "checkpoint.pth.partial").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("stays")
    assert checkpoint.open_run(tmp_path)[0] is None
    assert sorted(os.listdir(tmp_path)) == [".lock", "mine.txt"]


# --- the rows of several processes ---------------------------------------------------------------

FEATURES = torch.arange(70.0).view(10, 7)


def save_my_rows(folder, epoch):
    path = folder / "checkpoint.pth"
    rows = distributed.shard(10)
    checkpoint.save_run(path, {"epoch": epoch}, FEATURES[rows] + epoch, 10)
    return checkpoint.load_rows(path, checkpoint.load(path), rows).tolist()


def load_all(folder):
    path = folder / "checkpoint.pth"
    state = checkpoint.load(path)
    return checkpoint.load_rows(path, state, slice(0, 10)) - state["epoch"]


@pytest.mark.parametrize("W", [1, 3])
def test_rows_are_read_back_whoever_wrote_them(tmp_path, W):
    for epoch in (1, 2):
        parts = run_processes(save_my_rows, W, tmp_path, epoch)
        assert sum(parts, []) == (FEATURES + epoch).tolist()
    assert torch.equal(load_all(tmp_path), FEATURES)
    path = tmp_path / "checkpoint.pth"
    some = checkpoint.load_rows(path, checkpoint.load(path), slice(2, 9))
    assert torch.equal(some, FEATURES[2:9] + 2)
    assert len(os.listdir(tmp_path / "memory")) == W  # those of the save before are gone


@pytest.mark.parametrize("fails_at", ["rows", "state"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, fails_at):
    save_my_rows(tmp_path, 1)
    save = checkpoint.save

    def fail(path, state):
        if (path.parent.name == "memory") == (fails_at == "rows"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, state)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(checkpoint, "save", fail)
        save_my_rows(tmp_path, 2)
    assert torch.equal(load_all(tmp_path), FEATURES)
    save_my_rows(tmp_path, 3)
    assert len(os.listdir(tmp_path / "memory")) == 1


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_or_missing_rows(tmp_path, damage):
    save_my_rows(tmp_path, 1)
    (part,) = (tmp_path / "memory").iterdir()
    whole = part.read_bytes()
    at = whole.index(FEATURES[:2].add(1).numpy().tobytes())
    part.unlink()
    if damage == "flip":
        part.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    with pytest.raises(UserError, match=f"{part}: is (damaged|missing)"):
        load_all(tmp_path)
