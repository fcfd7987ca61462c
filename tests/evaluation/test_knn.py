"""Nearest-neighbour classification against brute force, with one, two and four processes."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from odc import distributed
from odc.data.datasets import open_dataset
from odc.errors import Interrupted, UserError
from odc.evaluation import knn
from odc.evaluation.knn import knn_predict, nearest_neighbours, open_held_out
from odc.runtime import launch
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


def brute_force(queries, bank, labels, num_classes, ks):
    """Wu et al., one query at a time: sort everything, let the first k vote, sort the classes."""
    predictions = {k: [] for k in ks}
    for query in queries:
        similarity = (bank.double() @ query.double()).float()
        order = sorted(range(len(bank)), key=lambda i: (-float(similarity[i]), i))
        for k in ks:
            votes = [0.0] * num_classes
            for i in order[:k]:
                votes[int(labels[i])] += float(torch.exp(similarity[i].double() / 0.07))
            ranked = sorted(range(num_classes), key=lambda c: (-votes[c], c))[:5]
            predictions[k].append([c if votes[c] > 0 else -1 for c in ranked])
    return {k: torch.tensor(rows) for k, rows in predictions.items()}


def whole_numbers(num_queries=70, size=501):
    """Features with many ties, shorter than 1, whose products have no rounding."""
    g = torch.Generator().manual_seed(0)
    return (torch.randint(-2, 3, (n, 12), generator=g) / 8 for n in (num_queries, size))


def oracle(queries, bank, k):
    """The k nearest by similarities in float64, rounded to float32; the lower index first."""
    similarities = (queries.double() @ bank.double().T).float()
    similarities, indices = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], indices[:, :k]


def predict_shard(queries, bank, labels, num_classes, ks):
    """Votes, and the neighbours among rows with many ties, in small tiles."""
    knn.QUERIES, knn.ROWS = 32, 40
    rows = distributed.shard(len(bank))
    ties, tied = whole_numbers()
    return (knn_predict(queries, bank[rows], labels[rows], num_classes, ks),
            nearest_neighbours(ties, tied[rows], torch.arange(len(bank))[rows], 30))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_votes_and_ties_on_any_number_of_processes(world_size):
    queries, bank, labels = problem()
    expected = brute_force(queries, bank, labels, 7, KS)
    neighbours = oracle(*whole_numbers(), 30)
    for votes, found in run_processes(predict_shard, world_size, queries, bank, labels, 7, KS):
        assert all(torch.equal(votes[k], expected[k]) for k in KS)
        assert torch.equal(found[1], neighbours[1])


@pytest.mark.parametrize("k", [1, 20, 200, 501])
def test_neighbours_are_those_of_a_search_in_double_precision(monkeypatch, k):
    monkeypatch.setattr(knn, "QUERIES", 32)
    monkeypatch.setattr(knn, "ROWS", 100)
    queries, bank, _ = problem()
    similarities, indices = nearest_neighbours(queries, bank, torch.arange(501), k)
    expected, _ = oracle(queries, bank, k)
    assert similarities.dtype == torch.float32
    torch.testing.assert_close(similarities, expected, rtol=0, atol=1e-6)
    own = (queries.double() @ bank.double().T).gather(1, indices)
    torch.testing.assert_close(own, expected.double(), rtol=0, atol=1e-6)
    assert all(len(row.unique()) == k for row in indices)
    queries, bank = whole_numbers()
    found = nearest_neighbours(queries, bank, torch.arange(501), k)
    assert torch.equal(found[1], oracle(queries, bank, k)[1])


def uneven_shards(sizes, signal_on=None):
    """Neighbours of three queries in a bank of rows that point ever less their way."""
    knn.ROWS = 8
    if distributed.rank() == signal_on:
        launch._signal_received = 15
    size, rank = sum(sizes), distributed.rank()
    bank = torch.stack([torch.linspace(1, 0.1, size), torch.zeros(size)], dim=1)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    try:
        queries, labels = torch.tensor([[1.0, 0.0]] * 3), torch.arange(size)[rows]
        return nearest_neighbours(queries, bank[rows], labels, 4)[1].tolist()
    except Interrupted:
        return "interrupted"


@pytest.mark.parametrize("sizes, signal_on", [((9, 8), None), ((0, 9), None), ((20, 20), 1)])
def test_shards_of_unlike_sizes_and_a_signal_on_one_process(sizes, signal_on):
    expected = [[0, 1, 2, 3]] * 3 if signal_on is None else "interrupted"
    assert run_processes(uneven_shards, 2, sizes, signal_on, timeout=120) == [expected] * 2


def test_all_features_alike():
    predictions = knn_predict(torch.ones(3, 4), torch.ones(50, 4), torch.arange(50) % 10, 10, (20,))
    assert predictions[20].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_classes_without_a_vote_are_not_predicted():
    labels = torch.tensor([3, 1, 2, 6])
    predictions = knn_predict(torch.eye(4), torch.eye(4), labels, 8, (1, 2))
    assert predictions[1].tolist() == [[c, -1, -1, -1, -1] for c in (3, 1, 2, 6)]
    assert predictions[2][0].tolist() == [3, 1, -1, -1, -1]


def test_k_larger_than_the_bank_and_fewer_classes_than_five():
    queries, bank, labels = problem(size=30, num_classes=3)
    expected = brute_force(queries, bank, labels, 3, (30,))
    assert torch.equal(knn_predict(queries, bank, labels, 3, (31,))[31], expected[30])


def test_features_that_are_not_finite():
    queries, bank, labels = problem()
    bank[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        knn_predict(queries, bank, labels, 7, (5,))


@pytest.mark.parametrize("val", [("a", "b"), ("a", "c"), None])
def test_the_held_out_images(tmp_path, capsys, val):
    for split, classes in (("train", ("a", "b")), ("val", val or ())):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(11):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / name / f"{i:02}.png")
    train = open_dataset(str(tmp_path), "train")
    bank, queries = open_held_out(str(tmp_path), train)
    held_out = "every 10th training image" in capsys.readouterr().out
    if val == ("a", "b"):
        assert bank is train and queries.split == "val" and not held_out
    else:
        assert queries.labels.tolist() == [0, 0, 1] and len(bank) == 19
        assert [queries.name_of(i) for i in range(3)] == [train.name_of(i) for i in (0, 10, 20)]
        assert held_out
