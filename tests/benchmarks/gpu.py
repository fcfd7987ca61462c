"""On a GPU: a whole ODC step with resnet50 at 224 in bf16, and k-means at ImageNet's size. Skips without CUDA.

    python -m tests.benchmarks.gpu
"""

import sys

import torch
import torch.nn.functional as F

from odc.kmeans import kmeans
from tests.benchmarks.step import MadeUpRun, measure
from tests.benchmarks.timing import interleave, table

N, K, d, ITERATIONS = 1_281_167, 10_000, 256, 20


def products(features, centroids, block=16384):
    """The bound of k-means: its products alone, in bf16, and the best of each row."""
    features, centroids = features.bfloat16(), centroids.bfloat16()
    for _ in range(ITERATIONS):
        for rows in features.split(block):
            (rows @ centroids.T).amax(dim=1)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing measured")
    run = MadeUpRun(torch.device("cuda", 0), "resnet50", 224, 512, N, K, steps=10)
    measure("resnet50, 224, bf16, channels_last, B = 512, N = 1,281,167, K = 10,000", run, rounds=8)
    del run
    features = F.normalize(torch.rand(N, d, device="cuda"))
    times = interleave({
        f"k-means, {ITERATIONS} iterations": lambda: kmeans(features, K, ITERATIONS, progress=False),
        "bare products": lambda: products(features, features[:K]),
    }, rounds=3)
    table(f"N = {N:,}, K = {K:,}, d = {d}", times, f"k-means, {ITERATIONS} iterations")
