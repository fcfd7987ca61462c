"""Nearest-neighbour classification against brute force, with one, two and four processes."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from odc import distributed, products
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
    arguments = (queries, bank, labels, 7, KS, 0.07, (40, 32))
    for found in run_processes(predict_shard, world_size, *arguments):
        for k in KS:
            assert torch.equal(found[k], expected[k])


def uneven_shards(sizes, signal_on=None):
    """Neighbours of three queries in a bank of rows that point ever less their way."""
    knn.TILES["cpu"] = (8, 512)
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


@pytest.mark.parametrize("sizes", [(9, 8), (8, 9), (0, 9), (17, 0)])
def test_shards_of_unlike_numbers_of_blocks(sizes):
    assert run_processes(uneven_shards, 2, sizes, timeout=60) == [[[0, 1, 2, 3]] * 3] * 2


def test_a_signal_on_one_process_stops_the_search_on_all():
    assert run_processes(uneven_shards, 2, (20, 20), 1, timeout=60) == ["interrupted"] * 2


def test_neighbours_are_sorted_and_ties_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setitem(knn.TILES, "cpu", (16, 512))
    # Rows i and i + 4 are equal.
    bank = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])).repeat(10, 1)
    query = torch.tensor([[1.0, 0.0]])
    similarities, indices = nearest_neighbours(query, bank, torch.arange(40), 25)
    assert indices[0].tolist() == [*range(0, 40, 4), *range(2, 40, 4), 1, 5, 9, 13, 17]
    assert similarities[0].tolist() == sorted(similarities[0].tolist(), reverse=True)
    assert float(similarities[0, -1]) == 0.0


def test_all_features_alike():
    predictions = knn_predict(torch.ones(3, 4), torch.ones(50, 4), torch.arange(50) % 10, 10, (20,))
    assert predictions[20].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_classes_without_a_vote_are_not_predicted():
    labels = torch.tensor([3, 1, 2, 6])
    predictions = knn_predict(torch.eye(4), torch.eye(4), labels, 8, (1, 2), temperature=1.0)
    assert predictions[1].tolist() == [[c, -1, -1, -1, -1] for c in (3, 1, 2, 6)]
    assert predictions[2][0].tolist() == [3, 1, -1, -1, -1]


def test_a_vote_may_be_smaller_than_float32_knows():
    predictions = knn_predict(torch.eye(6)[:1], torch.eye(6), torch.arange(6), 6, (6,),
                              temperature=0.005)
    assert predictions[6].tolist() == [[0, 1, 2, 3, 4]]


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


def oracle(queries, bank, k):
    """The k nearest by similarities in float64, rounded to float32; the lower index first."""
    similarities = (queries.double() @ bank.double().T).float()
    similarities, indices = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], indices[:, :k]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["spread", "close", "common part", "few values", "not unit"])
def test_neighbours_are_those_of_a_search_in_double_precision(monkeypatch, dtype, kind):
    """Whatever the precision of the coarse product, on features that are easy and hard for it."""
    monkeypatch.setattr(products, "coarse_dtype", lambda device: dtype)
    monkeypatch.setitem(knn.TILES, "cpu", (1000, 64))
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(4321, 48, generator=generator)
    queries = torch.randn(150, 48, generator=generator)
    if kind == "close":  # similarities that half precision cannot tell apart
        bank, queries = bank * 1e-3 + bank[0], queries * 1e-3 + bank[0]
    if kind == "common part":
        bank, queries = bank.relu() + 3, queries.relu() + 3
    if kind == "few values":  # many ties
        bank, queries = (bank > 1).float() + 0.5, (queries > 1).float() + 0.5
    if kind == "not unit":
        bank, queries = 100 * bank, 100 * queries
    elif kind != "few values":
        bank, queries = F.normalize(bank), F.normalize(queries)
    bank[2000:2200] = bank[:200]
    for k in (1, 20, 200):
        found = nearest_neighbours(queries, bank, torch.arange(len(bank)), k)
        expected = oracle(queries, bank, k)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_an_easy_search_compares_few_pairs_in_double_precision(monkeypatch):
    queries, bank, labels = problem(num_queries=300, size=20_000, width=64)
    pairs, update = [], knn._update
    monkeypatch.setattr(knn, "_update", lambda best, similarities, indices: (
        pairs.append(int(similarities.isfinite().sum())), update(best, similarities, indices)))
    nearest_neighbours(queries, bank, labels, 20)
    assert sum(pairs) < 300 * 20_000 / 50


def test_collapsed_features():
    """Of a network whose features are all equal but for rounding, or all equal."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-7 * torch.rand(3000, 32, generator=generator)
    for bank in (F.normalize(1 + noise), torch.ones(3000, 32) / 32**0.5):
        found = nearest_neighbours(bank[:40], bank, torch.arange(3000), 50)
        expected = oracle(bank[:40], bank, 50)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_that_a_program_allows_for_products_changes_nothing(monkeypatch, dtype):
    monkeypatch.setattr(products, "coarse_dtype", lambda device: dtype)
    queries, bank, labels = problem(num_queries=300, size=20_000, width=512)
    expected = nearest_neighbours(queries, bank, labels, 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbours(queries, bank, labels, 20)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_held_out_images_have_the_background_of_the_training_images(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / split / label / "clear.png")
    for background, value in (("white", 255), (None, 9)):
        train = open_dataset(str(tmp_path), "train", background)
        val = open_held_out(str(tmp_path), train)
        assert val.split == "val" and val.load(0).getpixel((0, 0)) == (value,) * 3
