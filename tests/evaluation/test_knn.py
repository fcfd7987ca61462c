"""Nearest-neighbour classification against brute force, with one, two and four processes."""

import pytest
import torch
import torch.nn.functional as F

from odc.runtime import program
from odc.errors import UserError
from odc.errors import Interrupted
from odc import distributed
from odc.evaluation import knn
from odc.evaluation.knn import knn_predict, nearest_neighbours
from tests.processes import run_processes

KS = (1, 10, 20)


def problem(num_queries=70, size=501, width=16, num_classes=7, seed=0):
    """Clustered unit features with labels that follow the clusters loosely."""
    g = torch.Generator().manual_seed(seed)
    modes = torch.randn(num_classes, width, generator=g)
    labels = torch.randint(num_classes, (size,), generator=g)
    bank = F.normalize(modes[labels] + 2 * torch.randn(size, width, generator=g))
    queries = F.normalize(modes[torch.randint(num_classes, (num_queries,), generator=g)]
                          + 2 * torch.randn(num_queries, width, generator=g))
    return queries, bank, labels


def brute_force(queries, bank, labels, num_classes, ks, temperature):
    """Wu et al., one query at a time: sort everything, let the first k vote, sort the classes."""
    predictions = {k: [] for k in ks}
    for query in queries:
        similarity = (bank.double() @ query.double()).float()
        order = sorted(range(len(bank)), key=lambda i: (-float(similarity[i]), i))
        for k in ks:
            votes = [0.0] * num_classes
            for i in order[:k]:
                votes[int(labels[i])] += float(torch.exp(similarity[i].double() / temperature))
            ranked = sorted(range(num_classes), key=lambda c: (-votes[c], c))[:5]
            predictions[k].append([c if votes[c] > 0 else -1 for c in ranked])
    return {k: torch.tensor(rows) for k, rows in predictions.items()}


def predict_shard(queries, bank, labels, num_classes, ks, temperature, block):
    knn.TILES["cpu"] = block
    rows = distributed.shard(len(bank))
    return knn_predict(queries, bank[rows], labels[rows], num_classes, ks, temperature)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force(temperature):
    queries, bank, labels = problem()
    expected = brute_force(queries, bank, labels, 7, KS, temperature)
    found = knn_predict(queries, bank, labels, 7, KS, temperature)
    for k in KS:
        assert torch.equal(found[k], expected[k])


def test_a_tiny_temperature_leaves_the_nearest_to_decide():
    queries, bank, labels = problem()
    found = knn_predict(queries, bank, labels, 7, KS, 1e-6)  # exp(1 / 1e-6) is no number
    for k in KS:
        assert torch.equal(found[k][:, 0], labels[(queries @ bank.T).argmax(1)])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_and_any_blocks(world_size):
    queries, bank, labels = problem()
    bank[100:150] = bank[:50]  # equal rows, with other labels: the lower index counts
    expected = brute_force(queries, bank, labels, 7, KS, 0.07)
    for found in run_processes(predict_shard, world_size, queries, bank, labels, 7, KS, 0.07, (40, 32)):
        for k in KS:
            assert torch.equal(found[k], expected[k])


def uneven_shards(sizes, signal_on=None):
    """Neighbours of three queries in a bank of rows that point ever less their way, a part of it on each process."""
    knn.TILES["cpu"] = (8, 512)
    if distributed.rank() == signal_on:
        program._signal_received = 15
    size, rank = sum(sizes), distributed.rank()
    bank = torch.stack([torch.linspace(1, 0.1, size), torch.zeros(size)], dim=1)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    try:
        return nearest_neighbours(torch.tensor([[1.0, 0.0]] * 3), bank[rows], torch.arange(size)[rows], 4)[1].tolist()
    except Interrupted:
        return "interrupted"


@pytest.mark.parametrize("sizes", [(9, 8), (8, 9), (0, 9), (17, 0)])
def test_shards_of_unlike_numbers_of_blocks(sizes):
    assert run_processes(uneven_shards, 2, sizes, timeout=60) == [[[0, 1, 2, 3]] * 3] * 2


def test_a_signal_on_one_process_stops_the_search_on_all():
    assert run_processes(uneven_shards, 2, (20, 20), 1, timeout=60) == ["interrupted"] * 2


def test_neighbours_are_sorted_and_ties_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setitem(knn.TILES, "cpu", (16, 512))
    bank = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])).repeat(10, 1)  # rows i and i + 4 are equal
    similarities, indices = nearest_neighbours(torch.tensor([[1.0, 0.0]]), bank, torch.arange(40), 25)
    assert indices[0].tolist() == [*range(0, 40, 4), *range(2, 40, 4), 1, 5, 9, 13, 17]
    assert similarities[0].tolist() == sorted(similarities[0].tolist(), reverse=True)
    assert float(similarities[0, -1]) == 0.0


def test_all_features_alike():
    predictions = knn_predict(torch.ones(3, 4), torch.ones(50, 4), torch.arange(50) % 10, 10, (20,))
    assert predictions[20].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_classes_without_a_vote_are_not_predicted():
    predictions = knn_predict(torch.eye(4), torch.eye(4), torch.tensor([3, 1, 2, 6]), 8, (1, 2), temperature=1.0)
    assert predictions[1].tolist() == [[c, -1, -1, -1, -1] for c in (3, 1, 2, 6)]
    assert predictions[2][0].tolist() == [3, 1, -1, -1, -1]


def test_fewer_classes_than_five_and_no_query():
    queries, bank, labels = problem(num_classes=3)
    assert knn_predict(queries, bank, labels, 3, (5,))[5].shape == (70, 3)
    assert knn_predict(queries[:0], bank, labels, 3, (5,))[5].shape == (0, 3)


def test_k_as_large_as_the_bank():
    queries, bank, labels = problem(size=30)
    expected = brute_force(queries, bank, labels, 7, (30,), 0.07)
    assert torch.equal(knn_predict(queries, bank, labels, 7, (30,))[30], expected[30])


def test_k_larger_than_the_bank():
    queries, bank, labels = problem(size=30)
    with pytest.raises(UserError, match="--k 31: the bank has 30"):
        knn_predict(queries, bank, labels, 7, (10, 31))


def test_features_that_are_not_finite():
    queries, bank, labels = problem()
    bank[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        knn_predict(queries, bank, labels, 7, (5,))


def test_keys_order_as_value_then_lower_index():
    values = torch.tensor([-1.5, -0.0, 0.0, 1e-30, 1.0, -1e30])
    indices = torch.tensor([5, 4, 3, 2, 1, 2**32 - 1])
    keys = knn._keys(values, indices)
    assert keys.argsort(descending=True).tolist() == [4, 3, 2, 1, 0, 5]
    assert torch.equal(knn._values(keys), values) and torch.equal(knn._indices(keys), indices)
