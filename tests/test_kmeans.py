"""k-means against a plain Lloyd, on 1, 2 and 4 processes, and on data without K different rows."""

import pytest
import torch
import torch.nn.functional as F

from odc import distributed
from odc.errors import Interrupted, UserError
from odc.kmeans import kmeans
from odc.nearest import nearest_centroids
from odc.runtime import launch
from tests.processes import run_processes


def unit_features(n, d, seed=0, latent=6):
    """Non-negative unit features on a curved surface, where 20 iterations do not converge."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, latent, generator=g) @ torch.randn(latent, d, generator=g)
    x = x + 0.1 * torch.randn(n, d, generator=g)
    return F.normalize(x.relu())


def plain_lloyd(features, centroids, iterations):
    """The method in a few lines, in double precision."""
    features, centroids = features.double(), centroids.double()
    for _ in range(iterations):
        labels = torch.cdist(features, centroids).argmin(1)
        centroids = torch.stack([features[labels == c].mean(0) for c in range(len(centroids))])
    return torch.cdist(features, centroids).argmin(1), centroids


def objective(features, centroids):
    return float(torch.cdist(features.double(), centroids.double()).min(1).values.square().sum())


def check(features, labels, centroids, num_clusters):
    """Every cluster has rows, and every row the nearest centroid."""
    sizes = torch.bincount(labels, minlength=num_clusters)
    assert len(sizes) == num_clusters and sizes.sum() == len(features) and sizes.min() > 0
    distances = torch.cdist(features.double(), centroids.double())
    own = distances.gather(1, labels[:, None])[:, 0]
    assert (own <= distances.min(1).values + 1e-6).all()


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_equals_a_plain_lloyd(iterations):
    features = unit_features(2000, 32)
    initial = features[:40]
    labels, centroids = kmeans(features, 40, iterations, initial_centroids=initial)
    expected_labels, expected_centroids = plain_lloyd(features, initial, iterations)
    assert torch.equal(labels, expected_labels)
    assert torch.allclose(centroids.double(), expected_centroids, atol=1e-6)
    check(features, labels, centroids, 40)
    assert objective(features, centroids) <= 1.002 * objective(features, expected_centroids)


def test_the_data_do_not_converge_in_20_iterations():
    features = unit_features(2000, 32)
    twenty, _ = kmeans(features, 40, 20)
    more, _ = kmeans(features, 40, 21)
    assert not torch.equal(twenty, more)


def kmeans_shard(features, num_clusters, iterations, seed, initial_centroids=None):
    rows = distributed.shard(len(features))
    return kmeans(features[rows], num_clusters, iterations, seed,
                  initial_centroids=initial_centroids)


def test_any_number_of_processes_gives_the_same_bits():
    features = unit_features(1003, 16)
    far = torch.cat([features[:20], 50 + torch.rand(15, 16)])  # no row is near the last 15
    alike = features[:1].repeat(30, 1)
    one = [kmeans(features, 35, 8, 3), kmeans(features, 35, 1, 3, far), kmeans(alike, 7, 5)]
    for world_size in (2, 4):
        calls = [(features, 35, 8, 3), (features, 35, 1, 3, far), (alike, 7, 5, 0)]
        shards = run_processes(several_shards, world_size, calls)
        for number, (labels, centroids) in enumerate(one):
            assert torch.equal(torch.cat([shard[number][0] for shard in shards]), labels)
            assert all(torch.equal(shard[number][1], centroids) for shard in shards)
        assert all(shard[-1] == refused(11, 12) for shard in shards)


def refused(num_rows, num_clusters):
    try:
        kmeans_shard(unit_features(num_rows, 8), num_clusters, 3, 0)
    except UserError as error:
        return str(error)


def several_shards(calls):
    return [kmeans_shard(*arguments) for arguments in calls] + [refused(11, 12)]


def test_the_seed_draws_the_initial_rows():
    features = unit_features(500, 16)
    first, again, other = (kmeans(features, 10, 2, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # As many clusters as rows: every row is drawn, so each is a cluster of its own.
    labels, centroids = kmeans(features, 500)
    assert labels.unique().numel() == 500 and torch.equal(centroids[labels], features)


def test_one_cluster_holds_all():
    features = unit_features(100, 8)
    labels, centroids = kmeans(features, 1)
    assert labels.max() == 0 and torch.allclose(centroids[0], features.mean(0), atol=1e-6)


@pytest.mark.parametrize("num_clusters", [2, 7, 64, 200])
@pytest.mark.parametrize("rows", ["alike", "zero", "few", "one apart"])
def test_no_cluster_is_empty(rows, num_clusters):
    features = {
        "alike": torch.ones(200, 8),
        "zero": torch.zeros(200, 8),
        "few": unit_features(5, 8).repeat(40, 1),
        "one apart": torch.cat([torch.ones(199, 8), -torch.ones(1, 8)]),
    }[rows]
    labels, centroids = kmeans(features, num_clusters)
    check(features, labels, centroids, num_clusters)


@pytest.mark.parametrize("iterations", [1, 5])
def test_a_far_initial_centroid_ends_with_rows(iterations):
    features = unit_features(400, 8)
    initial = torch.cat([features[:10], torch.full((30, 8), 100.0)])
    labels, _ = kmeans(features, 40, iterations, initial_centroids=initial)
    assert torch.bincount(labels, minlength=40).min() > 0


def test_more_clusters_than_rows():
    message = refused(11, 12)
    assert "12" in message and "11" in message and message.endswith(".") and "\n" not in message
    assert refused(11, 0) and refused(11, -1) and not refused(11, 11)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
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
    asked.clear()
    kmeans(features, 2, 1000)
    assert len(asked) < 1000

    def stop():
        raise Interrupted

    monkeypatch.setattr(launch, "check_signals", stop)
    with pytest.raises(Interrupted):
        kmeans(features, 20, 4)


def test_features_in_half_precision():
    """Their sum is beyond the range of float16."""
    features = F.normalize(torch.rand(20_000, 64, generator=torch.Generator().manual_seed(0)))
    labels, centroids = kmeans(features.half(), 10, 2)
    assert torch.equal(labels, nearest_centroids(features.half(), centroids))
