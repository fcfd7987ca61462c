"""Checkpoints that are either complete or not there: atomic writes, a checksum, and no code in the file."""

import contextlib
import os
import struct
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import torch

from odc.errors import UserError

_MAGIC = b"ODC\x01"  # the last 8 bytes of a checkpoint: this, then the CRC-32 of all bytes before


def save(path, state):
    """Write a dict of tensors and plain values so that a kill at any moment leaves the old file or the new one.

    The file is a plain torch.save archive with eight bytes of checksum behind it, which torch.load ignores.
    Raises UserError if it cannot be written; the file that was there is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            writer = _Checksummed(file)
            torch.save(state, writer)
            file.write(_MAGIC + struct.pack("<I", writer.crc))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # raised here by chance, from the handler of a signal
            raise
        # torch turns an OSError inside its writer into a RuntimeError.
        cause = error if isinstance(error, OSError) else (error.__context__ or error)
        temporary.unlink(missing_ok=True)
        kept = "the one from before is kept" if path.exists() else "there is none from before"
        raise UserError(f"{path}: could not be written ({getattr(cause, 'strerror', None) or cause}); {kept}. Make room, "
                        "or make the folder writable, and start the same command again.") from None
    _sync_folder(path.parent)


def load(path):
    """Read what `save` wrote; tensors stay on disk, memory-mapped, until they are copied.

    Raises UserError for a file that is truncated, damaged, of another program, or that contains code.
    """
    path = Path(path)
    size = path.stat().st_size
    crc = 0
    with open(path, "rb") as file:
        for start in range(0, max(size - 8, 0), 1 << 22):
            crc = zlib.crc32(file.read(min(1 << 22, size - 8 - start)), crc)
        trailer = file.read(8)
    if trailer[:4] != _MAGIC:
        raise UserError(f"{path}: is not a complete checkpoint of this program (truncated, or another program's file); "
                        "move it away to start anew.")
    if struct.unpack("<I", trailer[4:])[0] != crc:
        raise UserError(f"{path}: is damaged, its checksum does not match; restore it from a copy, or move it away to "
                        "start anew.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]}); move it away to start "
                        "anew.") from None


def write_atomically(path, write):
    """Call write(temporary_path), then move the result to path: readers see the old file or the whole new one.

    Raises UserError if that fails, leaving the file that was there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({getattr(error, 'strerror', None) or error}); make room, or make "
                        "the folder writable.") from None


def remove_temporary_files(folder):
    """Delete what a run that was killed while it wrote has left behind."""
    for pattern in ("*.pth.partial", "*.npy.partial", "clusters.*.partial", "report.html.partial"):
        for path in Path(folder).glob(pattern):
            path.unlink()


class _Checksummed:
    """A binary file to write to that keeps the CRC-32 of what went through."""

    def __init__(self, file):
        self.file, self.crc = file, 0

    def write(self, data):
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def _sync_folder(folder):
    """Make the rename itself durable, where the file system knows how to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
