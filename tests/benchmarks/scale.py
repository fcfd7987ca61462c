"""How far the method scales: what one process of W holds and does, for millions of images.

    python -m tests.benchmarks.scale    all sizes, each in a process of its own

A process is rank 0 of W. The others do not exist: a collective returns its part, so
the figures are of computing and memory, without the network. Features are random.
"""

import multiprocessing
import resource
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.images import file_names
from odc.kmeans import nearest_centroids
from odc.memory import ODCMemory
from odc.runtime import checkpoint
from tests.benchmarks.timing import interleave, make_parser

SIZES = [
    (1_281_167, 8, 10_000, 512),
    (14_197_122, 64, 20_000, 4096),
    (100_000_000, 1024, 100_000, 8192),
]  # N, W, K, global batch


def resident():
    """Peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(function, rounds=1):
    """Median seconds of a call."""
    return statistics.median(interleave({"": function}, rounds, warm_up=0)[""])


def measure(N, W, K, batch, device, d=256):
    """Print the figures of this process, as rank 0 of W."""
    distributed.world_size = lambda: W
    distributed.all_reduce = distributed.broadcast = lambda tensor: tensor
    distributed.any_process = bool
    distributed.all_gather_objects = lambda value: [value]
    row = {"N": f"{N:,}", "W": W, "K": f"{K:,}", "global batch": batch}
    started = resident()
    memory = ODCMemory(N, d, K, device=device)
    features = F.normalize(torch.rand(len(memory.features), d, device=device))
    memory.initialize(features, torch.arange(N) % K)
    del features
    row["memories, GiB a process"] = f"{resident() - started:.2f}"
    z = torch.rand(batch, d, device=device)
    row["step of the memories, ms"] = f"{1000 * clock(lambda: step(memory, N, z), 12):.0f}"
    row["update of the centroids, ms"] = f"{1000 * clock(memory.update_centroids, 3):.0f}"
    some = memory.features[:8192]
    search = clock(lambda: nearest_centroids(some, memory.centroids)) / len(some)
    row["k-means, 20 iterations, min"] = f"{21 * search * len(memory.features) / 60:.1f}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "memory").mkdir()
        for r in range(1, W):
            Path(folder, "memory", f"a-{r}.pth").touch()  # what the others would write
        save = clock(lambda: checkpoint.write_run(
            Path(folder, "checkpoint.pth"), memory.state_dict(), memory.features, N))
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        row["save: s, GiB of process 0"] = f"{save:.1f}, {size / 2**30:.2f}"
    count, names = min(N, 2_000_000), []
    paths = (f"n{i // 1300:08}/n{i // 1300:08}_{i}.JPEG" for i in range(count))
    seconds = clock(lambda: names.append(file_names(paths))) * N / count
    size = names[0].nbytes * N / count
    row["names of images: s, GiB a process"] = f"{seconds:.0f}, {size / 2**30:.2f}"
    print("\n".join(f"{name}: {value}" for name, value in row.items()), flush=True)


def step(memory, num_images, z):
    memory.update_samples(torch.randint(num_images, (len(z),)), z)
    memory.split_small_clusters()
    memory.loss_weights()


if __name__ == "__main__":
    args = make_parser(__doc__).parse_args()
    for size in SIZES:
        spawn = multiprocessing.get_context("spawn")
        one = spawn.Process(target=measure, args=(*size, args.device))
        one.start()
        one.join()
        print(flush=True)
