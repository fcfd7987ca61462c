"""A field of a checkpoint that another program has changed is one sentence, or a working run."""

import copy
import shutil

import pytest
import torch

from odc.runtime import checkpoint
from tests.runs import SMALL, assert_one_sentence, run_main


def changes():
    """(path of keys, new value, or the function of the old that makes it; None: without the key)."""
    for name in ("settings", "unreadable", "fingerprint", "backbone", "neck", "head", "optimizer",
                 "memory", "labels_before", "progress", "log_position", "memory_parts"):
        yield (name,), None
        yield (name,), 3.5
    for name in ("backbone.conv1.weight", "memory.labels", "memory.centroids", "labels_before",
                 "optimizer.state.0.momentum_buffer"):
        path = tuple(int(key) if key == "0" else key for key in name.split(".", name.count(".")))
        path = ("backbone", "conv1.weight") if name.startswith("backbone") else path
        yield path, lambda tensor: tensor[:1]
        yield path, lambda tensor: tensor / torch.tensor(0.0) - torch.inf
        yield path, "text"
    yield ("memory", "labels"), lambda labels: labels - 1
    yield ("memory", "labels"), lambda labels: labels + 10**6
    yield ("neck",), lambda neck: {k: torch.full_like(v, torch.nan) for k, v in neck.items()}
    for name, values in (("lr", ("fast", -1.0, torch.ones(2))), ("epochs", (None, 2.5, True)),
                         ("jitter", (1, [0.4])), ("arch", ("vgg", 3)), ("num_clusters", (7, 10**9)),
                         ("new", (1,)), ("preset", (torch.ones(2),))):
        for value in values:
            yield ("settings", name), value
    for name in ("epoch", "step", "global_step", "interval", "measured"):
        for value in ("one", -7, {}, torch.nan):
            yield ("progress", name), value
    yield ("progress", "interval", "loss"), None
    yield ("memory_parts",), lambda parts: [("a-9.pth", 0, 150)]
    yield ("memory_parts",), lambda parts: [(3, "0", None)]


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of a finished run, and its checkpoint."""
    output = tmp_path_factory.mktemp("mutated") / "out"
    shutil.copytree(finished, output)
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    return output, state


@pytest.mark.parametrize("number", range(len(list(changes()))))
def test_a_changed_field(folder, finished, run, capsys, number):
    output, state = run
    *path, last = [*list(changes())[number][0]]
    value = list(changes())[number][1]
    state = copy.deepcopy(state)
    part = state
    for key in path:
        part = part[key]
    if value is None:
        part.pop(last)
    else:
        part[last] = value(part[last]) if callable(value) else value
    shutil.rmtree(output)
    shutil.copytree(finished, output)
    checkpoint.write_dict(output / "checkpoint.pth", state)
    code = run_main("--data", folder, "--output", output, *SMALL, "--epochs", "2")
    if code:
        assert_one_sentence(capsys, code)
