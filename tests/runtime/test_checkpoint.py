"""Checkpoint files: whole or not there, and nothing but data."""

import errno
import os
import pickle
import random
import zipfile

import pytest
import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import checkpoint
from tests.processes import run_processes
from tests.runs import assert_equal_state


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {"weights": torch.arange(5000.0).view(50, 100), "settings": {"steps": [1, 2]}}
    checkpoint.write_dict(path, state)
    return path, state


@pytest.mark.parametrize("name", [b"link", b"name\xe9.pth"])
def test_round_trip(saved, name):
    """A link is replaced, not followed. A name need not be UTF-8."""
    file, state = saved
    before = file.read_bytes()
    path = file.with_name(os.fsdecode(name))
    if name == b"link":
        path.symlink_to(file)
    checkpoint.write_dict(path, {"epoch": 3})
    assert checkpoint.read_dict(path) == torch.load(path, weights_only=True) == {"epoch": 3}
    assert file.read_bytes() == before
    assert_equal_state(checkpoint.read_dict(file), state)


def refused(path):
    with pytest.raises(UserError, match=f"{path}: cannot be read.*another program"):
        checkpoint.read_dict(path)


def test_truncated_anywhere(saved):
    path, _ = saved
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        refused(path)


def recompressed(path):
    """The same archive as another program packs it: torch would map the packed bytes as numbers."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("make", [
    recompressed, lambda path: (path.unlink(), os.mkfifo(path)),
    lambda path: (path.unlink(), path.mkdir()), lambda path: path.unlink(),
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PK\x03\x04 not for long")])
def test_another_programs_file(saved, make):
    path, _ = saved
    make(path)
    refused(path)


def test_a_flipped_byte_anywhere(saved):
    """It is refused, or lies in padding and dates, which are not read. The directory is the end."""
    path, state = saved
    whole, count = path.read_bytes(), 0
    for place in [*random.Random(1).sample(range(len(whole)), 200), *range(-300, 0)]:
        damaged = bytearray(whole)
        damaged[place] ^= 8
        path.write_bytes(damaged)
        try:
            assert_equal_state(checkpoint.read_dict(path), state)
        except UserError:
            count += 1
    assert count > 150


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(
    pickle.dumps(content))])
def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"weights": Evil()}, tmp_path / "checkpoint.pth")
    refused(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("error, raised", [
    (OSError(errno.EIO, os.strerror(errno.EIO)), UserError), (KeyboardInterrupt(), BaseException),
    (ValueError("a mistake of ours"), ValueError)])
def test_failing_saves_leave_the_file_from_before_and_no_other(saved, monkeypatch, error, raised):
    path, state = saved

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    before = path.read_bytes()
    for _ in range(4):
        with pytest.raises(raised):
            checkpoint.write_dict(path, state)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_two_programs_with_one_output(saved):
    """Each has temporary names of its own; the last one to end wins."""
    path, state = saved

    def write(file):
        assert run_processes(checkpoint.write_dict, 1, path, state) == [None]
        file.write(b"of the first")

    checkpoint.write_atomically(path, write)
    assert path.read_bytes() == b"of the first" and os.listdir(path.parent) == [path.name]


# --- folders of runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"program": "other"}])
def test_files_that_hold_no_checkpoint_of_a_run(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.open_run(tmp_path)


@pytest.mark.parametrize("name", ["film.mkv.partial", "memory/teacher.pth", "log.jsonl", ".lock"])
def test_a_folder_of_someone_else_is_refused_and_stays(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("of someone")
    with pytest.raises(UserError, match="holds other files"):
        checkpoint.open_run(tmp_path)
    assert file.read_text() == "of someone" and set(tmp_path.rglob("*")) <= {file, file.parent}


@pytest.mark.parametrize("name", [".lock", "memory", "checkpoint.pth", "log.jsonl", "tensorboard"])
def test_links_out_of_the_folder(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{tmp_path / name} is a link"):
        checkpoint.open_run(tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_what_a_killed_process_has_left(tmp_path, monkeypatch):
    """It goes, also before the first checkpoint, if nothing of someone else has come since."""
    checkpoint.open_run(tmp_path)[1].close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            checkpoint.write_dict(tmp_path / "backbone.pth", {"epoch": 3})
        os.waitpid(child, 0)
    for name in ("film.mkv.partial", "log.jsonl"):
        (tmp_path / name).write_text("of someone")
        with pytest.raises(UserError, match="holds other files"):
            checkpoint.open_run(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "log.jsonl").touch()
    assert len(os.listdir(tmp_path)) == 3
    assert checkpoint.open_run(tmp_path)[0] is None
    assert sorted(os.listdir(tmp_path)) == [".lock", "log.jsonl"]


# --- the rows of several processes ---------------------------------------------------------------

FEATURES = torch.nn.functional.normalize(torch.randn(10, 7, generator=torch.manual_seed(0)))


def save_my_rows(folder, epoch):
    path = folder / "checkpoint.pth"
    rows = distributed.shard(10)
    before = checkpoint.read_dict(path)["memory_parts"] if path.exists() else ()
    distributed.any_process(False)  # all have read it
    checkpoint.write_run(path, {"epoch": epoch}, FEATURES[rows].roll(epoch, 1), 10, before)
    return checkpoint.read_rows(path, checkpoint.read_dict(path), rows).tolist()


def load_all(folder):
    path = folder / "checkpoint.pth"
    state = checkpoint.read_dict(path)
    return checkpoint.read_rows(path, state, slice(0, 10)).roll(-state["epoch"], 1)


@pytest.mark.parametrize("W", [1, 3])
def test_rows_are_read_back_whoever_wrote_them(tmp_path, W):
    for epoch in (1, 2):
        parts = run_processes(save_my_rows, W, tmp_path, epoch)
        assert sum(parts, []) == FEATURES.roll(epoch, 1).tolist()
    assert torch.equal(load_all(tmp_path), FEATURES)
    path = tmp_path / "checkpoint.pth"
    some = checkpoint.read_rows(path, checkpoint.read_dict(path), slice(2, 9))
    assert torch.equal(some, FEATURES[2:9].roll(2, 1))
    assert len(os.listdir(tmp_path / "memory")) == W  # those of the save before are gone


@pytest.mark.parametrize("fails_at", ["rows", "state"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, fails_at):
    save_my_rows(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    original = torch.save

    def fail(content, file):
        original(content, file)
        if ("features" in content) == (fails_at == "rows"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        for _ in range(4):
            with pytest.raises(UserError, match="No space left"):
                save_my_rows(tmp_path, 2)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(load_all(tmp_path), FEATURES)


def test_only_names_of_the_old_checkpoint_are_deleted(tmp_path):
    (tmp_path / "memory").mkdir()
    others = tmp_path / "memory" / "teacher.pth", tmp_path / "thesis.pth"
    for file in others:
        file.write_text("of someone")
    for epoch in (1, 2, 3):
        save_my_rows(tmp_path, epoch)
    assert len(os.listdir(tmp_path / "memory")) == 2
    state = checkpoint.read_dict(tmp_path / "checkpoint.pth")
    state["memory_parts"] = [("../thesis.pth", 0, 10)]  # made up by someone
    checkpoint.write_dict(tmp_path / "checkpoint.pth", state)
    save_my_rows(tmp_path, 4)
    assert all(file.exists() for file in others)


def flip(part):
    whole = part.read_bytes()
    at = whole.index(FEATURES[:2].numpy().tobytes())
    part.write_bytes(whole[:at] + b"?" + whole[at + 1 :])


@pytest.mark.parametrize("change", [
    flip, os.unlink, FEATURES[:9], FEATURES.clone().index_fill_(0, torch.tensor([4]), torch.nan),
    2 * FEATURES, (255 * FEATURES).byte(), FEATURES[:, 0], "no tensor"])
def test_rows_are_not_believed(tmp_path, change):
    save_my_rows(tmp_path, 0)
    (part,) = (tmp_path / "memory").iterdir()
    if callable(change) and not torch.is_tensor(change):
        change(part)
    else:
        checkpoint.write_dict(part, {"features": change})
    with pytest.raises(UserError, match=f"{part}: cannot be read"):
        load_all(tmp_path)
