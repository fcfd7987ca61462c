"""What a program shows and keeps while it runs: progress bars, plain lines, and log.jsonl."""

import json
import os
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

from odc import distributed
from odc.errors import UserError


class Log:
    """log.jsonl, one JSON object a line. Process 0 writes it; the others hold no file.

    position: the length in bytes that the log had at the checkpoint from which the run continues.
    What lies behind it was written by steps that will run again, and is cut off.
    tensorboard: write the same numbers for TensorBoard; first_step: the first of this start.
    """

    def __init__(self, path, position=0, tensorboard=False, first_step=0):
        self.file = self.events = None
        if distributed.is_main():
            self.file = open(path, "r+b" if os.path.exists(path) else "w+b")
            # A log that is shorter was moved or cut: continue behind its last whole line.
            lines = self.file.read(position)
            self.file.truncate(position if len(lines) == position else lines.rfind(b"\n") + 1)
            self.file.seek(0, os.SEEK_END)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # optional, slow to import
                self.events = SummaryWriter(Path(path).parent / "tensorboard",
                                            purge_step=first_step)

    def write(self, **record):
        """Add a line. Raises UserError if the disk is full. A collective."""
        with distributed.raise_everywhere():
            if self.file:
                try:
                    self.file.write((json.dumps(record) + "\n").encode())
                    self.file.flush()
                except OSError as error:
                    raise UserError(f"{self.file.name}: could not be written ({error.strerror}); "
                                    "make room, and start the same command again.") from None
            if self.events:
                for name, value in record.items():
                    if name not in ("epoch", "step"):
                        self.events.add_scalar(name, value, record["step"])
                self.events.flush()

    def write_steps(self, progress, steps, cluster_sizes, lr, rate, bar):
        """Write and show the means since the last line, and the clusters as they are.

        progress: train.py's, with the sums since then. steps: of an epoch. rate: images a second.
        """
        sums = progress.interval
        shown = dict(loss=sums["loss"] / sums["steps"],
                     change_ratio=float(sums["change_ratio"]) / sums["steps"],
                     empty=int((cluster_sizes == 0).sum()), smallest=int(cluster_sizes.min()),
                     largest=int(cluster_sizes.max()), splits=sums["splits"], lr=lr,
                     images_per_second=round(rate, 1))
        self.write(epoch=progress.epoch + 1, step=progress.global_step, **shown)
        shown = {name: f"{value:.4g}" for name, value in shown.items()}
        bar.set_postfix(shown, refresh=False)
        plain_line(f"epoch {progress.epoch + 1} step {progress.step}/{steps}: "
                   + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def position(self):
        """The length in bytes, all of it on disk; 0 on processes other than 0."""
        if not self.file:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()


def progress_bar(total, description, unit="step", initial=0):
    """A tqdm bar, on process 0 and a terminal only."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False,
                dynamic_ncols=True, disable=None if distributed.is_main() else True)


def plain_line(text):
    """Print a line on process 0 if there is no terminal, where a progress bar shows the same."""
    if not sys.stderr.isatty():
        distributed.print_main(text)


def print_settings(settings):
    """Print the settings of a run as `name value` pairs, wrapped to 80 columns."""
    pairs = [f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
             for name, value in settings.items() if value is not None]
    distributed.print_main(textwrap.fill("settings: " + ", ".join(pairs), 80,
                                         subsequent_indent="  "))
