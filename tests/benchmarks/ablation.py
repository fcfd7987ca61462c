"""Online clusters against alternating ones (re-clustering every epoch, as DeepCluster does), over several seeds.

    python -m tests.benchmarks.ablation --output ablation [--fashion FOLDER]

On the built-in shapes and, given the folder of its four files, on Fashion-MNIST's 10,000 test images. Both ways have the
same settings, those of the demonstration, which were chosen for the online ones. Prints a table and draws
tests/benchmarks/ablation.svg; runs that are in the output folder already are not run again. The backbones are compared by
their nearest-neighbour accuracy (k = 20): on the shapes' held-out part; on the 10,000 images of Fashion-MNIST that the training
saw without their labels, with the 60,000 others and their labels as the bank.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from odc.outputs import report as curves
from odc.evaluation import metrics

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"online": [], "alternating": ["--recluster-interval", "1"]}
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #6b6b73; }
.title { font-size: 15px; font-weight: 600; fill: #26262b; }
.grid { stroke: #e6e6ea; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
</style>"""


def settings(name, data):
    if name == "shapes":
        return ["--data", "shapes", "--batch-size", "64"]
    return ["--data", data, "--arch", "narrow", "--image-size", "32", "--crop-scale", "0.5", "--num-clusters", "100",
            "--batch-size", "64", "--epochs", "12", "--lr-steps", "10", "--workers", "0"]


def use_test_images_for_training(fashion, folder):
    """A folder in which Fashion-MNIST's 10,000 test images are the training set."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        link = folder / f"train-{kind}"
        if not link.is_symlink():
            link.symlink_to((Path(fashion) / f"t10k-{kind}").resolve())
    return folder


def train(output, arguments):
    """One run with one thread, unless it has been run."""
    if not (output / "clusters.png").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, ROOT / "train.py", *arguments, "--output", output, "--save-interval", "1",
                        "--knn-interval", "0"], check=True, stdout=subprocess.DEVNULL, env=environment)


def knn_accuracy(output, data):
    """Nearest-neighbour accuracy of a run's backbone in %, k = 20."""
    path = output / "knn.json"
    if not path.exists():
        subprocess.run([sys.executable, ROOT / "eval_knn.py", "--weights", output / "backbone.pth", "--data", data, "--k", "20",
                        "--image-size", "32", "--output", path], check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())["results"]["k=20"]["top1"]


def nmi_by_epoch(output):
    """[(epoch, NMI against the classes)], the last record of an epoch counts: alternating clusters are then new.

    Without the last epoch, after which they are not made anew.
    """
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return list({record["epoch"]: record["nmi"] for record in records if "nmi" in record}.items())[:-1]


def stability(output, way):
    """[(epoch, NMI of the labels after this epoch against those after the epoch before)], for the same epochs."""
    epochs = sorted(int(path.stem.split("_")[-1]) for path in output.glob("labels_epoch_*.npy"))
    labels = {epoch: torch.from_numpy(np.load(output / f"labels_epoch_{epoch}.npy")) for epoch in epochs}
    lag = way == "alternating"  # there the labels at an epoch's end are those of its start
    return [(epoch - lag, metrics.nmi(labels[epoch], labels[epoch - 1])) for epoch in epochs[1:]
            if 2 <= epoch - lag < epochs[-1]]


def mean(curves_of_seeds):
    """The mean curve of several [(x, y)] over the same x."""
    return [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*curves_of_seeds)]


def draw(results, path):
    """A row of two charts for each set of images: agreement with the classes, and with the epoch before."""
    parts = []
    for row, (name, ways) in enumerate(results.items()):
        until = max(epoch for way in ways.values() for epoch, _ in way["nmi"][0])
        for column, (key, title) in enumerate((("nmi", "NMI of clusters and classes"),
                                               ("stability", "NMI with an epoch before"))):
            svg = curves.chart(f"{name}: {title}, by epoch", {way: mean(ways[way][key]) for way in ways}, "{:.2f}", until=until)
            svg = svg.replace(">step</text>", "></text>").replace(
                "<svg ", f'<svg x="{column * 550}" y="{row * 280}" width="500" height="260" overflow="visible" ', 1)
            parts.append(svg)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 {280 * len(results)}">{STYLE}\n'
                    '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fashion", metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    sets, evaluated = {"shapes": settings("shapes", None)}, {"shapes": "shapes", "Fashion-MNIST": args.fashion}
    if args.fashion:
        data = use_test_images_for_training(args.fashion, args.output / "fashion-mnist-test")
        sets["Fashion-MNIST"] = settings("fashion", str(data))

    jobs = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, arguments in sets.items():
            for seed in range(args.seeds):
                for way, more in WAYS.items():
                    output = args.output / f"{name}-{way}-{seed}".lower()
                    jobs[name, way, seed] = output, pool.submit(train, output, [*arguments, *more, "--seed", str(seed)])
    for _, job in jobs.values():
        job.result()  # raises what the run raised
    results = {}
    print("| images | clusters | NMI after the initial k-means | NMI after the last but one epoch | "
          "NMI, labels of consecutive epochs | kNN, % |")
    print("|---|---|---|---|---|---|")
    for name in sets:
        results[name] = {}
        for way in WAYS:
            outputs = [jobs[name, way, seed][0] for seed in range(args.seeds)]
            nmi = [nmi_by_epoch(output) for output in outputs]
            stable = [stability(output, way) for output in outputs]
            results[name][way] = {"nmi": nmi, "stability": stable}
            cells = [" ".join(f"{value:.3f}" for value in values)
                     for values in ([c[0][1] for c in nmi], [c[-1][1] for c in nmi], [c[-1][1] for c in stable])]
            cells.append(" ".join(f"{knn_accuracy(output, evaluated[name]):.1f}" for output in outputs))
            print(f"| {name} | {way} | " + " | ".join(cells) + " |")
    draw(results, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
