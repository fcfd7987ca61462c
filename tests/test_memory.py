"""The memory against the paper's rules written out simply, on one process and on several."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from odc.errors import UserError
from odc import distributed
from odc.kmeans import two_means
from odc.memory import ODCMemory
from tests.processes import run_processes


class SimpleMemory:
    """The rules of the paper and the recipe, image by image, all recounted in float64."""

    def __init__(self, features, labels, num_clusters, momentum, min_cluster_size):
        self.F = F.normalize(features.double())
        self.y = labels.clone()
        self.K, self.m, self.min_cluster_size = num_clusters, momentum, min_cluster_size
        self.C = torch.zeros(num_clusters, features.shape[1], dtype=torch.float64)
        self.update_centroids()

    def sizes(self):
        return torch.tensor([int((self.y == c).sum()) for c in range(self.K)])

    def update_samples(self, indices, z):
        before = self.y.clone()
        last = {int(i): feature for i, feature in zip(indices, z)}  # the last occurrence counts
        for i, feature in last.items():
            moved = self.m * feature.double() / feature.double().norm() + (1 - self.m) * self.F[i]
            self.F[i] = moved / moved.norm()
            self.y[i] = int((self.C @ self.F[i]).argmax())
        return sum(int(self.y[i] != before[i]) for i in last) / len(last)

    def update_centroids(self):
        for c in range(self.K):
            if (self.y == c).any():
                self.C[c] = self.F[self.y == c].mean(dim=0)

    def split_small_clusters(self):
        sizes = self.sizes()
        small = [c for c in range(self.K) if sizes[c] < self.min_cluster_size]
        large = [c for c in range(self.K) if sizes[c] >= self.min_cluster_size]
        if not small or not large:
            return 0
        for i in [i for i in range(len(self.y)) if int(self.y[i]) in small]:
            self.y[i] = max(large, key=lambda c: float(self.C[c] @ self.F[i]))
        for refilled, empty in enumerate(small):
            largest = int(self.sizes().argmax())
            if self.sizes()[largest] < 2 * self.min_cluster_size:
                return refilled
            members = (self.y == largest).nonzero()[:, 0]
            half = two_means(self.F[members].float(), at_least=self.min_cluster_size, seed=empty)
            self.y[members[half]] = empty
            self.C[largest] = self.F[members[~half]].mean(dim=0)
            self.C[empty] = self.F[members[half]].mean(dim=0)
        return len(small)


def draw(num_samples, dim, num_clusters, seed=0):
    """Features that form loose groups, and labels of very unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(num_samples, dim, generator=generator)
    features += 2 * torch.eye(dim)[torch.randint(dim, (num_samples,), generator=generator)]
    labels = (num_clusters * torch.rand(num_samples, generator=generator) ** 2).long()
    return F.normalize(features), labels, generator


def global_batches(num_samples, dim, batch, steps, generator):
    """Batches with repeated images."""
    for _ in range(steps):
        yield (torch.randint(num_samples, (batch,), generator=generator),
               torch.rand(batch, dim, generator=generator))


def step(memory, number, indices, z):
    changed = memory.update_samples(indices, z)
    if (number + 1) % 10 == 0:
        memory.update_centroids()
    return changed, memory.split_small_clusters()


@pytest.mark.parametrize("K", [12, 24])  # 24 > N / (2 x 15): some clusters stay empty
def test_every_rule_against_the_simple_form(K):
    N, d = 400, 16
    features, labels, generator = draw(N, d, K)
    memory = ODCMemory(N, d, K, momentum=0.5, min_cluster_size=15)
    memory.initialize(features, labels)
    simple = SimpleMemory(features, labels, K, momentum=0.5, min_cluster_size=15)
    refilled = 0
    for number, (indices, z) in enumerate(global_batches(N, d, 48, 120, generator)):
        result, expected = step(memory, number, indices, z), step(simple, number, indices, z)
        assert float(result[0]) == pytest.approx(expected[0]) and result[1] == expected[1]
        refilled += result[1]
        assert torch.equal(memory.labels, simple.y), f"step {number}"
        assert torch.equal(memory.cluster_sizes, simple.sizes())
        assert (memory.features - simple.F).abs().max() < 1e-5
        assert (memory.centroids - simple.C).abs().max() < 1e-5
    assert refilled > 5  # otherwise this has not tested the splits
    assert (K == 24) == bool((simple.sizes() == 0).any())


def test_zero_features():
    """A dead ReLU gives z = 0: the feature then stays where it was."""
    memory = ODCMemory(4, 3, 2, min_cluster_size=0)
    memory.initialize(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]))
    memory.update_samples(torch.tensor([0, 3]), torch.zeros(2, 3))
    assert torch.equal(memory.features, torch.zeros(4, 3))
    assert memory.cluster_sizes.sum() == 4


def test_a_feature_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not finite"):
        ODCMemory(4, 3, 2).initialize(torch.full((4, 3), float("inf")), torch.tensor([0, 0, 1, 1]))


def test_loss_weights():
    memory = ODCMemory(30, 2, 3, min_cluster_size=0)
    memory.initialize(torch.rand(30, 2), torch.tensor([0] * 25 + [1] * 5))  # cluster 2 is empty
    assert memory.split_small_clusters() == 0 and memory.cluster_sizes.tolist() == [25, 5, 0]
    expected = torch.tensor([25, 5, 1]) ** -0.5
    torch.testing.assert_close(memory.loss_weights(), expected / expected.sum())
    assert torch.allclose(memory.loss_weights(power=0), torch.full((3,), 1 / 3))


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_means_is_as_good_as_scikit_learn(seed):
    from sklearn.cluster import KMeans  # here: the processes below import this module without it

    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(150, 24, generator=generator)
    x = x + torch.randint(2, (150, 1), generator=generator) * 0.7
    half = two_means(x)
    inertia = sum(float((x[h] - x[h].mean(dim=0)).square().sum()) for h in (half, ~half))
    assert inertia <= KMeans(2, n_init=10, random_state=0).fit(x.numpy()).inertia_ * 1.01


def test_two_means_halves_identical_points_at_random():
    half = two_means(torch.ones(11, 3))
    assert half.sum() == 5
    assert half.tolist() != two_means(torch.ones(11, 3), seed=1).tolist()


def test_two_means_keeps_halves_from_being_small():
    x = torch.randn(99, 4, generator=torch.Generator().manual_seed(0)) * 0.01
    x = torch.cat([x, torch.full((1, 4), 9.0)])
    second = int(two_means(x).sum())
    assert min(second, 100 - second) == 1  # as in k-means, an outlier is a cluster
    half = two_means(x, at_least=20)
    assert min(int(half.sum()), 100 - int(half.sum())) == 20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.integers(1, 15), st.integers(0, 12), st.data())
def test_properties(num_clusters, dim, min_cluster_size, steps, data):
    N = data.draw(st.integers(num_clusters, 40 + 2 * num_clusters * min_cluster_size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    labels = torch.randint(data.draw(st.integers(1, num_clusters)), (N,), generator=generator)
    memory = ODCMemory(N, dim, num_clusters, min_cluster_size=min_cluster_size)
    memory.initialize(torch.relu(torch.randn(N, dim, generator=generator)), labels)
    for indices, z in global_batches(N, dim, data.draw(st.integers(1, 2 * N)), steps, generator):
        memory.update_samples(indices, torch.relu(z - 0.5))
        memory.split_small_clusters()
        sizes = memory.cluster_sizes
        assert torch.equal(sizes, memory.labels.bincount(minlength=num_clusters))
        assert sizes.sum() == N
        if sizes.max() >= min_cluster_size:  # else nothing is done
            assert ((sizes >= min_cluster_size) | (sizes == 0)).all()
        if N >= 2 * num_clusters * min_cluster_size:
            assert sizes.min() >= min_cluster_size
        weights = memory.loss_weights()
        assert torch.isfinite(weights).all() and (weights > 0).all()
        assert abs(float(weights.sum()) - 1) < 1e-5
    memory.update_centroids()
    for c in memory.labels.unique():
        mean = memory.features[memory.labels == c].double().mean(dim=0)
        assert (memory.centroids[c] - mean).abs().max() < 1e-5


def test_no_drift_in_3000_steps():
    N, d, K = 500, 8, 10
    features, labels, generator = draw(N, d, K)
    memory = ODCMemory(N, d, K, min_cluster_size=20)
    memory.initialize(features, labels)
    for number, (indices, z) in enumerate(global_batches(N, d, 16, 3000, generator)):
        step(memory, number, indices, z)
    recounted = ODCMemory(N, d, K, min_cluster_size=20)
    recounted.load_state_dict(memory.state_dict(), memory.features)
    assert torch.equal(memory.sums.values, recounted.sums.values)  # not a bit was lost on the way
    assert torch.equal(memory.cluster_sizes, recounted.cluster_sizes)


# --- several processes ---------------------------------------------------------------------------


def train_memory(steps, state=None):
    """The memory after `steps` steps on the same global batches, as arrays of all N images."""
    N, d, K = 500, 16, 12
    features, labels, generator = draw(N, d, K)
    memory = ODCMemory(N, d, K, min_cluster_size=15)
    if state is None:
        memory.initialize(features[memory.rows], labels)
    else:
        state = {name: torch.from_numpy(value) for name, value in state.items()}
        memory.load_state_dict(state, state["features"][memory.rows])
    refilled = 0
    for number, (indices, z) in enumerate(global_batches(N, d, 48, steps, generator)):
        refilled += step(memory, number, indices, z)[1]
    same = [torch.equal(x, distributed.broadcast(x.clone()))
            for x in (memory.labels, memory.centroids, memory.cluster_sizes)]
    assert all(same), "labels, centroids and sizes must be the same on every process"
    features = distributed.all_gather_uneven_rows(memory.features)
    result = {name: value.numpy() for name, value in memory.state_dict().items()}
    return dict(result, features=features.numpy()), refilled


def start_and_go_on(state):
    return train_memory(100), train_memory(0, state)[0], train_memory(10, state)[0]


def assert_same_memory(a, b):
    assert (a["labels"] == b["labels"]).all()
    assert abs(a["centroids"] - b["centroids"]).max() <= 1e-5
    assert abs(a["features"] - b["features"]).max() <= 1e-5


def test_any_number_of_processes_gives_the_same_memory_and_goes_on_with_a_saved_one():
    one, refilled = train_memory(100)
    assert refilled > 5
    continued, _ = train_memory(10, one)
    for W in (2, 4):
        for (started, _), restored, went_on in run_processes(start_and_go_on, W, one):
            assert_same_memory(started, one)
            assert_same_memory(went_on, continued)
            assert all((restored[name] == one[name]).all() for name in one)
