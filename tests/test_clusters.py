"""The clusters that a user gets: of the network as it is, the same as odc.assign finds again."""

import csv
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import resized_crop

from odc import assign, clusters, distributed
from odc.data.augmentation import normalise, whole_image
from odc.data.datasets import open_dataset
from odc.model import ODC
from odc.kmeans import nearest_centroids
from odc.memory import ODCMemory
from tests.processes import run_processes, run_script
from tests.runs import SMALL, assert_equal_state, run_main, start, state_of, wait_for_step


def small_network():
    torch.manual_seed(0)
    return ODC("narrow", True, dim=32, num_clusters=8)


def clusters_of(folder):
    """cluster_images of a random network, from the labels 0 1 2 3 4 5 6 7 0 1 ...; plain values."""
    dataset, memory = open_dataset(str(folder)), ODCMemory(150, 32, 8, min_cluster_size=5)
    memory.labels.copy_(torch.arange(150) % 8)
    network, before = small_network(), small_network().state_dict()
    found = clusters.cluster_images(network, dataset, memory, 32)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    features = distributed.all_gather_uneven_rows(found.features)
    return [found.labels, found.similarity, found.centroids, features,
            found.neck.bn1.running_mean, found.neck.bn1.running_var, found.hashes]


def test_statistics_features_and_labels(folder):
    labels, similarity, centroids, features, mean, var, hashes = clusters_of(folder)
    network, dataset = small_network().eval(), open_dataset(str(folder))
    images = normalise(torch.stack([whole_image(dataset.load(i), 32) for i in range(150)]))
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
    assert labels.bincount(minlength=8).min() >= 5
    gray = F.adaptive_avg_pool2d(images.mean(1), (8, 9))  # row by row, the lowest bit first
    bits = (hashes[:, None] >> torch.arange(64)) & 1
    assert torch.equal(bits.bool(), (gray[:, :, 1:] - gray[:, :, :-1] > 1 / 64).flatten(1))


def test_parts_are_corners_and_middle():
    backbone, images = small_network().eval().backbone, torch.rand(2, 3, 32, 32)
    views = [images] + [resized_crop(images, top, left, 24, 24, [32, 32], antialias=False)
                        for top, left in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
    expected = sum(backbone(view)[-1].mean((2, 3)) for view in views) / 6
    torch.testing.assert_close(clusters.average_maps(backbone, images, True), expected)


def test_any_number_of_processes_gives_the_same_clusters(folder):
    one = clusters_of(folder)
    for W in (2, 4):
        for result in run_processes(clusters_of, W, folder):
            assert torch.equal(result[0], one[0])
            for value, expected in zip(result[1:], one[1:]):
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def table(path):
    """{path: cluster} of a table."""
    with open(path, newline="") as file:
        return {row["path"]: int(row["cluster"]) for row in csv.DictReader(file)}


def test_assign_agrees_with_the_table_and_copies_are_in_one_cluster(tmp_path):
    """200 images and 201 copies of one, in the run's table and in that of odc.assign."""
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (201, 4, 4, 3), dtype=np.uint8)
    for i in range(401):
        image = Image.fromarray(pixels[min(i, 200)]).resize((36, 36))
        image.save(images / f"{7 * i % 401:03d}-{i >= 200}.png")
    assert run_main("--data", images, "--output", run, *SMALL, "--epochs", "2") == 0
    written = table(run / "clusters.csv")
    assign.main(["--checkpoint", str(run / "checkpoint.pth"), "--data", str(images),
                 "--output", str(run / "again.csv"), "--device", "cpu"])
    assert written == table(run / "again.csv")
    assert len({cluster for path, cluster in written.items() if "True" in path}) == 1


@pytest.mark.parametrize("different", [60, 9])
def test_a_group_without_spread_is_not_split(folder, monkeypatch, capsys, different):
    """Copies that lie in four clusters of the memory, with features that differ by rounding."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.rand(150, 128 + 64, generator=generator)
    pooled[different:] = pooled[-1] * (1 + 1e-6 * torch.randn(150 - different, 1,
                                                              generator=generator))
    monkeypatch.setattr(clusters, "extract", lambda *_, **__: pooled.clone())
    memory = ODCMemory(150, 32, 8, min_cluster_size=5)
    memory.labels.copy_(torch.arange(150) % 4 + 4 * (torch.arange(150) >= different))
    network = small_network()
    found = clusters.cluster_images(network, open_dataset(str(folder)), memory, 32)
    assert len(found.labels[different:].unique()) == 1
    empty = 8 - len(found.labels.unique())
    assert (f"{empty} of 8 clusters are empty" in capsys.readouterr().out) == (different < 60)
    assert torch.equal(found.labels, nearest_centroids(found.features, found.centroids))
    new = torch.cat([torch.eye(32), torch.zeros(1, 32)])  # features that no training image had
    assert torch.isin(nearest_centroids(new, found.centroids), found.labels).all()


def test_no_epochs_make_the_clusters_of_a_run_that_was_stopped(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--output", tmp_path, *SMALL]
    assert run_main(*arguments, "--epochs", "1") == 0
    for path in tmp_path.glob("*"):
        if path.is_file() and path.name not in ("checkpoint.pth", "log.jsonl"):
            path.unlink()
    assert run_main(*arguments, "--epochs", "0") == 0
    assert (tmp_path / "clusters.csv").exists() and (tmp_path / "report.html").exists()
    assert state_of(tmp_path)["progress"]["epoch"] == 1  # and nothing was trained


def test_a_run_goes_on_after_no_epochs_as_if_nothing_had_happened(folder, finished, tmp_path):
    """Even if another number of processes wrote its files."""
    child = start(folder, tmp_path, "--checkpoint-interval", "1000")
    wait_for_step(child, tmp_path, 4)
    child.send_signal(signal.SIGTERM)
    assert child.wait(300) == 128 + signal.SIGTERM
    before = state_of(tmp_path)
    done = run_script("train.py", "--data", folder, "--output", tmp_path, *SMALL, "--epochs", "0",
                      processes=2)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr  # of a library
    after = state_of(tmp_path)
    for name in ("settings", "progress", "memory"):  # and the step of the epoch
        assert_equal_state(before[name], after[name], name)
    assert before["final_clusters"] is None and after["final_clusters"] is not None
    assert start(folder, tmp_path).wait(300) == 0
    state = state_of(tmp_path)
    assert_equal_state(state["backbone"], state_of(finished)["backbone"])
