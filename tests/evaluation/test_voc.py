"""The VOC2007 SVM protocols against scikit-learn, and both tables' numbers by hand."""

import itertools
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

import eval_svm
from odc.errors import UserError
from odc.evaluation import svm, voc
from tests.evaluation.test_svm import linear_svc, problem
from tests.processes import run_processes


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=6, max_size=60)
       .filter(lambda labels: 3 <= sum(labels) <= len(labels) - 3))
def test_folds_are_those_of_scikit_learn(labels):
    folds = voc.stratified_folds(torch.tensor(labels))
    signs = np.where(labels, 1, -1)
    for fold, (_, test) in enumerate(StratifiedKFold(3).split(np.zeros(len(labels)), signs)):
        assert (folds == fold).nonzero()[:, 0].tolist() == test.tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40)
       .filter(lambda rows: any(positive for positive, _ in rows)))
def test_step_average_precision_is_that_of_scikit_learn(rows):
    """Few different scores, so that most are tied."""
    positive = torch.tensor([p for p, _ in rows])
    scores = torch.tensor([float(s) for _, s in rows])
    columns = torch.stack([scores, -scores], dim=1)
    expected = [average_precision_score(positive.numpy(), column.numpy()) for column in columns.T]
    found = voc.step_average_precision(positive, columns)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("targets, scores, expected", [
    # Precision at the hits: 1/1, 2/3, 3/6. It never rises, so the envelope is the same.
    ((1, -1, 0, 1, -1, -1, 1), (9, 8, 7.5, 7, 6, 5, 4), (1 + 2 / 3 + 1 / 2) / 3),
    ((-1, 1, 1, 0), (3, 2, 1, 9), 2 / 3),  # 1/2 then 2/3: the envelope lifts the first to 2/3
    ((1, -1), (0, 0), 1 / 2)])
def test_voc_average_precision_by_hand(targets, scores, expected):
    found = voc.voc_average_precision(torch.tensor(targets), torch.tensor(scores)[:, None])
    assert float(found) == pytest.approx(expected)


def test_voc_average_precision_of_tied_scores_is_independent_of_the_order():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 2, (60,), generator=generator)
    scores = torch.randint(0, 5, (60, 3), generator=generator).float()
    expected = voc.voc_average_precision(targets, scores)
    for _ in range(5):
        order = torch.randperm(60, generator=generator)
        assert torch.equal(voc.voc_average_precision(targets[order], scores[order]), expected)


def write_targets(folder, images=2000, classes=3, seed=0):
    """Target files as they are published, k ones and 2 k zeros a class; returns {k: [array]}."""
    generator = np.random.default_rng(seed)
    written = {}
    for k in voc.SHOTS:
        for sample in range(1, 6):
            column = np.repeat(np.array([1, 0, -1], np.int32),
                               [k, (classes - 1) * k, images - classes * k])
            array = np.stack([generator.permutation(column) for _ in range(classes)], axis=1)
            np.save(folder / f"train_targets_sample{sample}_k{k}.npy", array)
            written.setdefault(k, []).append(array)
    return written


@pytest.mark.parametrize("form", ("directory", "zip", "zip with a folder"))
def test_published_target_files(tmp_path, form):
    written, path = write_targets(tmp_path), tmp_path
    if form != "directory":
        path = tmp_path / "targets.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in tmp_path.glob("*.npy"):
                archive.write(file, f"low_shot/{file.name}" if "folder" in form else file.name)
    read = voc.read_low_shot_targets(str(path), 2000, 3)
    assert list(read) == [1, 2, 4, 8, 16, 32, 64, 96]
    for k, arrays in written.items():
        for array, targets in zip(arrays, read[k], strict=True):
            assert ((targets == 1).numpy() == (array == 1)).all()
            assert ((targets == -1).numpy() == (array == 0)).all()


def test_target_files_that_do_not_fit(tmp_path, monkeypatch):
    def refused(match, path=tmp_path, images=2000):
        with pytest.raises(UserError, match=match):
            voc.read_low_shot_targets(str(path), images, 3)

    monkeypatch.setattr(voc, "SHOTS", (1, 8))
    write_targets(tmp_path)
    refused("nothing: train_targets_sample1_k1.npy cannot be read", tmp_path / "nothing")
    refused(r"sample1_k1\.npy must be \(2001, 3\)", images=2001)
    broken = tmp_path / "train_targets_sample3_k8.npy"
    for array in (np.full((2000, 3), 7), np.load(tmp_path / "train_targets_sample3_k1.npy")):
        np.save(broken, array)
        refused("sample3_k8.npy must be .* with 8 ones, 16 zeros")
    broken.write_bytes(b"not an array")
    refused("sample3_k8.npy cannot be read")
    for array in (np.array([{"a": 1}], object), np.zeros((2000, 3), [("a", int), ("b", int)])):
        np.save(broken, array, allow_pickle=True)
        refused("sample3_k8.npy cannot be read")
    broken.unlink()
    os.mkfifo(broken)
    refused("sample3_k8.npy cannot be read .there is no such file")


def test_one_flipped_bit_in_a_zip_file_of_targets(tmp_path, monkeypatch):
    """Every byte of one entry and of the directory: a sentence, or other targets; no traceback."""
    monkeypatch.setattr(voc, "SHOTS", (1,))
    monkeypatch.setattr(voc, "SAMPLES", 1)
    write_targets(tmp_path, images=5)
    path = tmp_path / "targets.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "train_targets_sample1_k1.npy", "train_targets_sample1_k1.npy")
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
        try:
            voc.read_low_shot_targets(str(path), 5, 3)
        except UserError:
            refused += 1
    assert refused > len(whole) / 2


def test_drawn_targets(monkeypatch):
    monkeypatch.setattr(voc, "SHOTS", (1, 4, 64))
    generator = torch.Generator().manual_seed(0)
    targets = torch.where(torch.rand(300, 4, generator=generator) < 0.2, 1, -1)
    targets[:10] = 0
    drawn, again, other = (voc.draw_low_shot_targets(targets, seed) for seed in (3, 3, 4))
    assert list(drawn) == [1, 4]  # no class has 64
    for k, samples in drawn.items():
        assert len({sample.numpy().tobytes() for sample in samples}) == 5
        for sample in samples:
            assert ((sample == 1).sum(0) == k).all() and ((sample == -1).sum(0) == 19 * k).all()
            assert ((sample == 0) | (sample == targets)).all()
    assert all(torch.equal(a, b) for k in (1, 4) for a, b in zip(drawn[k], again[k]))
    assert not torch.equal(other[4][0], drawn[4][0])


def made_up(images=180):
    """Train and test features and targets with a difficult image here and there."""
    rows, targets = problem(2 * images, width=60)
    targets = targets.T.to(torch.int8)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.05] = 0
    return rows[:images], targets[:images], rows[images:], targets[images:]


def simple_voc_average_precision(targets, scores):
    """Recall steps times the best precision at that recall or a higher one."""
    pairs = sorted(zip(scores.tolist(), targets.tolist()), key=lambda pair: -pair[0])
    ranked = [target for _, target in pairs if target != 0]
    precisions = [sum(t == 1 for t in ranked[:n]) / n for n in range(1, len(ranked) + 1)]
    hits = [n for n, t in enumerate(ranked) if t == 1]
    return sum(max(precisions[n:]) for n in hits) / len(hits)


COSTS = (1.0, 100.0, 0.0625, 0.5**10)


def test_full_svm_as_the_recipe_does_it(monkeypatch):
    monkeypatch.setattr(voc, "COSTS", COSTS)
    train, train_targets, test, test_targets = made_up()
    precision, costs = voc.full_svm(train, train_targets, test, test_targets)
    expected = []
    for c in range(3):
        labels = torch.where(train_targets[:, c] == 1, 1, -1)
        means = []
        for cost in COSTS:
            scores = []
            for fit, held_out in StratifiedKFold(3).split(train, labels):
                values = linear_svc(train[fit], labels[fit], cost)[1](train[held_out])
                scores.append(average_precision_score(labels[held_out] == 1, values))
            means.append(np.mean(scores))
        assert costs[c] == COSTS[int(np.argmax(means))]
        values = linear_svc(train, labels, costs[c])[1](test)
        expected.append(simple_voc_average_precision(test_targets[:, c], values))
    assert precision.tolist() == pytest.approx(expected, abs=1e-6)


def test_low_shot_as_the_recipe_does_it(monkeypatch):
    monkeypatch.setattr(voc, "COSTS", COSTS)
    monkeypatch.setattr(voc, "SHOTS", (1, 3))
    train, train_targets, test, test_targets = made_up()
    samples = voc.draw_low_shot_targets(train_targets, seed=0)
    results = voc.low_shot(train, samples, test, test_targets)
    assert list(results) == [1, 3]
    for k, (precision, cost) in results.items():
        by_cost = np.zeros((len(COSTS), 5))
        for (s, j), c in itertools.product(np.ndindex(by_cost.shape), range(3)):
            targets = samples[k][j][:, c]
            used = targets != 0
            values = linear_svc(train[used], targets[used], COSTS[s])[1](test)
            by_cost[s, j] += simple_voc_average_precision(test_targets[:, c], values) / 3
        best = int(by_cost.mean(1).argmax())
        assert cost == COSTS[best] and precision.numpy() == pytest.approx(by_cost[best], abs=1e-6)


def test_the_first_of_equally_good_costs_is_chosen(monkeypatch):
    train, train_targets, test, test_targets = made_up()
    train_targets[train_targets == 0] = -1
    marked = (train_targets == 1).float()  # features that give the labels away: every cost scores 1
    monkeypatch.setattr(voc, "COSTS", (0.01, 10.0, 1.0))
    precision, costs = voc.full_svm(marked, train_targets, marked, train_targets)
    assert precision.tolist() == [1.0] * 3 and costs == [0.01] * 3


def both_protocols():
    data = made_up(images=90)
    samples = voc.draw_low_shot_targets(data[1], seed=0)
    precision, costs = voc.full_svm(*data)
    low = voc.low_shot(data[0], samples, *data[2:])
    return torch.cat([torch.tensor(costs), precision, *(result for result, _ in low.values())])


# 4 processes for 3 classes: one has none
@pytest.mark.parametrize("world_size", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_the_number_of_processes_changes_nothing(world_size):
    alone = both_protocols()
    for result in run_processes(both_protocols, world_size):
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-9)


def test_fits_that_did_not_converge_and_features_that_are_not_finite(monkeypatch):
    train, train_targets, test, test_targets = made_up()
    fit = svm.fit

    def without_first_cost(*arguments, **options):
        fits = fit(*arguments, **options)
        fits.errors[0] = torch.inf
        return fits

    monkeypatch.setattr(svm, "fit", without_first_cost)
    monkeypatch.setattr(voc, "SHOTS", (1,))
    samples = voc.draw_low_shot_targets(train_targets, seed=0)
    monkeypatch.setattr(voc, "COSTS", (1.0, 0.5))
    assert voc.full_svm(train, train_targets, test, test_targets)[1] == [0.5] * 3
    assert voc.low_shot(train, samples, test, test_targets)[1][1] == 0.5
    monkeypatch.setattr(voc, "COSTS", (1.0,))
    for protocol, targets in ((voc.full_svm, train_targets), (voc.low_shot, samples)):
        with pytest.raises(UserError, match="converged at any cost"):
            protocol(train, targets, test, test_targets)
    train[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        voc.full_svm(train, train_targets, test, test_targets)


def test_a_class_with_too_few_images_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for label, counts in dict(a=(9, 4), b=(9, 4), rare=(2, 2)).items():
        for folder, count in zip((tmp_path / "train" / label, tmp_path / "val" / label), counts):
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3)) + 100 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setattr(sys, "argv", ["eval_svm.py", *map(str, (
        "--weights", "random", "--arch", "narrow", "--data", tmp_path, "--image-size", 32,
        "--workers", 0, "--device", "cpu", "--output", tmp_path / "out.json"))])
    eval_svm.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert "and a val image: rare\n" in capsys.readouterr().out
    assert list(results["full"]["feature1"]["classes"]) == ["a", "b"]
    assert results["results"]["SVM"] > 70 and results["train_images"] == 20
    with pytest.raises(UserError, match="No class has 3 training images"):
        eval_svm.classes_to_judge(torch.ones(9, 1), torch.ones(3, 1), ["all"])
