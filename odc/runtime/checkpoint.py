"""Files that are either whole or not there, and checkpoints made of them.

A run's checkpoint is a file and a folder `memory` beside it, into which every process writes its
rows of the features. The saves write a-*.pth and b-*.pth in turn, and the file that names them is
replaced last. So a kill at any moment leaves the old checkpoint or the new one.
"""

import contextlib
import fcntl
import os
import secrets
import zipfile
from pathlib import Path

import torch

from odc import distributed
from odc.errors import UserError
from odc.runtime import launch

PROGRAM = "odc train 6"  # who wrote a checkpoint of a run, and the version of what is in it
TOKEN = secrets.token_hex(8)  # in the names of this process's temporary files, which end with it


def write_atomically(path, write, in_place=False):
    """Call write(file) with a binary file, and move it to path then: all of it or nothing.

    in_place: without a temporary file; for a path to which nothing refers yet. A link at path is
    replaced, not followed. Raises UserError if it fails; a file that was there is then untouched.
    """
    path = Path(path)
    temporary = path if in_place else path.with_name(f"{path.name}.{TOKEN}.partial")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, (OSError, RuntimeError)) or launch.is_dead_worker(error):
            raise  # a dead worker is reported anywhere, by torch's signal handler
        # torch turns an OSError inside its writer into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"{path}: could not be written ({reason}); a file from before is kept. "
                        "Make room, and start the same command again.") from None


def write_dict(path, state, in_place=False):
    """Write a dict of tensors and plain values. Raises UserError if it cannot be written."""
    write_atomically(path, lambda file: torch.save(state, file), in_place)


@contextlib.contextmanager
def reading(path):
    """Turn whatever a damaged or foreign file makes the block raise into a UserError with path."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or launch.is_dead_worker(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}): if it is damaged or "
                        "another program's, restore a copy, or choose another --output.") from None


def load(path, zip_only=True):
    """torch.load of plain values and tensors on the CPU, memory-mapped if it can be.

    zip_only: refuse what torch wrote before 1.6. Raises what a damaged or foreign file makes it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a directory or a device")
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if zip_only and not is_zip:
        raise ValueError("it is no zip archive")
    if is_zip:
        with zipfile.ZipFile(path) as archive:  # torch does not check this
            if archive.testzip() or any(part.compress_type for part in archive.infolist()):
                raise ValueError("a checksum is wrong, or it is compressed, as TorchScript is")
    return torch.load(path, map_location="cpu", weights_only=True,
                      mmap=is_zip and str(path).isascii())  # torch maps no name that is not UTF-8


def read_dict(path):
    """What `write_dict` wrote. Raises UserError if it is missing, damaged, or code."""
    with reading(path):
        content = load(path)
        if not isinstance(content, dict):
            raise ValueError("it holds something else")
    return content


def open_run(output):
    """Make and lock the folder of a run: (its checkpoint or None, process 0's lock). A collective.

    Raises UserError, before anything is written, unless the folder is new, empty, or a run's.
    """
    path, lock = output / "checkpoint.pth", output / ".lock"
    with distributed.raise_everywhere():
        names = (lock.name, path.name, "memory", "log.jsonl", "tensorboard")
        for link in filter(Path.is_symlink, map(output.joinpath, names)):
            raise UserError(f"{link} is a link: remove it, or choose another --output.")
        output.mkdir(parents=True, exist_ok=True)
        text = lock.read_text(errors="replace") if lock.is_file() else ""
        program, _, token = text.strip().rpartition(" ")
        others = set(os.listdir(output)) - ({lock.name} if text == "" else set())
        if program == PROGRAM:  # a run has begun there: without a checkpoint yet, its log is empty
            others -= {lock.name, "memory", "unreadable.txt", "tensorboard"}
            others = [name for name in others if not name.endswith(f".{token}.partial")
                      and (name != "log.jsonl" or (output / name).stat().st_size)]
        if read_run(path) is None and others:
            raise UserError(f"--output {output} holds other files and no run: choose a new folder.")
    with distributed.raise_everywhere():
        lock = _lock(output) if distributed.is_main() else None
        return read_run(path), lock


def read_run(path):
    """The checkpoint of a run, or None if there is none yet. Raises UserError."""
    if not path.exists():
        return None
    saved = read_dict(path)
    if saved.get("program") != PROGRAM:
        raise UserError(f"{path} is not a checkpoint of this version of train.py; choose another "
                        "--output.")
    return saved


def _lock(output):
    """Lock a run's folder; `.lock` holds the token of the process that has it."""
    lock = open(output / ".lock", "a+", errors="replace")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
    except (BlockingIOError, PermissionError):
        raise UserError(f"--output {output}: another run is writing there; choose another, or "
                        "wait.") from None
    except OSError:  # a file system without locks
        pass
    lock.seek(0)
    program, _, token = lock.read().strip().rpartition(" ")
    for name in os.listdir(output):  # what a killed process had begun to write
        if program == PROGRAM and name.endswith(f".{token}.partial"):
            (output / name).unlink()
    lock.truncate(0)
    print(PROGRAM, TOKEN, file=lock, flush=True)
    return lock


def write_run(path, state, features, num_rows, before=()):
    """Write the checkpoint of a run: state by process 0, features [n, d] by all. A collective.

    num_rows: N, of all. before: the parts of the old memory, which are deleted. Returns the new
    ones, [(file name, first row, end)]. Raises UserError, and the old checkpoint then stays.
    """
    folder, turn = path.parent / "memory", "b" if before and before[0][0][0] == "a" else "a"
    shards = [distributed.shard(num_rows, r) for r in range(distributed.world_size())]
    parts = [(f"{turn}-{r}.pth", rows.start, rows.stop) for r, rows in enumerate(shards)]
    own = folder / parts[distributed.rank()][0]
    try:
        with distributed.raise_everywhere():
            folder.mkdir(exist_ok=True)
            write_dict(own, {"features": features}, in_place=True)
        with distributed.raise_everywhere():
            if not all((folder / part).exists() for part, *_ in parts):
                raise UserError(f"{folder} lacks what another process has written: --output must "
                                "be a folder that all machines share.")
            if distributed.is_main():
                write_dict(path, {**state, "memory_parts": parts})
    except UserError:
        own.unlink(missing_ok=True)
        raise
    for name, *_ in before if distributed.is_main() else ():
        with contextlib.suppress(OSError):
            (folder / Path(name).name).unlink()
    return parts


def read_rows(path, state, rows):
    """Features [n, d] of a slice of rows. Raises UserError if one is missing or not of length 1."""
    features = []
    with reading(path):
        for name, start, stop in state["memory_parts"]:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                with reading(part := path.parent / "memory" / Path(name).name):
                    content = read_dict(part)["features"]
                    lengths = content.norm(dim=1)
                    right = len(content) == stop - start and content.dtype == torch.float32
                    if not right or not ((lengths - 1).abs().lt(1e-3) | lengths.eq(0)).all():
                        raise ValueError("its rows are not those of the checkpoint")
                    features.append(content[first - start : last - start])
        if sum(map(len, features)) != rows.stop - rows.start:
            raise ValueError("rows of the memory are missing")
        return torch.cat(features) if features else torch.zeros(0, 1)


def check_same_settings(where, before, now):
    """Raise UserError for the first of the settings, {name: value}, that differs from before."""
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise UserError(f"{where} holds a run with {name} {before.get(name)}, not "
                            f"{now.get(name)}: use the same, or another --output.")
