"""The demonstration's settings, chosen without a label: those whose runs from different seeds find the same clusters.

    python -m tests.benchmarks.selection --output selection

The drawn images are the same for every seed, so that the labels of two runs can be compared with each other. The agreement
with the forms, which the runs log as well, is neither read nor shown. All candidates have the same number of epochs.
"""

import argparse
import concurrent.futures
import itertools
import os
import statistics
from pathlib import Path

import numpy as np
import torch

from odc.evaluation import metrics
from tests.benchmarks.ablation import train

CANDIDATES = {f"batch {batch}, {hue}": ["--batch-size", str(batch), *jitter]
              for batch in (64, 128)
              for hue, jitter in (("the recipe's jitter", []), ("no hue jitter", ["--jitter", "0.4", "0.4", "1.0", "0"]))}


def clusters_of(output, arguments):
    """The clusters [N] that a run finds."""
    train(output, ["--data", "shapes", *arguments])
    return torch.from_numpy(np.load(output / "labels.npy"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    jobs = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for seed in range(args.seeds):
            for name, arguments in CANDIDATES.items():
                output = args.output / f"{name}, seed {seed}".replace(" ", "-").replace(",", "").replace("'", "")
                jobs[name, seed] = pool.submit(clusters_of, output, [*arguments, "--seed", str(seed)])
    print("| settings | agreement of two seeds, NMI: mean | each pair |")
    print("|---|---|---|")
    for name in CANDIDATES:
        clusters = [jobs[name, seed].result() for seed in range(args.seeds)]
        pairs = [metrics.nmi(a, b) for a, b in itertools.combinations(clusters, 2)]
        print(f"| {name} | {statistics.mean(pairs):.3f} | " + " ".join(f"{value:.3f}" for value in pairs) + " |")


if __name__ == "__main__":
    main()
