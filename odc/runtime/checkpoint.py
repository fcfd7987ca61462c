"""Files that are either whole or not there, and checkpoints made of them.

A checkpoint of a run is a file with everything but the features memory, and a folder `memory`
beside it, into which every process writes its own rows of the features. The rows of a save get new
names. The file that names them is replaced last. So a kill at any moment leaves the old checkpoint
or the new one, and no process ever holds more than its own rows.

All files are torch.save's zip archives, whose checksums are verified before anything is used, and
which are read without running any code in them.
"""

import contextlib
import fcntl
import os
import secrets
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import launch

PROGRAM = "odc train 2"  # who wrote a checkpoint of a run, and the version of what is in it


def write_atomically(path, write):
    """Call write(file) with a binary file, and move it to path then: all of it or nothing.

    Raises UserError if that fails; a file that was there is then untouched.
    """
    path = Path(os.path.realpath(path))  # of a link, what it points to
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # make the new name durable, where a file system can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        if launch.is_dead_worker(error):  # a signal handler of torch raises it anywhere
            raise
        # torch turns an OSError inside its writer into a RuntimeError.
        cause = error if isinstance(error, OSError) else (error.__context__ or error)
        temporary.unlink(missing_ok=True)
        kept = "; the file from before is kept" if path.exists() else ""
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"{path}: could not be written ({reason}){kept}. Make room, or make the "
                        "folder writable, and start the same command again.") from None


def save(path, state):
    """Write a dict of tensors and plain values. Raises UserError if it cannot be written."""
    write_atomically(path, lambda file: torch.save(state, file))


def can_be_mapped(path):
    """False for a name that is not UTF-8, which torch cannot map into memory."""
    return os.fsencode(path).decode(errors="ignore") == os.fspath(path)


def load(path):
    """Read what `save` wrote. Tensors stay on disk, memory-mapped, until they are copied.

    Raises UserError for a file that is missing, truncated, damaged, or contains code.
    """
    remedy = "restore it from a copy, or move it away to start anew."
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise UserError(f"{path}: is damaged, a checksum does not match; {remedy}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {remedy}") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}). If it is truncated, "
                        f"damaged or another program's file, {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no checkpoint; {remedy}")
    return content


def open_run(output):
    """Make the folder of a run, a Path, and lock it against other runs.

    Returns its checkpoint, or None, and the lock, an open file, or None on processes other than 0.
    The lock ends when that is closed or the process ends, however it ends. Raises UserError.
    """
    lock = None
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise UserError(f"--output {output}: the folder is not writable; choose another.")
    if distributed.is_main():
        lock = open(output / ".lock", "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
        except (BlockingIOError, PermissionError):
            raise UserError(f"--output {output}: another run is writing there; choose another, or "
                            "wait for its end.") from None
        except OSError:  # a file system without locks
            pass
        for path in output.glob("*.partial"):  # of a program that was killed while it wrote
            path.unlink()
    path = output / "checkpoint.pth"
    saved = load(path) if path.exists() else None
    if saved is not None and saved.get("program") != PROGRAM:
        raise UserError(f"{path} is not a checkpoint of this version of train.py; choose another "
                        "--output.")
    return saved, lock


def save_run(path, state, features, num_rows):
    """Write the checkpoint of a run: state by process 0, features [n, d] by all. A collective.

    num_rows: N, of all processes together. Raises UserError if a process cannot write.
    """
    folder = path.parent / "memory"
    name = f"{int(distributed.broadcast(torch.tensor(secrets.randbits(62)))):016x}"
    shards = [distributed.shard(num_rows, r) for r in range(distributed.world_size())]
    with distributed.raise_everywhere():
        folder.mkdir(exist_ok=True)
        save(folder / f"{name}-{distributed.rank()}.pth", {"features": features})
    parts = [(f"{name}-{r}.pth", rows.start, rows.stop) for r, rows in enumerate(shards)]
    with distributed.raise_everywhere():
        if distributed.is_main():
            if missing := [part for part, *_ in parts if not (folder / part).exists()]:
                raise UserError(f"{folder} lacks {missing[0]}, which another process has written: "
                                "--output must be a folder that all machines share.")
            save(path, {**state, "memory_parts": parts})
            for file in folder.glob("*.pth*"):  # of earlier saves, and what a killed one has left
                if not file.name.startswith(name):
                    file.unlink()


def load_rows(path, state, rows):
    """Features [n, d] of some rows (a slice) from the checkpoint at path, which holds state."""
    features = []
    for name, start, stop in state["memory_parts"]:
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:
            part = load(Path(path).parent / "memory" / name)["features"]
            features.append(part[first - start : last - start])
    return torch.cat(features) if features else torch.zeros(0, 1)


def check_same_settings(where, before, now):
    """Raise UserError naming the first setting in which a run differs from its checkpoint.

    where: the path of the run. before, now: {name: value}.
    """
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise UserError(f"{where} holds a run with {name} {before.get(name)}, not "
                            f"{now.get(name)}: use the same, or another --output.")
