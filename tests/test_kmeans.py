"""The nearest centroid and k-means against plain forms in float64, on 1, 2 and 4 processes."""

import pytest
import torch
import torch.nn.functional as F

from odc import distributed, kmeans as module
from odc.errors import Interrupted, UserError
from odc.kmeans import kmeans, nearest_centroids
from odc.runtime import launch
from tests.processes import run_processes


def unit_features(n, d, seed=0, latent=6):
    """Non-negative unit features on a curved surface, where 20 iterations do not converge."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, latent, generator=g) @ torch.randn(latent, d, generator=g)
    x = x + 0.1 * torch.randn(n, d, generator=g)
    return F.normalize(x.relu())


# --- the nearest centroid ------------------------------------------------------------------------


def plain_scores(features, centroids, inner_product):
    """What the best centroid has most of, in float64."""
    products = features.double() @ centroids.double().T
    return products if inner_product else products - centroids.double().square().sum(1) / 2


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("n, K, d", [(300, 1, 5), (1, 7, 16), (999, 64, 64), (0, 3, 4),
                                     (2000, 333, 256), (1500, 1001, 33)])
def test_the_nearest_centroid_is_that_of_a_plain_search(monkeypatch, n, K, d, inner_product):
    features = unit_features(n, d)
    centroids = unit_features(4 * K, d, 1).view(K, 4, d).mean(1)
    labels = nearest_centroids(features, centroids, inner_product)
    scores = plain_scores(features, centroids, inner_product)
    assert labels.dtype == torch.int64
    assert (scores.gather(1, labels[:, None]) >= scores.amax(1, keepdim=True) - 1e-6).all()
    assert (labels == scores.argmax(1)).sum() >= 0.99 * n
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * K * 17)  # blocks of 17 rows
    other = nearest_centroids(features, centroids, inner_product)
    differ = (labels != other).nonzero()[:, 0]  # none, or rows between two as good
    gap = scores[differ, labels[differ]] - scores[differ, other[differ]]
    assert (gap.abs() <= 1e-6).all() and len(differ) <= n // 100


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("K", [50, 64, 700])
def test_the_lowest_index_wins_ties(K, inner_product):
    g = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (400, 24), generator=g).float()  # whole numbers: no rounding
    centroids = torch.randint(-3, 4, (K, 24), generator=g).float()
    repeated = torch.cat([centroids, centroids.flip(0), centroids])
    expected = plain_scores(features, centroids, inner_product).argmax(1)
    assert torch.equal(nearest_centroids(features, repeated, inner_product), expected)
    assert not nearest_centroids(torch.zeros(3, 24), repeated, True).any()
    assert not nearest_centroids(features, torch.ones(K, 24), inner_product).any()


# --- k-means -------------------------------------------------------------------------------------


def plain_lloyd(features, centroids, iterations):
    """The method in a few lines, in double precision."""
    features, centroids = features.double(), centroids.double()
    for _ in range(iterations):
        labels = torch.cdist(features, centroids).argmin(1)
        centroids = torch.stack([features[labels == c].mean(0) for c in range(len(centroids))])
    return torch.cdist(features, centroids).argmin(1), centroids


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_equals_a_plain_lloyd(iterations):
    features = unit_features(2000, 32)
    initial = features[:40]
    labels, centroids = kmeans(features, 40, iterations, initial_centroids=initial)
    expected_labels, expected_centroids = plain_lloyd(features, initial, iterations)
    assert torch.equal(labels, expected_labels)
    assert torch.allclose(centroids.double(), expected_centroids, atol=1e-6)
    # 10 iterations do not converge, so the number of them counts.
    assert not torch.equal(labels, plain_lloyd(features, initial, iterations + 1)[0])


def shards_of(calls):
    """Labels and centroids of each call, or the error, with this process's shard of the rows."""
    results = []
    for features, *arguments in calls:
        try:
            results.append(kmeans(features[distributed.shard(len(features))], *arguments))
        except UserError as error:
            results.append(str(error))
    return results


def test_any_number_of_processes_gives_the_same_clusters():
    features = unit_features(1003, 16)
    far = torch.cat([features[:20], 50 + torch.rand(15, 16)])  # no row is near the last 15
    alike = features[:1].repeat(30, 1)
    calls = [(features, 35, 8, 3), (features, 35, 1, 3, far), (alike, 7, 5, 0), (features, 1004)]
    *one, refused = shards_of(calls)
    assert refused == "--num-clusters 1004: choose between 1 and 1003, the images."
    for world_size in (2, 4):
        shards = run_processes(shards_of, world_size, calls)
        for number, (labels, centroids) in enumerate(one):
            assert torch.equal(torch.cat([shard[number][0] for shard in shards]), labels)
            assert all(torch.equal(shard[number][1], centroids) for shard in shards)
        assert all(shard[-1] == refused for shard in shards)


def test_the_seed_draws_the_initial_rows():
    features = unit_features(500, 16)
    first, again, other = (kmeans(features, 10, 2, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # As many clusters as rows: every row is drawn, so each is a cluster of its own.
    labels, centroids = kmeans(features, 500)
    assert labels.unique().numel() == 500 and torch.equal(centroids[labels], features)
    labels, centroids = kmeans(features, 1)
    assert labels.max() == 0 and torch.allclose(centroids[0], features.mean(0), atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 5])
def test_clusters_without_rows_restart(iterations):
    """Beside clusters with spread, not beside the largest, of 400 equal rows."""
    features = torch.cat([unit_features(1, 8, 1).repeat(400, 1), unit_features(400, 8)])
    initial = torch.cat([features[399:410], torch.full((29, 8), 100.0)])
    labels, _ = kmeans(features, 40, iterations, initial_centroids=initial)
    assert (labels[:400] == labels[0]).all()
    assert len(labels.unique()) >= (30 if iterations == 1 else 40)


@pytest.mark.parametrize("num_clusters", [2, 7, 64, 200])
@pytest.mark.parametrize("rows, kinds", [("alike", 1), ("zero", 1), ("few", 5), ("one apart", 2)])
def test_equal_rows_stay_together(rows, kinds, num_clusters):
    features = {
        "alike": torch.ones(200, 8) / 8**0.5,
        "zero": torch.zeros(200, 8),
        "few": unit_features(5, 8).repeat(40, 1),
        "one apart": torch.cat([torch.ones(199, 8), -torch.ones(1, 8)]) / 8**0.5,
    }[rows]
    labels, centroids = kmeans(features, num_clusters)
    assert torch.equal(labels, nearest_centroids(features, centroids))
    assert centroids.isfinite().all()
    of_kinds = features.unique(dim=0, return_inverse=True)[1]
    for kind in range(kinds):
        assert len(labels[of_kinds == kind].unique()) == 1
    assert len(labels.unique()) == min(kinds, num_clusters)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_feature_that_is_not_finite(value):
    features = unit_features(100, 8)
    features[50, 3] = value
    with pytest.raises(UserError, match="not finite"):
        kmeans(features, 5)


def test_a_signal_is_asked_for_every_iteration_and_standing_still_stops(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "check_signals", lambda: asked.append(1))
    features = unit_features(500, 16)
    kmeans(features, 20, 4)
    assert len(asked) == 5  # iterations, and the search after the last
    kmeans(features, 2, 1000)
    assert len(asked) < 1000
    monkeypatch.undo()
    monkeypatch.setattr(launch, "_signal_received", 15)
    with pytest.raises(Interrupted):
        kmeans(features, 20, 4)
