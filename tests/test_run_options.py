"""Options of train.py around the method: accuracy while training, ablations, TensorBoard."""

import math

import pytest
import torch

import train
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.evaluation import knn
from odc.memory import ODCMemory
from odc.model import ResNet
from odc.runtime import checkpoint
from tests.runs import (
    SMALL, assert_equal_state, assert_same_run, log_of, run_main, state_of)

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


def link_split(folder, target, wanted):
    for number, path in enumerate(sorted(folder.glob("*/*"))):
        if wanted(number):
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            (target / path.parent.name / path.name).symlink_to(path)


def test_the_val_split_is_held_out_if_there_is_one(folder, tmp_path):
    link_split(folder, tmp_path / "data" / "train", lambda number: number % 3)
    link_split(folder, tmp_path / "data" / "val", lambda number: number % 3 == 0)
    output = tmp_path / "out"
    arguments = ["--data", tmp_path / "data", "--output", output, *SMALL]
    assert run_main(*arguments, "--epochs", "2") == 0
    assert [record["epoch"] for record in log_of(output) if "knn_accuracy" in record] == [0, 1, 2]
    state = checkpoint.read_dict(output / "checkpoint.pth")
    sets = [open_dataset(str(tmp_path / "data"), split) for split in ("train", "val")]
    backbone = ResNet("narrow", small_stem=True)
    backbone.load_state_dict(state["backbone"])
    with torch.no_grad():
        accuracy = knn.knn_accuracy(backbone.eval(), *sets, 32, torch.device("cpu"))
    (bank, queries) = (pooled_features(state, dataset) for dataset in sets)
    expected = accuracy_by_voting(bank, sets[0].labels, queries, sets[1].labels)
    assert accuracy == pytest.approx(expected, abs=1e-9)


# --- ablations -----------------------------------------------------------------------------------


def test_clusters_may_be_empty_without_the_handling_of_small_ones():
    memory = ODCMemory(30, 4, num_clusters=5, min_cluster_size=0)
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    memory.initialize(features, torch.arange(30) % 3)
    before = memory.state_dict()
    assert memory.cluster_sizes.tolist() == [10, 10, 10, 0, 0]
    assert memory.split_small_clusters() == 0
    assert_equal_state(memory.state_dict(), before)
    weights = memory.loss_weights(0.5)
    assert torch.isfinite(weights).all() and float(weights.sum()) == pytest.approx(1)
    assert torch.equal(memory.loss_weights(0.0), torch.full((5,), 0.2))


def test_a_run_without_handling_small_clusters(folder, tmp_path):
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "2",
                    "--num-clusters", "40", "--min-cluster-size", "0",
                    "--reweight-power", "0") == 0
    steps = [record for record in log_of(tmp_path) if "loss" in record]
    assert all(record["splits"] == 0 for record in steps) and steps[-1]["smallest"] < 2


RECLUSTER = ["--recluster-interval", "2", "--offline-epochs", "5", "--checkpoint-interval", "3"]


@pytest.fixture(scope="module")
def alternating(folder, tmp_path_factory):
    """A run of 5 epochs of 10 steps, with k-means after steps 20 and 40, never interrupted."""
    output = tmp_path_factory.mktemp("alternating")
    assert run_main("--data", folder, "--output", output, *SMALL, "--epochs", "5", *RECLUSTER) == 0
    return output


def test_labels_stay_between_two_clusterings(alternating):
    records = log_of(alternating)
    assert all(r["change_ratio"] == 0 and r["splits"] == 0 for r in records if "loss" in r)
    before = [r["nmi_previous"] for r in records if "nmi_previous" in r]
    assert before[0] == before[1] == before[3] == 1 and max(before[2], before[4]) < 1
    # Before the first epoch, after each epoch, and for the final clusters.
    assert [r["epoch"] for r in records if "nmi" in r] == [0, 1, 2, 3, 4, 5, 5]
    # The memory holds the features that k-means saw before epoch 5, not moved by its steps.
    memory = state_of(alternating)["memory"]
    for k in range(8):
        mean = memory["features"][memory["labels"] == k].mean(0)
        assert torch.allclose(memory["centroids"][k], mean, atol=1e-6)


@pytest.mark.parametrize("crash", [20, 24, 40])
def test_re_clustering_resumes_as_the_same_run(folder, alternating, tmp_path, monkeypatch, crash):
    """K-means comes after steps 20 and 40. The run continues from steps 18, 24 and 39."""
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--epochs", "5", *RECLUSTER]
    check_step, measure = train.check_step, train.measure

    def crash_within(args, progress, *rest):
        if progress.global_step == crash and progress.step:
            raise UserError("stopped here.")
        return check_step(args, progress, *rest)

    def crash_at_the_end(args, state, *rest):
        if state.progress.global_step == crash:
            raise UserError("stopped here.")
        measure(args, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "check_step", crash_within)
        patch.setattr(train, "measure", crash_at_the_end)
        assert run_main(*arguments) == 2
    assert run_main(*arguments) == 0
    assert_same_run(alternating, tmp_path)


def test_a_crash_right_after_a_clustering(folder, alternating, tmp_path, monkeypatch):
    arguments = ["--data", folder, "--output", tmp_path, *SMALL, "--epochs", "5", *RECLUSTER]
    train_epoch = train.train_epoch

    def crashing(args, state, *rest):
        if state.progress.epoch == 2:
            raise UserError("stopped here.")
        train_epoch(args, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", crashing)
        assert run_main(*arguments) == 2
    assert run_main(*arguments) == 0
    assert_same_run(alternating, tmp_path)


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
