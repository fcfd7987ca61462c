"""Options of train.py around the method: accuracy while training, ablations, TensorBoard."""

import math

import pytest
import torch

import train
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.model import ResNet
from tests.runs import SMALL, assert_same_run, log_of, run_main, state_of

# --- accuracy while training ---------------------------------------------------------------------


def pooled_features(state, dataset):
    backbone = ResNet("narrow", small_stem=True)
    backbone.load_state_dict(state["backbone"])
    backbone.eval()
    transform = evaluation_transform(32)
    with torch.no_grad():
        rows = [backbone(normalise(transform(dataset.load(i))[None]))[-1].mean((2, 3))[0]
                for i in range(len(dataset))]
    return torch.nn.functional.normalize(torch.stack(rows))


def accuracy_by_voting(bank, bank_labels, queries, query_labels):
    """20 neighbours, each with weight exp(similarity / 0.07)."""
    hits = 0
    for query, label in zip(queries, query_labels.tolist()):
        similarity, nearest = (bank @ query).topk(20)
        votes = [0.0] * 10
        for s, i in zip(similarity.tolist(), nearest.tolist()):
            votes[bank_labels[i]] += math.exp(s / 0.07)
        hits += votes.index(max(votes)) == label
    return hits / len(queries)


def test_every_tenth_image_is_held_out_without_a_val_split(folder, tmp_path, capsys):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2") == 0
    records = [record for record in log_of(tmp_path) if "knn_accuracy" in record]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    out = capsys.readouterr().out
    assert "every 10th training image" in out and "epoch 2: nearest-neighbour accuracy" in out

    state, dataset = state_of(tmp_path), open_dataset(str(folder))
    features, held_out = pooled_features(state, dataset), torch.arange(150) % 10 == 0
    expected = accuracy_by_voting(features[~held_out], dataset.labels[~held_out],
                                  features[held_out], dataset.labels[held_out])
    assert records[-1]["knn_accuracy"] == pytest.approx(expected, abs=1e-9)


# --- ablations -----------------------------------------------------------------------------------


def test_a_run_without_handling_small_clusters(folder, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2",
                    "--num-clusters", "40", "--min-cluster-size", "0",
                    "--reweight-power", "0") == 0
    steps = [record for record in log_of(tmp_path) if "loss" in record]
    assert all(record["splits"] == 0 for record in steps) and steps[-1]["smallest"] < 2


WAYS = {
    "alternating": ["--recluster-interval", "2", "--memory-momentum", "0", "--epochs", "5",
                    "--checkpoint-interval", "3"],
    "as small sets": ["--initial", "pixels", "--recluster-interval", "2", "--memory-momentum",
                      "0.1", "--epochs", "3", "--checkpoint-interval", "4"]}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """{way: the output of a run in epochs of 10 steps, never interrupted}."""
    outputs = {way: tmp_path_factory.mktemp("whole") for way in WAYS}
    for way, output in outputs.items():
        assert run_main("--data", folder, "--output", output, *SMALL, *WAYS[way]) == 0
    return outputs


def test_labels_stay_between_two_clusterings(whole):
    """K-means comes after steps 20 and 40."""
    records = log_of(whole["alternating"])
    assert all(r["change_ratio"] == 0 and r["splits"] == 0 for r in records if "loss" in r)
    before = [r["nmi_previous"] for r in records if "nmi_previous" in r]
    assert before[0] == before[1] == before[3] == 1 and max(before[2], before[4]) < 1
    # Before the first epoch, after each epoch, and for the final clusters.
    assert [r["epoch"] for r in records if "nmi" in r] == [0, 1, 2, 3, 4, 5, 5]
    # The memory holds the features that k-means saw before epoch 5, not moved by its steps.
    memory = state_of(whole["alternating"])["memory"]
    for k in range(8):
        mean = memory["features"][memory["labels"] == k].mean(0)
        assert torch.allclose(memory["centroids"][k], mean, atol=1e-6)


@pytest.mark.parametrize("way, function, step", [
    ("alternating", "measure", 20), ("alternating", "train_epoch", 20),  # before and after k-means
    ("alternating", "check_step", 24), ("as small sets", "check_step", 10),
    ("as small sets", "check_step", 15), ("as small sets", "measure", 20)])
def test_re_clustering_resumes_as_the_same_run(
        folder, whole, tmp_path, monkeypatch, way, function, step):
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, *WAYS[way]]
    original = getattr(train, function)

    def crash(args, state, *rest):
        if getattr(state, "progress", state).global_step == step:
            raise UserError("stopped here.")
        return original(args, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, function, crash)
        assert run_main(*arguments) == 2
    assert run_main(*arguments) == 0
    assert_same_run(whole[way], tmp_path)


@pytest.mark.parametrize("stability, epochs", [(0, 2), (2, 1)])  # that of the pixels is 1
def test_labels_of_pixels_stay(folder, tmp_path, monkeypatch, stability, epochs):
    """Then they move, after two epochs in any case. The learning rate drops near the end."""
    monkeypatch.setattr("train.LOG_INTERVAL", 1)
    monkeypatch.setattr("train.stabilities", lambda *given: [stability] * len(given[2]) + [1])
    arguments = ["--data", folder, "--output", tmp_path]
    assert run_main(*arguments, *SMALL, *WAYS["as small sets"]) == 0
    steps = [record for record in log_of(tmp_path) if "loss" in record]
    changes = [record["change_ratio"] for record in steps]
    assert max(changes[: 10 * epochs]) == 0 and max(changes[10 * epochs: 10 * epochs + 10]) > 0
    rates = [record["lr"] for record in steps]
    assert rates == [0.05] * 28 + [0.4 * 0.05] * 2
    assert "nmi" in log_of(tmp_path)[-1]
    assert run_main(*arguments, "--epochs", 4) == 0  # one more epoch
    assert [record["lr"] for record in log_of(tmp_path) if "loss" in record][30] == 0.05


# --- what else a run writes ----------------------------------------------------------------------


def test_tensorboard_holds_the_log(folder, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--tensorboard"]
    assert run_main(*arguments, "--epochs", "1") == 0
    assert run_main(*arguments, "--epochs", "2") == 0
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "change_ratio", "nmi", "largest", "splits"):
        logged = [(record["step"], record[name]) for record in log_of(tmp_path) if name in record]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        values = [value for _, value in logged]
        assert [value for _, value in shown] == pytest.approx(values, rel=1e-5)
