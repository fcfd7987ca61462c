"""A field of a checkpoint that another program has changed is one sentence, or a working run."""

import copy
import shutil

import pytest
import torch

import train
from odc.runtime import checkpoint
from tests.runs import SMALL, assert_one_sentence, run_main


def first(tensor):
    return tensor[:1]


def infinite(tensor):
    return tensor / 0


def lower(tensor):
    return tensor - 1


GONE = object()
CHANGES = [  # (path of keys, new values or functions of the old)
    *[(name, GONE, 3.5) for name in ("unreadable", "fingerprint", "backbone", "optimizer", "scaler",
                                     "memory", "labels_before", "log_position", "memory_parts")],
    *[(name, first, infinite, "text") for name in (
        "backbone/conv1.weight", "memory/labels", "memory/centroids", "labels_before",
        "optimizer/state/0/momentum_buffer")],
    ("memory/labels", lower),
    ("neck", dict), ("optimizer/state/0", dict), ("settings", dict, GONE),
    ("settings/lr", "fast", -1.0, torch.ones(2), GONE), ("settings/epochs", 2.5, True, GONE),
    ("settings/augmentation", 1, ["small"]), ("settings/arch", "vgg", 3), ("settings/new", 1),
    ("settings/num_clusters", 7, 10**9), ("settings/preset", torch.ones(2)),
    *[(f"progress/{name}", "one", -7, {}, torch.nan, GONE)
      for name in ("epoch", "step", "global_step", "interval", "measured")],
    ("progress/interval/loss", GONE), ("memory_parts", [("a-9.pth", 0, 150)], [(3, "0", None)])]


@pytest.mark.parametrize("where, values", [(where, values) for where, *values in CHANGES],
                         ids=[where for where, *_ in CHANGES])
def test_changed_fields(folder, finished, tmp_path, capsys, monkeypatch, where, values):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.pth"
    original = torch.load(path, weights_only=True)
    # A change that is accepted shows in the next steps, not in the files at the end.
    monkeypatch.setattr(train, "cluster_after_training", lambda *_: None)
    for value in values:
        state = copy.deepcopy(original)
        *keys, last = [int(key) if key.isdigit() else key for key in where.split("/")]
        part = state
        for key in keys:
            part = part[key]
        if value is GONE:
            del part[last]
        elif value is dict:
            part[last] = {}
        else:
            part[last] = value(part[last]) if callable(value) else value
        checkpoint.write_dict(path, state)
        code = run_main("--data", folder, "--output", path.parent, *SMALL, "--epochs", "3")
        if code:
            assert_one_sentence(capsys, code)
