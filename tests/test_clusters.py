"""The clusters that a user gets: of the network as it is, the same as odc.assign finds again."""

import csv
import signal

import pytest
import torch
import torch.nn.functional as F

from odc import assign, clusters, distributed
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.datasets import open_dataset
from odc.model import ODC
from odc.kmeans import nearest_centroids
from odc.memory import ODCMemory
from tests.processes import run_processes, run_script
from tests.runs import SMALL, assert_equal_state, run_main, start, state_of, wait_for_step


def small_network(seed=0):
    torch.manual_seed(seed)
    return ODC("narrow", True, dim=32, num_clusters=8)


def in_turn(min_cluster_size=5):
    """A memory of 150 images with the labels 0 1 2 3 4 5 6 7 0 1 ..."""
    memory = ODCMemory(150, 32, 8, min_cluster_size=min_cluster_size)
    memory.labels.copy_(torch.arange(150) % 8)
    return memory


def clusters_of(folder, min_cluster_size=5):
    """cluster_images of a random network, from labels in turn; plain values."""
    dataset = open_dataset(str(folder))
    found = clusters.cluster_images(small_network(), dataset, in_turn(min_cluster_size), 32)
    features = distributed.all_gather_uneven_rows(found.features)
    return [found.labels, found.similarity, found.centroids, features,
            found.neck.bn1.running_mean, found.neck.bn1.running_var]


def test_statistics_features_and_labels(folder):
    labels, similarity, centroids, features, mean, var = clusters_of(folder)
    network, dataset = small_network().eval(), open_dataset(str(folder))
    transform = evaluation_transform(32)
    images = normalise(torch.stack([transform(dataset.load(i)) for i in range(len(dataset))]))
    with torch.no_grad():
        hidden = network.neck.fc1(network.backbone(images)[-1].mean((2, 3)))
        torch.testing.assert_close(mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var, hidden.var(0, correction=0), rtol=1e-3, atol=1e-5)
        network.neck.bn1.running_mean, network.neck.bn1.running_var = mean, var
        expected = F.normalize(network.neck(network.backbone(images)[-1]))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(labels, nearest_centroids(features, centroids))
    own = F.cosine_similarity(features, centroids[labels])
    torch.testing.assert_close(similarity, own, rtol=1e-5, atol=1e-6)
    assert labels.bincount(minlength=8).min() > 0


def test_any_number_of_processes_gives_the_same_clusters(folder):
    one = clusters_of(folder)
    for W in (2, 4):
        for result in run_processes(clusters_of, W, folder):
            assert torch.equal(result[0], one[0])
            for value, expected in zip(result[1:], one[1:]):
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_the_network_is_left_as_it_was(folder):
    network, before = small_network(), small_network().state_dict()
    clusters.cluster_images(network, open_dataset(str(folder)), in_turn(), 32)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("data", ["folder", "shapes"])
def test_assign_agrees_with_the_table_and_uses_every_cluster(folder, tmp_path, monkeypatch, data):
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (600, 0), "val": (100, 1)})
    images = folder if data == "folder" else "shapes"
    assert run_main("--data", images, "--output", tmp_path, *SMALL, "--epochs", "3",
                    "--num-clusters", "12") == 0
    assign.main(["--checkpoint", str(tmp_path / "checkpoint.pth"), "--data", str(images),
                 "--output", str(tmp_path / "again.csv")])
    tables = []
    for name in ("clusters.csv", "again.csv"):
        with open(tmp_path / name, newline="") as file:
            tables.append([(row["path"], int(row["cluster"])) for row in csv.DictReader(file)])
    same = sum(a == b for a, b in zip(*tables))
    assert same >= 0.99 * len(tables[0])
    assert {cluster for _, cluster in tables[1]} == set(range(12))


def test_export_only_makes_the_clusters_of_a_run_that_was_stopped(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--output", tmp_path, *SMALL]
    assert run_main(*arguments, "--epochs", "1") == 0
    for path in tmp_path.glob("*"):
        if path.is_file() and path.name not in ("checkpoint.pth", "log.jsonl"):
            path.unlink()
    assert run_main(*arguments, "--epochs", "9", "--export-only") == 0
    assert (tmp_path / "clusters.csv").exists() and (tmp_path / "report.html").exists()
    assert state_of(tmp_path)["progress"]["epoch"] == 1  # and nothing was trained


def test_a_run_goes_on_after_export_only_as_if_nothing_had_happened(folder, finished, tmp_path):
    """Even if the export had other epochs and another number of processes."""
    child = start(folder, tmp_path, "--checkpoint-interval", "1000")
    wait_for_step(child, tmp_path, 4)
    child.send_signal(signal.SIGTERM)
    assert child.wait(300) == 128 + signal.SIGTERM
    before = state_of(tmp_path)
    done = run_script("train.py", "--data", folder, "--output", tmp_path, *SMALL, "--epochs", "9",
                      "--export-only", processes=2)
    assert done.returncode == 0, done.stderr
    after = state_of(tmp_path)
    for name in ("settings", "progress", "memory"):  # and the step of the epoch
        assert_equal_state(before[name], after[name], name)
    assert before["final_clusters"] is None and after["final_clusters"] is not None
    assert start(folder, tmp_path).wait(300) == 0
    state = state_of(tmp_path)
    assert_equal_state(state["backbone"], state_of(finished)["backbone"])


def test_assign_says_what_to_do_with_a_run_that_was_stopped(folder, tmp_path, monkeypatch):
    from odc.errors import UserError
    import train

    monkeypatch.setattr(train, "cluster_after_training", lambda *_: None)
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "1") == 0
    with pytest.raises(UserError, match="--export-only"):
        assign.main(["--checkpoint", str(tmp_path / "checkpoint.pth"), "--data", str(folder)])
