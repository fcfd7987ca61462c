"""ODC against pixels, other methods and labels: one table for each set of images.

    pip install -r tests/requirements.txt
    python -m tests.benchmarks.learning.data glyphs data/glyphs
    python -m tests.benchmarks.learning.data photographs data/photographs
    python -m tests.benchmarks.learning --output learning

All rows of a table are of the same images, network, first weights, augmentation, precision, batch
size and number of crops. ODC's rows are runs of train.py with the settings that follow from the
data and K = 100. The other rows follow them: one that sees an image in several crops draws fewer.

Networks see images enlarged twice, where clusters of two halves of the images agree better then,
else each image and five parts of it, as train.py chooses in the end. It needs no labels.

kNN: by the 20 nearest training images; the features are the average of the last map. Of the random
    network it is with the batch norm statistics of the training images.
probe: a linear classifier of the same features.
NMI, purity, Hungarian accuracy: K clusters of the training images against their classes. The
    clusters of ODC and of alternating clusters are those of labels.npy, the others come from
    k-means of unit features. Most of K clusters have no class of their own where there are fewer
    classes; so the Hungarian accuracy is low there for every method.
K = classes: as many clusters as classes, of the training and held-out images: the best of ten
    k-means of unit features less their mean. Spectral: SpectralClustering of 1,000 such centroids.
minutes: of the training alone, by the clock, and the sum over all processors.
Numbers are the mean and the standard deviation over the seeds. Finished rows are lines of
OUTPUT/rows.jsonl, and are not made again. Several benchmarks may run at once with one --output.
"""

import argparse
import json
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from odc import settings
from odc.clusters import stabilities
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.datasets import open_dataset
from odc.data.loader import evaluation_batches
from odc.evaluation.weights import load_backbone
from odc.kmeans import kmeans
from tests.benchmarks.learning import methods, scores
from tests.benchmarks.timing import machine

ROOT = Path(__file__).resolve().parents[3]
DATA = ("fashion", "glyphs", "photographs")
METHODS = {  # in the order of the table
    "pixels": "pixels", "pca": "PCA of pixels", "random": "random network", "odc": "ODC",
    "alternating": "alternating", "simsiam": "SimSiam", "byol": "BYOL", "vicreg": "VICReg",
    "emp-ssl": "EMP-SSL, 8 patches", "swav": "SwAV with small crops", "labels": "labels (ceiling)",
}
# More arguments of train.py; "alternating" moves labels only when it clusters all images again.
ODC_WAYS = {"odc": [], "alternating": ["--memory-momentum", "0"]}
PEERS = {
    "simsiam": methods.SimSiam, "byol": methods.BYOL, "vicreg": methods.VICReg,
    "emp-ssl": methods.EMPSSL, "swav": methods.SwAV, "labels": methods.Labels}
COLUMNS = {  # name: (heading, factor, digits)
    "knn": ("kNN, %", 100, 1), "probe": ("probe, %", 100, 1), "nmi": ("NMI", 1, 3),
    "purity": ("purity, %", 100, 1), "hungarian": ("Hungarian, %", 100, 1),
    "few_accuracy": ("K = classes: accuracy, %", 100, 1), "few_nmi": ("NMI", 1, 3),
    "few_ari": ("ARI", 1, 3), "half_accuracy": ("half whitened: accuracy, %", 100, 1),
    "half_nmi": ("NMI", 1, 3), "half_ari": ("ARI", 1, 3),
    "spectral_accuracy": ("spectral: accuracy, %", 100, 1),
    "spectral_nmi": ("NMI", 1, 3), "spectral_ari": ("ARI", 1, 3),
    "minutes": ("minutes", 1, 1), "processor_minutes": ("of processors", 1, 1),
}


class Rows:
    """The finished rows of a folder, a line of JSON each."""

    def __init__(self, path):
        self.path = path

    def read(self, **wanted):
        """All rows with these values, in the order in which they were finished."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = map(json.loads, lines)
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def add(self, row):
        with open(self.path, "a") as file:  # in one write: other processes may add rows, too
            file.write(json.dumps(row) + "\n")


def clock(device):
    """Seconds on the clock, and of this process's and its children's processors."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usage)])


def run_train(folder, arguments):
    """Run train.py as a reader would, from the beginning. Returns its backbone and clusters [N]."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    said = folder.with_suffix(".txt")
    with open(said, "w") as messages:
        done = subprocess.run([sys.executable, ROOT / "train.py", *arguments, "--output", folder],
                              stdout=messages, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{said.read_text()[-2000:]}\ntrain.py failed.")
    backbone, _ = load_backbone(str(folder / "backbone.pth"))
    return backbone, torch.from_numpy(np.load(folder / "labels.npy"))


def make_row(method, key, output, arguments, device):
    """One method with one seed: its scores."""
    args = settings.parse(arguments)
    train, val = (open_dataset(args.data, split) for split in ("train", "val"))
    settings.resolve_defaults(args, train, None, device)  # as train.py does
    row, clusters, began = {}, None, clock(device)
    if method in ODC_WAYS:
        folder = output / "-".join(map(str, key.values())) / method
        backbone, clusters = run_train(folder, [*arguments, *ODC_WAYS[method]])
    elif method in PEERS:
        backbone = methods.train(PEERS[method], args, train, device)
    else:
        backbone = methods.first_network(args)
    if method in PEERS or clusters is not None:
        row = dict(zip(("minutes", "processor_minutes"), ((clock(device) - began) / 60).tolist()))

    if method in ("pixels", "pca"):
        to_cluster = [scores.pixels(images, args.image_size).to(device) for images in (train, val)]
        features = [rows - to_cluster[0].mean(0) for rows in to_cluster]  # clusters need the mean
        if method == "pca":
            to_cluster = features = scores.principal_components(
                *features, backbone.out_channels[-1], args.seed)
    else:
        if method == "random":
            transform = evaluation_transform(args.image_size)
            update_bn((normalise(batch.images) for batch in evaluation_batches(
                train, slice(None), transform, 256)), backbone)
        sizes = [args.image_size, 2 * args.image_size]
        found = stabilities(backbone.to(device), train, sizes, args.num_clusters)
        size = max(zip(found, sizes), key=lambda pair: pair[0])[1]
        to_cluster = features = [scores.network_features(
            backbone, images, size, size == args.image_size, device) for images in (train, val)]
    if clusters is None:
        clusters, _ = kmeans(F.normalize(to_cluster[0]), args.num_clusters, seed=args.seed)
    return row | scores.all_scores(*features, train, val, clusters.cpu(), to_cluster) | dict(
        num_train=len(train), num_val=len(val), num_classes=len(train.classes),
        num_clusters=args.num_clusters, arch=args.arch, image_size=args.image_size,
        batch_size=args.batch_size, crops=args.epochs * len(train), machine=machine(device))


def print_table(data, rows):
    """The table of a data set: mean and standard deviation over the seeds."""
    first = rows[0]
    print(f"\n{data}: {first['num_train']:,} training and {first['num_val']:,} held-out images of "
          f"{first['num_classes']} classes, K = {first['num_clusters']}; {first['arch']}, "
          f"{first['image_size']} pixels, batches of {first['batch_size']}, {first['crops']:,} "
          f"crops; {first['machine']}\n")
    print("| | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " | seeds |")
    print("|---|" + "---|" * (len(COLUMNS) + 1))
    for method, title in METHODS.items():
        if own := [row for row in rows if row["method"] == method]:
            print(line(title, own), flush=True)


def line(title, rows):
    cells = []
    for name, (_, factor, digits) in COLUMNS.items():
        values = [factor * row[name] for row in rows if name in row]
        cell = f"{statistics.mean(values):.{digits}f}" if values else ""
        if len(values) > 1 and max(values) > min(values):
            cell += f" ± {statistics.stdev(values):.{digits}f}"
        cells.append(cell)
    return f"| {title} | " + " | ".join(cells) + f" | {len(rows)} |"


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the rows and of train.py's runs")
    add("--data", choices=[*DATA, "all"], default="all")
    add("--fashion", metavar="FOLDER", default="/usr/share/datasets/fashion-mnist")
    add("--glyphs", metavar="FOLDER", default="data/glyphs")
    add("--photographs", metavar="FOLDER", default="data/photographs")
    add("--only", metavar="METHOD", nargs="+", choices=list(METHODS), default=list(METHODS),
        help=" ".join(METHODS))
    add("--seeds", metavar="N", type=int, default=3, help="seeds 0 to N - 1")
    add("--images", metavar="N", type=int, help="crops of a training, as many as ODC draws "
        "images, rounded to whole epochs (default: as train.py decides)")
    add("--train-arguments", metavar="'...'", default="", help="more arguments for train.py")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.output / "rows.jsonl")
    given = dict(images=args.images, arguments=args.train_arguments)
    for name in DATA if args.data == "all" else [args.data]:
        if any(row["given"] != given for row in rows.read(data=name)):
            sys.exit(f"--output {args.output} has rows of {name} with other --images or "
                     "--train-arguments; choose another folder.")
        folder = getattr(args, name)
        for seed in range(args.seeds):
            for method in args.only:
                key = dict(data=name, seed=seed)
                if rows.read(**key, method=method):
                    continue
                more = ["--data", str(folder), "--num-clusters", "100", "--workers", "0"]
                if args.images:
                    N = len(open_dataset(str(folder), "train"))
                    more += ["--epochs", str(max(1, round(args.images / N)))]
                more += [*shlex.split(args.train_arguments), "--seed", str(seed), "--device",
                         args.device]
                row = make_row(method, key, args.output, more, torch.device(args.device))
                rows.add(dict(key, method=method, given=given, **row))
                print(f"{name}, seed {seed}: {line(METHODS[method], [row])}", flush=True)
        if found := rows.read(data=name):
            print_table(name, found)


if __name__ == "__main__":
    # As Ctrl-C does: subprocess.run then stops train.py, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; the same command goes on."))
    main()
