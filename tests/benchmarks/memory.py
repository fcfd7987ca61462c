"""A memory step against its bare product, against N, and with splits.

    python -m tests.benchmarks.memory            ImageNet: N = 1,281,167, K = 10,000, B = 512
    python -m tests.benchmarks.memory --scale    N = 128 thousand against 12.8 million
    python -m tests.benchmarks.memory --splits   a step in which 20 clusters must be refilled
"""

import torch
import torch.nn.functional as F

from odc.memory import ODCMemory
from tests.benchmarks.timing import interleave, make_parser, table

N, K, d, B = 1_281_167, 10_000, 256, 512


def make_memory(num_images, device):
    generator = torch.Generator().manual_seed(0)
    memory = ODCMemory(num_images, d, K, device=device)
    for part in memory.features.split(65536):
        part.copy_(torch.rand(part.shape, generator=generator))
    labels = torch.randint(K, (num_images,), generator=generator)
    memory.initialize(memory.features, labels)
    return memory


def batches(num_images, device="cpu", seed=1):
    """Endless batches like the memory's own features a little later."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.rand(8 * B, d, generator=generator).to(device)  # drawing them must not be timed
    while True:
        for z in pool.split(B):
            yield torch.randint(num_images, (B,), generator=generator), z


class Steps:
    """One call is one step of the memory as train.py does it."""

    def __init__(self, memory, splits=True):
        self.memory, self.number, self.splits = memory, 0, splits
        self.batches = batches(len(memory.labels), memory.labels.device)

    def __call__(self):
        indices, z = next(self.batches)
        self.number += 1
        self.memory.update_samples(indices, z)
        if self.number % 10 == 0:
            self.memory.update_centroids()
        if self.splits:
            self.memory.split_small_clusters()
        self.memory.loss_weights()


def imagenet(device):
    memory = make_memory(N, device)
    rows = F.normalize(torch.rand(B, d)).to(device)
    times = interleave({
        "memory step": Steps(memory),
        "bare product": lambda: rows @ memory.centroids.T,
        "bare product and argmax": lambda: (rows @ memory.centroids.T).argmax(dim=1),
    }, rounds=4, calls=20)
    table(f"N = {N:,}, K = {K:,}, d = {d}, B = {B}", times, "memory step", device=device)


def scale(device):
    steps = {f"N = {n:,}": Steps(make_memory(n, device), splits=False)
             for n in (128_000, 12_800_000)}
    times = interleave(steps, rounds=8, calls=20)
    table(f"K = {K:,}, d = {d}, B = {B}, no splits", times, f"N = {12_800_000:,}", device=device)


def splits(device):
    memory = make_memory(N, device)
    step = Steps(memory)
    for _ in range(20):
        step()
    generator = torch.Generator().manual_seed(2)

    def shrink():
        """Leave 20 clusters with 10 images each; not timed."""
        labels = memory.labels.clone()
        for c in torch.randperm(K, generator=generator)[:20].tolist():
            labels[(labels == c).nonzero()[10:, 0]] = (c + 1) % K
        memory.initialize(memory.features, labels)

    def refill():
        step.splits = False
        step()
        step.splits = True
        assert memory.split_small_clusters() >= 20

    times = interleave({"with 20 splits": refill, "without": step}, rounds=8,
                       before={"with 20 splits": shrink})
    table(f"N = {N:,}, K = {K:,}, d = {d}, B = {B}", times, "with 20 splits", device=device)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--splits", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    (scale if args.scale else splits if args.splits else imagenet)(args.device)
