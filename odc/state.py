"""The state of a run: all that learns or remembers, and how it is saved and restored."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from odc import distributed
from odc.errors import UserError
from odc.memory import ODCMemory
from odc.model import ODC
from odc.runtime import checkpoint


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds this, the network, the optimizer and the memory."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that are done of the epoch after them
    global_step: int = 0  # steps of all epochs
    measured: int = -1  # the last `epoch` whose measures are in the log
    reclustered_at: int = 0  # `epoch` when all images were last clustered; 0: at the start
    offline_epochs: int = 0  # first epochs, in which the initial labels stay
    interval: dict = field(default_factory=lambda: dict(  # sums since the last line of the log
        steps=0, loss=0.0, change_ratio=0.0, splits=0))


@dataclass
class State:
    network: ODC
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict  # of the run
    path: Path  # of the checkpoint
    memory: ODCMemory | None = None
    progress: Progress = field(default_factory=Progress)
    labels_before: torch.Tensor | None = None  # [N], at the end of the epoch before, on the CPU
    memory_parts: list = field(default_factory=list)  # files of the last checkpoint, see write_run
    final_clusters: dict | None = None  # what odc.assign needs, at the run's end


def save(state, dataset, log):
    """Write the checkpoint: all of it, or the old one stays. A collective. Raises UserError."""
    network, backbone, progress = state.network, state.network.backbone, state.progress
    progress.interval["change_ratio"] = float(progress.interval["change_ratio"])  # off the device
    if state.labels_before is None:
        state.labels_before = state.memory.labels.cpu().clone()
    with distributed.raise_everywhere():
        if not all(torch.isfinite(value).all() for value in network.parameters()):
            raise UserError(f"The weights are not finite after step {progress.global_step}: start "
                            "again with a lower --lr or --amp off, in another --output.")
    state.memory_parts = checkpoint.write_run(state.path, dict(
        backbone=backbone.state_dict(), neck=network.neck.state_dict(),
        head=network.head.state_dict(), memory=state.memory.state_dict(),
        labels_before=state.labels_before, progress=asdict(progress),
        program=checkpoint.PROGRAM, settings=state.settings,
        unreadable=dataset.left_out, fingerprint=dataset.fingerprint, arch=backbone.arch,
        small_stem=backbone.small_stem, optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(), final_clusters=state.final_clusters,
        log_position=log.position()), state.memory.features, len(dataset), state.memory_parts)


def restore(state, saved):
    """Continue from the checkpoint `saved`. A collective. Raises UserError if it does not fit."""
    network, memory, optimizer = state.network, state.memory, state.optimizer
    with distributed.raise_everywhere(), checkpoint.reading(state.path):
        features = checkpoint.read_rows(state.path, saved, memory.rows)
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # off the mapped file
        for name in ("backbone", "neck", "head"):
            getattr(network, name).load_state_dict(saved[name])
        memory.load_state_dict(saved["memory"], features)
        state.scaler.load_state_dict(saved["scaler"])
        state.progress = Progress(**saved["progress"])
        state.labels_before, state.final_clusters = saved["labels_before"], saved["final_clusters"]
        state.memory_parts = saved["memory_parts"]
