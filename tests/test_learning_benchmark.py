"""The comparison of methods: its probe, its made-up sets, and a small table from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from odc import settings
from odc.data.datasets import open_dataset
from odc.evaluation import metrics
from tests.benchmarks.learning import __main__ as learning
from tests.benchmarks.learning import data, methods, scores

SMALL = "--num-clusters 6 --min-cluster-size 3 --batch-size 16"


@pytest.fixture
def folder(tmp_path):
    """90 training and 30 held-out images of three colours."""
    generator = np.random.default_rng(0)
    for split, count in ("train", 30), ("val", 10):
        for k, name in enumerate(("red", "green", "blue")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[:, :, k] += 150
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def test_the_linear_probe_is_the_logistic_regression_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=generator)
    labels = torch.randint(4, (700,), generator=generator)
    rows = 3 * (centres[labels] + 1.5 * torch.randn(700, 12, generator=generator)) + 5
    scaler = StandardScaler().fit(rows[:400])
    model = LogisticRegression(C=1 / (400 * 1e-3), max_iter=1000)  # it sums where ours has a mean
    model.fit(scaler.transform(rows[:400]), labels[:400])
    expected = model.score(scaler.transform(rows[400:]), labels[400:])
    accuracy = scores.probe_accuracy(rows[:400], labels[:400], rows[400:], labels[400:], 4)
    assert accuracy == pytest.approx(expected, abs=0.004)  # one of 300


def test_half_whitened_rows_have_the_cosines_of_the_inverse_root_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 5, generator=generator) * torch.tensor([9.0, 3, 1, 0.3, 0])
    rows = (rows - rows.mean(0)) @ torch.randn(5, 5, generator=generator)
    x, covariance = rows.double().numpy(), np.cov(rows.double().numpy().T)
    root = sqrtm(np.linalg.pinv(covariance, rcond=1e-6)).real  # of four directions
    products = x @ root @ x.T
    expected = products / np.sqrt(np.outer(products.diagonal(), products.diagonal()))
    half = scores.half_whitened(rows)
    assert half.shape == (300, 4)
    np.testing.assert_allclose(half @ half.T, expected, atol=1e-3)


def test_a_table_from_end_to_end_and_its_rows_are_not_made_again(folder, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--data", "photographs", "--photographs", str(folder),
                 "--seeds", "1", "--images", "180", "--device", "cpu", "--train-arguments", SMALL,
                 "--only", "pixels", "pca", "random", "odc", "labels"]
    learning.main(arguments)
    rows = learning.Rows(tmp_path / "rows.jsonl").read()
    assert [row["method"] for row in rows] == ["pixels", "pca", "random", "odc", "labels"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["pixels"]["knn"] == by_method["pixels"]["probe"] == 1  # one colour a class
    assert by_method["odc"]["crops"] == by_method["labels"]["crops"] == 180
    run = tmp_path / "photographs-0" / "odc"
    images = open_dataset(str(folder), "train")
    clusters = torch.from_numpy(np.load(run / "labels.npy"))
    assert by_method["odc"]["nmi"] == pytest.approx(metrics.nmi(clusters, images.labels))
    assert by_method["pixels"]["few_accuracy"] == by_method["pixels"]["spectral_nmi"] == 1

    shown = capsys.readouterr().out
    before = (tmp_path / "rows.jsonl").read_text()
    learning.main(arguments)
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert "| ODC |" in (again := capsys.readouterr().out) and again in shown
    with pytest.raises(SystemExit, match="other --images"):
        learning.main([*arguments, "--images", "90"])


@pytest.mark.parametrize("name, steps", [
    ("labels", 12), ("swav", 4), ("emp-ssl", 2), ("simsiam", 6), ("byol", 6), ("vicreg", 6)])
def test_a_peer_sees_as_many_crops_as_odc_and_its_loss_reaches_the_backbone(
        name, steps, folder, monkeypatch):
    method, done = learning.PEERS[name], []
    forward = method.forward
    monkeypatch.setattr(method, "forward", lambda *a: done.append(a[-1]) or forward(*a))
    images = open_dataset(str(folder), "train")
    args = settings.parse([*SMALL.split(), "--epochs", "2", "--image-size", "8"])
    settings.resolve_defaults(args, images, None, torch.device("cpu"))
    backbone = methods.train(method, args, images, torch.device("cpu"))
    assert done == list(range(steps)) and not backbone.training
    assert all(weight.grad.abs().sum() > 0 for weight in backbone.parameters())
    side = 2 if name == "emp-ssl" else 1  # enlarged, as the patches were
    assert backbone(torch.randn(2, 3, 8, 8))[-1].shape[2:] == (side, side)


def loss_of(peer, views):
    """The loss of a peer without a projection, of these features of the crops."""
    backbone = torch.nn.Linear(1, 1)
    backbone.out_channels = [128]
    peer = peer(backbone, num_clusters=6, num_classes=6, steps=10)
    peer.projection = torch.nn.Identity()
    return peer(lambda network: views, None, 0)


@pytest.mark.parametrize("name", ["vicreg", "swav", "emp-ssl"])
def test_a_loss_is_low_for_like_views_of_unlike_images(name):
    torch.manual_seed(0)
    z, same = torch.randn(32, 128), torch.ones(32, 128)
    views = (z, z), (z, z.roll(1, 0)), (same, same)
    low, unlike_views, like_images = (loss_of(learning.PEERS[name], pair) for pair in views)
    assert low < unlike_views and low < like_images


def test_a_view_is_drawn_for_each_image_and_again_for_the_second(folder):
    images = open_dataset(str(folder), "train")
    crops = methods.Crops(1, 0.5, (0.2, 0.2)), methods.Crops(2)
    views = methods.Views(images, methods.AUGMENTATIONS["recipe"], 8, 5, crops, steps=3, seed=0)
    ((small, small_draws), (pixels, draws)), labels = views[1]
    assert len(views) == 3 and pixels.shape == (10, 3, 8, 8) and draws.shape == (10, 15)
    assert labels.shape == (5,) and not (draws[:5] == draws[5:]).all(dim=1).any()
    assert small.shape == (5, 3, 4, 4) and small_draws[:, 2:4].prod(1).max() <= 16
    assert torch.equal(views[1][0][0][0], small) and torch.equal(views[1][0][1][1], draws)
    colour = pixels.float().mean((2, 3)).argmax(1)  # blue 0, green 1, red 2 are the classes
    assert colour.tolist() == (2 - labels).tolist() * 2


def test_a_crop_of_a_photograph_lies_in_one_band():
    starts = range(0, 600 - data.CROP, data.STRIDE)
    inside = [x for x in starts if data.split_of(x) == data.split_of(x + data.CROP - 1)]
    assert {data.split_of(column) for x in inside if data.split_of(x) == "val"
            for column in range(x, x + data.CROP)} == {"val"}
    assert inside[:9] == [0, 16, 32, 48, 64, 80, 112, 128, 160]
