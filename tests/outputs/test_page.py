"""report.html: what it says of the clusters; tests/outputs/test_browser.py opens it in a browser.
"""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from odc.clusters import Clustering
from odc.data.images import ImageSet, Names
from odc.errors import UserError
from odc.outputs import page
from tests.outputs import made_up_run
from tests.outputs.made_up_run import data_of, shown_name

SIZES = made_up_run.SIZES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run.write_run(tmp_path_factory.mktemp("made up"))


def test_clusters_of_the_page(run):
    folder, dataset, clusters = run
    data = data_of(folder)
    assert [cluster["size"] for cluster in data["clusters"]] == sorted(filter(None, SIZES))[::-1]
    for cluster in data["clusters"]:
        members = (clusters.labels == cluster["id"]).nonzero()[:, 0]
        shown = slice(cluster["first"], cluster["first"] + cluster["count"])
        order = sorted(members.tolist(), key=lambda i: -clusters.similarity[i])  # stable
        assert data["images"]["path"][shown] == [shown_name(dataset, i) for i in order]
        assert data["images"]["similarity"][shown] == pytest.approx(
            clusters.similarity[order].tolist(), abs=1e-5)
        assert data["images"]["label"][shown] == dataset.labels[order].tolist()
        assert set(data["images"]["cluster"][shown]) == {cluster["id"]}
        tightness = float(clusters.similarity[members].mean())
        assert cluster["tightness"] == pytest.approx(tightness, abs=1e-4)
        counts = dataset.labels[members].bincount(minlength=3)
        assert cluster["purity"] == pytest.approx(int(counts.max()) / len(members))
        assert cluster["main"] == int(counts.argmax())  # the first of several
        assert cluster["caption"] == (
            f"{len(members)} image{'s' * (len(members) > 1)} · tightness {tightness:.2f} · "
            f"{cluster['purity']:.0%} {made_up_run.CLASSES[cluster['main']]}")
    assert data["classes"] == made_up_run.CLASSES
    text = (folder / "report.html").read_text()
    assert f"epoch 3, step 8 · {len(dataset)} images in 9 clusters" in text


def test_nearest_clusters_and_the_map(run):
    centroids = run[2].centroids
    clusters = data_of(run[0])["clusters"]
    present = [cluster["id"] for cluster in clusters]
    for cluster in clusters:
        scores = {k: float(centroids[k] @ centroids[cluster["id"]]) for k in present}
        del scores[cluster["id"]]
        best = sorted(scores.values(), reverse=True)[: page.NEAR]
        assert [scores[k] for k in cluster["near"]] == pytest.approx(best, abs=1e-6)
    places = np.array([cluster["place"] for cluster in clusters])
    expected = PCA(2).fit_transform(centroids[present].numpy())
    expected /= np.abs(expected).max()
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=2e-3)


def test_near_duplicates_and_outliers(run):
    _, dataset, clusters = run
    data = data_of(run[0])
    number = {shown_name(dataset, i): i for i in range(len(dataset))}
    images = [number[path] for path in data["images"]["path"]]
    scores = clusters.features @ clusters.features.T
    scores[clusters.labels[:, None] != clusters.labels] = -1
    scores.fill_diagonal_(-1)
    found = [[images[n] for n in pair["images"]] for pair in data["pairs"]]
    shown = [pair["similarity"] for pair in data["pairs"]]
    assert shown == pytest.approx([float(scores[i, j]) for i, j in found], abs=1e-4)
    best, nearest = scores.max(1)
    for score, pair in zip(shown, found):  # the best one that is left, of an image and its nearest
        assert score == pytest.approx(float(best.max()), abs=1e-4)
        best[torch.isin(torch.arange(len(best)), torch.tensor(pair))] = -1
        best[torch.isin(nearest, torch.tensor(pair))] = -1
    assert len(found) == page.PAIRS
    furthest = clusters.similarity.sort().values[: page.OUTLIERS]
    assert [float(clusters.similarity[images[n]]) for n in data["outliers"]] == furthest.tolist()


def test_pairs_of_large_clusters_and_of_many_copies(monkeypatch):
    """Copies are found among the images that are about equally similar to the centroid."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(5000, 16, generator=generator))
    copies = {(0, 4999), (1100, 3), (2000, 2001)}
    for i, j in copies:
        features[j] = features[i]
    features[10:30] = features[10]  # would be 190 pairs
    monkeypatch.setattr(page, "PAIRS", 14)
    order = (features @ features[40]).argsort(descending=True, stable=True).numpy()
    pairs = page.near_duplicates(features.numpy(), [order, np.arange(0)])
    pairs = [{i, j} for score, i, j in pairs if score > 0.9999]
    assert all(set(pair) in pairs for pair in copies)
    images = [i for pair in pairs for i in pair]
    assert len(images) == len(set(images)) and set(images) & set(range(10, 30))


def test_a_large_run_shows_a_sample_of_each_cluster(run, tmp_path, monkeypatch):
    _, dataset, clusters = run
    made_up_run.write_log(tmp_path)
    monkeypatch.setattr(page, "IMAGES", 200)
    page.write_page(tmp_path, dataset, clusters)
    data = data_of(tmp_path)
    for cluster in data["clusters"]:
        assert cluster["count"] == min(cluster["size"], 200 // 9)
        members = (clusters.labels == cluster["id"]).nonzero()[:, 0].tolist()
        members.sort(key=lambda i: -clusters.similarity[i])
        paths = [shown_name(dataset, i) for i in members]
        shown = data["images"]["path"][cluster["first"] : cluster["first"] + cluster["count"]]
        assert shown == sorted(set(shown), key=paths.index)
        assert shown[:8] == paths[:8] and shown[-4:] == paths[-4:]  # both ends


def tiles(folder):
    """The pictures of a page in their order: the mean colour of the middle of each, float [n, 3].
    """
    found = []
    for code in re.findall(r"\.sheet\d+ \{.*?base64,(.*?)\)", (folder / "report.html").read_text()):
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"), float)
        side = len(sheet) // 16
        grid = sheet.reshape(16, side, 16, side, 3)[:, 4:-4, :, 4:-4]
        found.append(grid.mean((1, 3)).reshape(256, 3))
    return np.concatenate(found)


def test_every_picture_is_in_its_tile(run):
    folder, dataset, _ = run
    paths = data_of(folder)["images"]["path"]
    assert len(paths) > 256
    index = {shown_name(dataset, i): i for i in range(len(dataset))}
    expected = [(i % 256, 90, 255 - i % 256) for i in map(index.get, paths)]
    assert tiles(folder)[: len(paths)] == pytest.approx(np.array(expected), abs=12)


def test_the_page_stands_alone_and_is_safe(run):
    text = (run[0] / "report.html").read_text()
    before, data = text.split('id="data">')
    data, after = data.split("</script>", 1)
    assert "<" not in data and text.count("</script>") == 2
    code = before.replace('http-equiv="Content-Security-Policy"', "") + after
    assert not re.search("http|src=|document.title|@import|url\\((?!data:)", code)
    assert "default-src 'none'" in before and "unsafe-inline'; script" not in before
    assert f"<h1>{html.escape('<b>run & co')}</h1>" in text
    assert "{{title}}" not in text and "{{data}}.png" in text


def test_images_in_memory_and_sets_without_labels(tmp_path):
    made_up_run.write_log(tmp_path)
    pixels = np.full((len(made_up_run.images()), 8, 8), 77, np.uint8)
    dataset = ImageSet("cifar10", "train", "nowhere", pixels=pixels)
    page.write_page(tmp_path, dataset, made_up_run.clusters())
    data = data_of(tmp_path)
    assert "purity" not in data["clusters"][0] and data["classes"] == []
    assert "0" in data["images"]["path"]
    assert tiles(tmp_path)[20] == pytest.approx([77, 77, 77], abs=3)
    dataset.labels = torch.arange(len(dataset)) % 2  # and no names of classes
    assert page.contents(dataset, made_up_run.clusters())[0]["classes"] == ["class 0", "class 1"]


def test_one_cluster_of_one_image_and_an_image_that_is_gone(tmp_path):
    made_up_run.write_log(tmp_path)
    clusters = Clustering(torch.tensor([3]), torch.tensor([0.5]), torch.eye(8), torch.eye(8)[:1])
    dataset = ImageSet("a", "train", "", pixels=np.zeros((1, 9, 9, 3), np.uint8))
    page.write_page(tmp_path, dataset, clusters)
    [cluster] = data_of(tmp_path)["clusters"]
    assert cluster["near"] == [] and cluster["place"] == [0, 0]
    gone = ImageSet("folder", "train", str(tmp_path), names=Names(["gone.png"]))
    with pytest.raises(UserError, match="gone.png"):
        page.write_page(tmp_path, gone, clusters)


RECORDS = [dict(epoch=1, step=s, loss=4 - s / 100, splits=s % 3) for s in (50, 100, 150)]


@pytest.mark.parametrize("line", [
    '{"epoch": 2, "st', "no json", "[1]", "3", '{"epoch": 2}', '{"epoch": 1, "step": null}',
    '{"epoch": "<b>", "step": 9, "loss": 1}', '{"epoch": 1, "step": 1e999}', "[" * 9999,
    '{"epoch": true, "step": 9}', '{"epoch": 1, "step": ' + "9" * 5000 + "}", "\0\x85"])
def test_lines_of_the_log_that_are_no_records_are_passed_over(tmp_path, line):
    (tmp_path / "log.jsonl").write_text("\n".join([line, *map(json.dumps, RECORDS), line]))
    assert page.read_log(tmp_path / "log.jsonl") == RECORDS


def test_values_of_the_log_that_are_no_numbers_are_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"epoch": 1, "step": 2, "loss": NaN, "nmi": "<b>", "purity": [1], "ari": 0.5,'
        f' "largest": {"9" * 400}, "splits": -Infinity, "silhouette": 1e-320}}')
    page.write_page(tmp_path)
    assert data_of(tmp_path) == dict(curves=dict(ari=[[2, 0.5]], silhouette=[[2, 1e-320]]))


def test_a_long_curve_stays_short_and_keeps_its_ends():
    records = [dict(epoch=1, step=s, loss=s / 1e4) for s in range(1, 40001)]
    points = page.curves(records + RECORDS[:1])["loss"]
    assert abs(len(points) - page.POINTS) < 5
    assert points[0] == (1, 1e-4) and points[-1] == (50, 3.5)


def test_an_empty_log_and_the_page_of_a_finished_run(finished, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    page.write_page(tmp_path)
    assert "no step yet" in (tmp_path / "report.html").read_text()
    assert {"loss", "nmi", "purity", "largest"} <= data_of(finished)["curves"].keys()
    assert len(data_of(finished)["curves"]["loss"]) == 2  # the last steps of the two epochs
    assert sum(cluster["size"] for cluster in data_of(finished)["clusters"]) == 150
