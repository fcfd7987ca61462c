"""All figures of a GPU by one command, in at most 25 minutes: a table, and JSON with --json.

    python -m tests.benchmarks.gpu                      everything
    python -m tests.benchmarks.gpu --only step kmeans   some rows
    python -m tests.benchmarks.gpu --small              every row at a tiny size: does it run?

Each row stands beside its bound or a peer from the same run. Medians, minima beside them.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import train
from odc.data.augmentation import Augmentation, augment_batch, evaluation_transform
from odc.data.datasets import open_dataset
from odc.data.loader import training_batches
from odc.evaluation import svm, voc
from odc.evaluation.knn import knn_predict
from odc.features import extract
from odc.kmeans import kmeans
from odc.memory import ODCMemory
from odc.model import ResNet
from odc.kmeans import nearest_centroids
from tests.benchmarks.input import write_photographs
from tests.benchmarks.step import MadeUp, measure, odc_epoch
from tests.benchmarks.svm import made_up_features
from tests.benchmarks.timing import interleave, machine

FASHION = "/usr/share/datasets/fashion-mnist"


class Table:
    """The rows: printed as they come, kept for the JSON file."""

    def __init__(self, device):
        self.device, self.rows = device, []

    def add(self, group, name, seconds, **more):
        """seconds: one for each round, or None."""
        row = dict(group=group, name=name, **more)
        if seconds:
            row |= dict(median_s=statistics.median(seconds), minimum_s=min(seconds))
        if self.device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.rows.append(row)
        print("| " + " | ".join(f"{key} {value:.4g}" if isinstance(value, float) else
                                f"{key} {value}" if key not in ("group", "name") else str(value)
                                for key, value in row.items()) + " |", flush=True)

    def times(self, group, times, **more):
        """Rows from {name: seconds of each round}; more: {name: further columns}."""
        for name, seconds in times.items():
            self.add(group, name, seconds, **more.get(name, {}))


def step(table, small):
    """A whole step of train.train_epoch against a plain supervised step, resnet50 at 224."""
    arch, size, N, K = ("narrow", 32, 500, 10) if small else ("resnet50", 224, 1_281_167, 10_000)
    steps, rounds = (1, 1) if small else (6, 4)
    runs = [(B, amp, False) for amp in ("bf16", "fp16", "off") for B in (64, 256, 512)]
    for B, amp, compiled in [*runs, (256, "bf16", True)]:
        B = B // 16 if small else B
        name = f"B = {B}, {amp}" + (", compiled" if compiled else "")
        with big_enough(table, "step", name):
            made_up = MadeUp(table.device, arch, size, B, N, K, steps, amp)
            add_rates(table, "step", measure(made_up, rounds, compiled), name, B)

    with big_enough(table, "step", "20 splits"):
        B, count = (16, 2) if small else (256, 20)
        made_up = MadeUp(table.device, arch, size, B, N, K, steps=1, amp="bf16")
        memory = made_up.state.memory
        features, labels = memory.features.clone(), few_images_in_last(count, N, K)
        name = f"ODC step with {count} splits"
        times = interleave({name: lambda: odc_epoch(made_up, made_up.state.network)}, rounds,
                           before={name: lambda: memory.initialize(features, labels)})
        add_rates(table, "step", times, f"B = {B}, bf16", B)


def few_images_in_last(count, num_images, num_clusters):
    """Labels [N] with which `count` clusters are small: they have 5 images, the others many."""
    labels = torch.arange(num_images) % (num_clusters - count)
    labels[: 5 * count] = torch.arange(num_clusters - count, num_clusters).repeat(5)
    return labels


def add_rates(table, group, times, name, batch):
    """Rows with images/s from {way: seconds of each round}."""
    for way, seconds in times.items():
        table.add(group, f"{way}, {name}", seconds,
                  images_per_second=batch / statistics.median(seconds))


@contextlib.contextmanager
def big_enough(table, group, name):
    """Where the card's memory is too small for rows, say so and go on with the next."""
    try:
        yield
    except torch.OutOfMemoryError:
        table.add(group, name, None, note="does not fit into the card's memory")


def memory_step(table, small):
    """A step of the memory, with and without 20 splits, against the bare product."""
    N, K, d, B, count = (1000, 20, 64, 64, 2) if small else (1_281_167, 10_000, 256, 512, 20)
    device = table.device
    memory, features = ODCMemory(N, d, K, device=device), torch.rand(N, d, device=device)
    z = torch.rand(B, d, device=device)
    labels = few_images_in_last(count, N, K)

    def one():
        memory.update_samples(torch.randint(N, (B,)), z)
        memory.split_small_clusters()
        memory.loss_weights()

    def splits():
        assert memory.split_small_clusters() == count

    name = f"{count} splits"
    times = interleave({name: splits}, rounds=3, before={
        name: lambda: memory.initialize(features, labels)})
    times |= interleave({
        "step": one, "update of the centroids": memory.update_centroids,
        "bare product and argmax": lambda: (z @ memory.centroids.T).argmax(dim=1),
    }, rounds=5, calls=2 if small else 10)
    table.times("memory", times)


def k_means(table, small):
    """k-means, 20 iterations, against its products alone and a plain Lloyd in torch."""
    N, K, d, iterations = (4000, 40, 64, 3) if small else (1_281_167, 10_000, 256, 20)
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(max(10, K // 10), d, generator=generator).to(table.device)
    features = torch.empty(N, d, device=table.device)
    for rows in features.split(65536):
        which = torch.randint(len(modes), (len(rows),), generator=generator).to(table.device)
        rows.copy_(F.normalize((modes[which] + torch.randn_like(rows)).relu_()))
    initial, results = features[torch.randperm(N)[:K].to(table.device)].clone(), {}

    def ours():
        results["ours"] = kmeans(features, K, iterations, initial_centroids=initial)[1]

    def lloyd():
        centroids = initial.clone()
        for _ in range(iterations):
            labels = torch.cat([torch.cdist(rows, centroids).argmin(1)
                                for rows in features.split(16384)])
            sizes = labels.bincount(minlength=K).clamp(min=1)
            sums = torch.zeros_like(centroids).index_add_(0, labels, features)
            centroids = sums / sizes[:, None]
        results["plain Lloyd in torch, float32"] = centroids

    def products():
        half, centroids = features.bfloat16(), initial.bfloat16()
        for _ in range(iterations):
            for rows in half.split(16384):
                (rows @ centroids.T).amax(dim=1)

    times = interleave({"ours": ours, "plain Lloyd in torch, float32": lloyd,
                        "bare bfloat16 products": products}, rounds=2, warm_up=0)
    objectives = {}
    for name, centroids in results.items():
        labels = nearest_centroids(features, centroids)
        objectives[name] = dict(objective=sum(
            float((rows - centroids[own]).double().square().sum())
            for rows, own in zip(features.split(65536), labels.split(65536))))
    table.times("k-means", times, **objectives)


def nearest_neighbours(table, small):
    """kNN of all ImageNet val images among all train images, against the bare products."""
    queries, bank, d = (500, 4000, 64) if small else (50_000, 1_281_167, 2048)
    device = table.device
    queries, bank = (F.normalize(torch.rand(n, d, device=device)) for n in (queries, bank))
    labels = torch.arange(len(bank)) % 10

    def products():
        for rows in bank.split(65536):
            for some in queries.split(8192):
                torch.mm(some, rows.T)

    times = interleave({
        "ours, k = 10, 20, 100, 200": lambda: knn_predict(queries, bank, labels, 10),
        "bare float32 products": products}, rounds=2)
    table.times("kNN", times)


def support_vectors(table, small):
    """The full and the low-shot table of one feature map of VOC07."""
    sizes = (200, 100, 64) if small else (5011, 4952, 8192)
    rows, targets, test, test_targets = made_up_features(*sizes)
    if small:
        targets, test_targets = targets[:, :2], test_targets[:, :2]
    shots = (1,) if small else voc.SHOTS
    samples = voc.draw_low_shot_targets(targets, 0, shots)
    rows, test = rows.to(table.device), test.to(table.device)
    times = interleave({
        "full table": lambda: voc.full_svm(rows, targets, test, test_targets),
        "low-shot table": lambda: voc.low_shot(rows, samples, test, test_targets),
        "Gram matrix": lambda: svm.gram_matrix(rows)}, rounds=1, warm_up=0 if small else 1)
    table.times("SVM", times)


def input_pipeline(table, small):
    """From JPEGs in workers to finished batches on the device; features of a frozen resnet50."""
    device, size, count = table.device, 64 if small else 224, 64 if small else 2048
    arch, B, workers = ("narrow", 16, 1) if small else ("resnet50", 256, 8)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, count)
        dataset = open_dataset(folder)
        pinned = device.type == "cuda"

        def batches():
            for batch in training_batches(dataset, Augmentation(), size, B, 0, 0, workers=workers,
                                          pin_memory=pinned):
                augment_batch(batch.images.to(device, non_blocking=True), batch.draws)

        backbone = ResNet(arch, size <= 64).to(device, memory_format=torch.channels_last).eval()

        def features():
            with torch.autocast(device.type, dtype=torch.bfloat16):
                extract(lambda images: backbone(images)[-1].float().mean((2, 3)), dataset,
                        evaluation_transform(size), backbone.out_channels[-1], device, B, workers)

        functions = {f"training batches, {workers} workers": batches,
                     f"features, bf16, {workers} workers": features}
        with contextlib.suppress(ImportError, RuntimeError):  # only where torchvision has nvJPEG
            from torchvision.io import decode_jpeg

            files = [torch.frombuffer(bytearray(Path(folder, dataset.name_of(i)).read_bytes()),
                                      dtype=torch.uint8) for i in range(min(count, 256))]
            if pinned:
                decode_jpeg(files[:2], device=device)
                functions["decode_jpeg on the GPU"] = lambda: decode_jpeg(files, device=device)
        times = interleave(functions, rounds=1 if small else 3)
        counts = {name: len(files) if "decode" in name else count for name in times}
        table.times("input", times, **{
            name: dict(images_per_second=counts[name] / statistics.median(seconds))
            for name, seconds in times.items()})


def learning(table, small):
    """ODC on all of Fashion-MNIST for ten minutes: kNN and NMI before and after."""
    for arch in ("narrow",) if small else ("resnet18", "resnet50"):
        _, rate, _ = learn(table.device, arch, 1, small)
        seconds = (256 if small else 60_000) / rate  # of an epoch
        epochs = 2 if small else max(2, min(40, int(270 / seconds)))
        measured, rate, minutes = learn(table.device, arch, epochs, small)
        for when, record in (("before", measured[0]), ("after", measured[-1])):
            table.add("learning", f"{arch}, {epochs} epochs: {when}", None,
                      knn=record["knn_accuracy"], nmi=record["nmi"], purity=record["purity"],
                      images_per_second=rate, minutes=minutes)


def learn(device, arch, epochs, small):
    """Run train.py: (the log's records with a kNN accuracy, images/s, minutes)."""
    with tempfile.TemporaryDirectory() as output:
        data, clusters, batch = (write_squares(output), 4, 64) if small else (FASHION, 100, 128)
        arguments = [
            "--data", data, "--output", Path(output, "run"), "--arch", arch, "--image-size", 32,
            "--epochs", epochs, "--knn-interval", epochs, "--crop-scale", 0.5, "--num-clusters",
            clusters, "--batch-size", batch, "--lr-steps", "--log-interval", 1 if small else 50,
            "--workers", 1 if small else 4, "--amp", "bf16", "--device", device.type]
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(list(map(str, arguments)))
        minutes = (time.monotonic() - began) / 60
        records = [json.loads(line) for line in Path(output, "run", "log.jsonl").open()]
    rates = [record["images_per_second"] for record in records if "loss" in record]
    return ([record for record in records if "knn_accuracy" in record],
            statistics.median(rates), minutes)


def write_squares(folder, count=256):
    """A folder of images in two classes, small enough for a trial of `learning`."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        path = Path(folder, "images", "train", "light" if i % 2 else "dark", f"{i:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(128, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray((pixels + 127 * (i % 2)).numpy()).save(path)
    return Path(folder, "images")


GROUPS = dict(step=step, memory=memory_step, kmeans=k_means, knn=nearest_neighbours,
              svm=support_vectors, input=input_pipeline, learning=learning)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing measured")
    table = Table(torch.device(args.device))
    print(f"{machine(table.device)}, torch {torch.__version__}", flush=True)
    torch.manual_seed(0)
    for name in args.only:
        if table.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with big_enough(table, name, "the rest"):
            GROUPS[name](table, args.small)
        if args.json:
            content = dict(machine=machine(table.device), torch=torch.__version__, rows=table.rows)
            Path(args.json).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
