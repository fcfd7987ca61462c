"""Arguments, interleaved timing and one Markdown table, for all benchmarks."""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch


def make_parser(doc):
    """A parser with the first line of a benchmark's docstring and --device."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    return parser


def interleave(functions, rounds=5, calls=1, warm_up=1):
    """Time functions in turn, A B A B ..., so that a machine that slows down slows all of them.

    functions: {name: function}.
    Returns {name: [seconds a call, one for each round]}, the warm-up rounds left out.
    """
    times = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def table(title, times, ours, extra=None, device="cpu"):
    """Print median and minimum of each, and how often ours, a key of times, fits into it.

    extra: {name: text} for a last column.
    """
    reference = statistics.median(times[ours])
    print(f"\n{title}; {machine(device)}\n")
    print("| | median | minimum | ours / this |" + (" |" if extra else ""))
    print("|---|---|---|---|" + ("---|" if extra else ""))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = "" if name == ours else f"{reference / median:.3f}"
        print(f"| {name} | {_show(median)} | {_show(min(seconds))} | {ratio} |"
              + (f" {extra.get(name, '')} |" if extra else ""), flush=True)


def _show(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def machine(device="cpu"):
    """The card, or the processor and the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = [line for path in Path("/proc").glob("cpuinfo") for line in path.open()]
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
