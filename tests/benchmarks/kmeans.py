"""k-means against faiss with the same initial centroids.

    python -m tests.benchmarks.kmeans    100,000 x 256, K = 1,000, up to 20 iterations

Both give centroids and the labels that belong to them, which takes a last search in each.
"""

import functools

import faiss
import torch
import torch.nn.functional as F

from odc.kmeans import kmeans, nearest_centroids
from tests.benchmarks.timing import interleave, make_parser, table


def unit_features(n, d, latent=24, modes=500):
    """Non-negative unit features, mildly clustered: overlapping modes in few dimensions."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(modes, latent, generator=g)[torch.randint(modes, (n,), generator=g)]
    z += 0.7 * torch.randn(n, latent, generator=g)
    x = z @ torch.randn(latent, d, generator=g) / latent**0.5
    return F.normalize(x.add_(torch.randn(n, d, generator=g), alpha=0.3).relu_())


def objective(features, centroids):
    """Sum of the squared distances to the nearest centroid."""
    labels = nearest_centroids(features, centroids)
    return sum(float((f - centroids[y]).double().square().sum())
               for f, y in zip(features.split(4096), labels.split(4096)))


def faiss_kmeans(algorithm, features, initial, iterations):
    """Centroids, after a search for the labels, which is thrown away. Always on the CPU.

    algorithm: faiss.Clustering, or faiss.SuperKMeans, which skips many products and may draw
    initial centroids of its own.
    """
    n, (K, d) = len(features), initial.shape
    clustering = algorithm(d, K)
    parameters = getattr(clustering, "cp", clustering)
    parameters.niter = iterations
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, n
    faiss.copy_array_to_vector(initial.numpy().ravel(), clustering.centroids)
    index = faiss.IndexFlatL2(d)
    if algorithm is faiss.Clustering:
        clustering.train(features.numpy(), index)  # leaves the centroids in the index
    else:
        clustering.train(features.numpy())
        index.add(faiss.vector_to_array(clustering.centroids).reshape(K, d))
    index.search(features.numpy(), 1)
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(K, d))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    n, K, iterations = 100_000, 1_000, 20

    faiss.omp_set_num_threads(torch.get_num_threads())
    features = unit_features(n, 256)
    initial = features[torch.randperm(n, generator=torch.Generator().manual_seed(1))[:K]].clone()
    on_device, start = features.to(arguments.device), initial.to(arguments.device)
    results = {}

    def ours():
        results["ours"] = kmeans(on_device, K, iterations, initial_centroids=start)[1].cpu()

    def peer(name):
        results[name] = faiss_kmeans(getattr(faiss, name), features, initial, iterations)

    functions = {name: functools.partial(peer, name) for name in ("Clustering", "SuperKMeans")
                 if hasattr(faiss, name)}  # SuperKMeans is new in faiss 1.15
    times = interleave({"ours": ours, **functions}, arguments.rounds)
    extra = {name: f"objective {objective(features, centroids):.1f}"
             for name, centroids in results.items()}
    table(f"k-means, {n:,} x 256, K = {K:,}, {iterations} iterations", times, "ours", extra,
          arguments.device)


if __name__ == "__main__":
    main()
