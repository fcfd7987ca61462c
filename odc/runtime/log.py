"""What a run says while it runs: one JSON object a line in log.jsonl, and a progress bar or plain lines."""

import json
import os
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

from odc import distributed
from odc.errors import UserError


class RunLog:
    """log.jsonl on the main process; on the others every call does nothing.

    position: the length in bytes that the log had at the checkpoint from which the run goes on. What was written
    after it, by steps that will be run again, is cut off, so that no step is lost or doubled.
    error: the UserError to raise, where all processes can, if a line could not be written; else None.
    tensorboard: write the same numbers to a folder beside the log, too; first_step: of this run, for that folder.
    """

    def __init__(self, path, position=0, tensorboard=False, first_step=0):
        self.file = self.events = self.error = None
        if distributed.is_main():
            self.file = open(path, "r+b" if os.path.exists(path) else "w+b")
            # A log that is shorter than that was moved away or cut: go on behind its last whole line.
            lines = self.file.read(position)
            self.file.truncate(position if len(lines) == position else lines.rfind(b"\n") + 1)
            self.file.seek(0, os.SEEK_END)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and perhaps not installed

                self.events = SummaryWriter(Path(path).parent / "tensorboard", purge_step=first_step)

    def write(self, **record):
        if self.file:
            try:
                self.file.write((json.dumps(record) + "\n").encode())
                self.file.flush()
            except OSError as error:
                self.error = UserError(f"{self.file.name}: could not be written ({error.strerror}); make room, and start "
                                       "the same command again.")
        if self.events:
            for name, value in record.items():
                if name not in ("epoch", "step"):
                    self.events.add_scalar(name, value, record["step"])
            self.events.flush()

    def sync(self):
        """Put on disk what the checkpoint that is saved next counts on."""
        os.fsync(self.file.fileno())

    @property
    def position(self):
        return self.file.tell() if self.file else 0


def progress_bar(total, initial, description):
    """A tqdm bar on the main process's terminal; elsewhere it stays silent, and `plain_line` speaks instead."""
    return tqdm(total=total, initial=initial, desc=description, unit="step", leave=False, dynamic_ncols=True,
                disable=not (distributed.is_main() and sys.stderr.isatty()))


def plain_line(text):
    """Print a line on the main process if no progress bar shows the same."""
    if not sys.stderr.isatty():
        distributed.print_main(text)


def print_settings(settings):
    """The run's settings, once, as `name value` pairs wrapped to 80 columns."""
    pairs = [f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
             for name, value in settings.items() if value is not None]
    distributed.print_main(textwrap.fill("settings: " + ", ".join(pairs), 80, subsequent_indent="  "))
