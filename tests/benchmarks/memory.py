"""A memory step against its bare product.

    python -m tests.benchmarks.memory    ImageNet: N = 1,281,167, K = 10,000, B = 512
"""

import torch
import torch.nn.functional as F

from odc.memory import ODCMemory
from tests.benchmarks.timing import interleave, make_parser, table

N, K, d, B = 1_281_167, 10_000, 256, 512


class Steps:
    """One call is one step of the memory as train.py does it."""

    def __init__(self, memory):
        self.memory, self.number = memory, 0
        self.z = torch.rand(8, B, d).to(memory.labels.device)  # drawing them must not be timed

    def __call__(self):
        self.number += 1
        self.memory.update_samples(torch.randint(N, (B,)), self.z[self.number % 8])
        if self.number % 10 == 0:
            self.memory.update_centroids()
        self.memory.split_small_clusters()
        self.memory.loss_weights()


def main(device):
    torch.manual_seed(0)
    memory = ODCMemory(N, d, K, device=device)
    memory.initialize(memory.features.uniform_(), torch.randint(K, (N,)))
    rows = F.normalize(torch.rand(B, d)).to(device)
    times = interleave({
        "memory step": Steps(memory),
        "bare product": lambda: rows @ memory.centroids.T,
        "bare product and argmax": lambda: (rows @ memory.centroids.T).argmax(dim=1),
    }, rounds=4, calls=20)
    table(f"N = {N:,}, K = {K:,}, d = {d}, B = {B}", times, "memory step", device=device)


if __name__ == "__main__":
    main(make_parser(__doc__).parse_args().device)
