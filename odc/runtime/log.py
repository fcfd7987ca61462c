"""What a program shows and keeps while it runs: progress bars, plain lines, and log.jsonl."""

import contextlib
import json
import os
import textwrap
import time
from pathlib import Path

from tqdm import tqdm

from odc import distributed
from odc.distributed import print_main
from odc.evaluation import metrics


def read_record(line):
    """The dict of a line of log.jsonl, or None if it is no record: cut off, or someone else's."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record


class Log:
    """log.jsonl, one JSON object a line. Process 0 writes it; the others hold no file.

    position: the number of records to keep. tensorboard: write the numbers for TensorBoard, too.
    """

    def __init__(self, path, position=0, tensorboard=False):
        self.path, self.file, self.events, self.records = path, None, None, 0
        if distributed.is_main():
            self.file = open(path, "a+b")
            self.file.seek(0)
            step, end = -1, 0
            while self.records < position and (line := self.file.readline()).endswith(b"\n"):
                end = self.file.tell()
                if record := read_record(line):
                    self.records, step = self.records + 1, record["step"]
            self.file.truncate(end)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # optional, slow to import
                self.events = SummaryWriter(Path(path).parent / "tensorboard", purge_step=step + 1)

    def write(self, **record):
        """Add a line. Raises UserError if that fails. A collective."""
        with distributed.raise_everywhere(self.path):
            if self.file:
                self.file.write((json.dumps(record) + "\n").encode())
                self.file.flush()
                self.records += 1
        try:
            for name in record.keys() - {"epoch", "step"} if self.events else ():
                self.events.add_scalar(name, record[name], record["step"])
        except Exception as error:  # another program's; log.jsonl has all
            print_main(f"warning: no more events for TensorBoard: {error}")
            self.events = None

    def write_steps(self, progress, steps, cluster_sizes, lr, rate):
        """Write and show the means since the last line. steps: of an epoch; rate: images/s."""
        sums = progress.interval
        shown = dict(loss=sums["loss"] / sums["steps"],
                     change_ratio=float(sums["change_ratio"]) / sums["steps"],
                     empty=int((cluster_sizes == 0).sum()), smallest=int(cluster_sizes.min()),
                     largest=int(cluster_sizes.max()), splits=sums["splits"], lr=lr,
                     images_per_second=round(rate, 1))
        self.write(epoch=progress.epoch + 1, step=progress.global_step, **shown)
        shown = {name: f"{value:.4g}" for name, value in shown.items()}
        print_main(f"epoch {progress.epoch + 1} step {progress.step}/{steps}: "
                   + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def write_measures(self, progress, labels, dataset, when, record):
        """Write and show a record, and how well labels [N] of clusters agree with the classes."""
        if dataset.labels is not None:
            measures, line = metrics.agreement(labels.cpu(), dataset.labels)
            record = {**measures, **record}
            print_main(f"{when}: {line}")
        if "knn_accuracy" in record:
            print_main(f"{when}: nearest-neighbour accuracy {record['knn_accuracy']:.1%}")
        if record:
            self.write(epoch=progress.epoch, step=progress.global_step, **record)

    def position(self):
        """The number of records, all of them on disk; 0 on processes other than 0."""
        if self.file:
            os.fsync(self.file.fileno())
        return self.records


def progress_bar(total, description, unit="step", initial=0):
    """A tqdm bar, on process 0 and a terminal only."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False,
                dynamic_ncols=True, disable=None if distributed.is_main() else True)


def print_end(epochs, seconds):
    """Print when a run will be done."""
    hours, minutes = divmod(round(seconds / 60), 60)
    print_main(f"About {f'{hours} h ' if hours else ''}{minutes} min for {epochs} epochs on this "
               f"machine, until {time.strftime('%H:%M', time.localtime(time.time() + seconds))}.")


def print_settings(settings):
    """Print `name value` pairs, wrapped to 80 columns."""
    pairs = [f"{name} {value}" for name, value in settings.items() if value is not None]
    print_main(textwrap.fill("settings: " + ", ".join(pairs), 80, subsequent_indent="  "))
