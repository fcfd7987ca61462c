"""A memory step against its bare product, and with splits.

    python -m tests.benchmarks.memory            ImageNet: N = 1,281,167, K = 10,000, B = 512
    python -m tests.benchmarks.memory --splits   a step in which 20 clusters must be refilled
"""

import torch
import torch.nn.functional as F

from odc.memory import ODCMemory
from tests.benchmarks.timing import interleave, make_parser, table

N, K, d, B = 1_281_167, 10_000, 256, 512


def make_memory(device):
    memory = ODCMemory(N, d, K, device=device)
    memory.initialize(memory.features.uniform_(), torch.randint(K, (N,)))
    return memory


class Steps:
    """One call is one step of the memory as train.py does it."""

    def __init__(self, memory):
        self.memory, self.number, self.splits = memory, 0, True
        self.z = torch.rand(8, B, d).to(memory.labels.device)  # drawing them must not be timed

    def __call__(self):
        self.number += 1
        self.memory.update_samples(torch.randint(N, (B,)), self.z[self.number % 8])
        if self.number % 10 == 0:
            self.memory.update_centroids()
        if self.splits:
            self.memory.split_small_clusters()
        self.memory.loss_weights()


def imagenet(device):
    memory = make_memory(device)
    rows = F.normalize(torch.rand(B, d)).to(device)
    times = interleave({
        "memory step": Steps(memory),
        "bare product": lambda: rows @ memory.centroids.T,
        "bare product and argmax": lambda: (rows @ memory.centroids.T).argmax(dim=1),
    }, rounds=4, calls=20)
    table(f"N = {N:,}, K = {K:,}, d = {d}, B = {B}", times, "memory step", device=device)


def splits(device):
    memory = make_memory(device)
    step = Steps(memory)
    for _ in range(20):
        step()

    def shrink():
        """Leave 20 clusters with 10 images each; not timed."""
        labels = memory.labels.clone()
        for c in torch.randperm(K)[:20].tolist():
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
    parser.add_argument("--splits", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    (splits if args.splits else imagenet)(args.device)
