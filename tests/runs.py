"""Runs of train.py in tests: how they are started, stopped and compared."""

import gc
import json
import signal
import subprocess
import time

import pytest
import torch

import train
from odc.runtime import checkpoint, launch
from tests.processes import ForkedScript, command, environment

SMALL = ["--arch", "narrow", "--image-size", "32", "--num-clusters", "8", "--min-cluster-size", "5",
         "--batch-size", "16", "--workers", "0", "--lr", "0.05", "--device", "cpu",
         "--augmentation", "demo", "--preset", "recipe"]


def run_main(*arguments):
    """train.main in this process: exit code."""
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    try:
        with pytest.raises(SystemExit) as stopped:
            launch.run_program(train.main, list(map(str, arguments)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = stopped.value.code
    del stopped
    gc.collect()  # an exception keeps the function's lock on its folder
    return code


def start(folder, output, *extra, processes=1, restarts=0):
    """Start train.py for two epochs, with a checkpoint every three steps."""
    arguments = ["--data", folder, "--output", output, *SMALL, "--epochs", "2",
                 "--checkpoint-interval", "3", *extra]
    if processes == 1:
        return ForkedScript("train.py", *arguments)
    line = command("train.py", *arguments, processes=processes, restarts=restarts)
    return subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def wait_for_step(child, output, step):
    """Wait until the checkpoint holds the step."""
    path, deadline = output / "checkpoint.pth", time.monotonic() + 300
    while child.poll() is None:
        assert time.monotonic() < deadline, "the run stands still"
        if path.exists() and checkpoint.read_dict(path)["progress"]["global_step"] >= step:
            return
        time.sleep(0.005)


def log_of(output):
    """The log's records without what depends on the clock."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    return records


def state_of(output):
    """The checkpoint in an output folder, with the features [N, d] of all images."""
    path = output / "checkpoint.pth"
    state = checkpoint.read_dict(path)
    rows = slice(0, len(state["memory"]["labels"]))
    state["memory"]["features"] = checkpoint.read_rows(path, state, rows)
    del state["memory_parts"]  # the files' names, new at every save
    return state


def assert_equal_state(a, b, where="checkpoint"):
    """Two checkpoints are the same to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_equal_state(a[name], b[name], f"{where}.{name}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


def assert_same_run(a, b):
    """Two runs left the same weights, memories, log, clusters and features, bit for bit."""
    states = [state_of(folder) for folder in (a, b)]
    for state in states:
        del state["settings"]["output"], state["settings"]["checkpoint_interval"]
    assert_equal_state(*states)
    assert log_of(a) == log_of(b)
    for name in ("clusters.csv", "features.npy", "centroids.npy"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def assert_one_sentence(capsys, code, *words):
    """The program ended with exit code 2 and one sentence that holds the words."""
    error = capsys.readouterr().err.strip().splitlines()
    sentences = [line for line in error if line.startswith("error: ")]
    assert code == 2 and len(sentences) == 1 and "Traceback" not in "\n".join(error), error
    assert all(str(word) in sentences[0] for word in words), sentences[0]
