"""report.html: what it says of the clusters; tests/outputs/test_browser.py opens it in a browser.
"""

import base64
import csv
import html
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from sklearn.decomposition import PCA

from odc.clusters import Clustering, cluster_images
from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, file_names
from odc.errors import UserError
from odc.memory import ODCMemory
from odc.model import ODC
from odc.outputs import duplicates, page, results
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


def test_duplicates_and_outliers_of_the_page(run):
    _, dataset, clusters = run
    data = data_of(run[0])
    index = {shown_name(dataset, i): i for i in range(len(dataset))}
    images = [index[path] for path in data["images"]["path"]]
    found = [[(images[n], *facts) for n, *facts in group] for group in data["groups"]]
    assert (found, data["least"]) == clusters.duplicates
    copies = [i for group in found for i, *_ in group[1:]]
    alone = torch.tensor([i for i in range(len(dataset)) if i not in copies])
    rows = clusters.features[alone]  # of 8 directions: none is left out
    twentieth = torch.cdist(rows, rows).sort().values[:, page.NEIGHBOUR]
    outliers = [images[n] for n in data["outliers"]]
    assert outliers == alone[twentieth.argsort(descending=True)[: page.OUTLIERS]].tolist()
    pairs = [[cluster["id"], *cluster["near"][:1]] for cluster in data["clusters"]]
    assert [cluster["nearest"] for cluster in data["clusters"]] == pytest.approx([
        float(F.cosine_similarity(*clusters.centroids[pair], dim=0)) for pair in pairs])


def pattern(n):
    """A picture of 8 x 8 random colours, smooth."""
    colours = np.random.default_rng(n).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(colours).resize((80, 60), Image.Resampling.BICUBIC)


def test_copies_are_found_and_nothing_else(tmp_path):
    """Among 40 pictures and 20 of one colour, which all have the hash 0."""
    images = tmp_path / "images"
    images.mkdir()
    for n in range(40):
        pattern(n).save(images / f"{n:02d}.png")
        Image.new("RGB", (80, 60), (n, 90, 90)).save(images / f"plain-{n // 2}.png")
    for n in range(10):
        pattern(n).resize((48, 36)).save(images / f"{n:02d} small, \xff.png")
        pattern(n).save(images / f"{n:02d}-jpeg.jpg", quality=50)
        ImageEnhance.Brightness(pattern(n)).enhance(0.8).save(images / f"{n:02d}-dark.png")
    dataset, memory = open_dataset(str(images)), ODCMemory(90, 32, 4)
    memory.labels.copy_(torch.arange(90) % 4)
    torch.manual_seed(0)
    network = ODC("narrow", True, dim=32, num_clusters=4)
    found = cluster_images(network, dataset, memory, 32)
    groups, least = duplicates.find_groups(dataset, found)
    results.write_duplicates(tmp_path / "duplicates.csv", dataset, groups, least)
    with open(tmp_path / "duplicates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["group"], row["path"][:2]) for row in rows} == {
        (str(n), name) for n, name in enumerate(dict.fromkeys(row["path"][:2] for row in rows), 1)}
    assert sorted(row["path"][:2] for row in rows) == [f"{n:02d}" for n in range(10)
                                                       for _ in range(4)]
    assert all(float(row["similarity"]) >= least for row in rows)
    for row in rows:
        size = (int(row["width"]), int(row["height"]))
        assert size == ((48, 36) if "small" in row["path"] else (80, 60))
        assert int(row["bytes"]) == (images / row["path"]).stat().st_size
    assert all("small" not in dataset.name_of(group[0][0]) for group in groups)


def test_a_chain_of_similar_images_is_not_one_group():
    """A picture that becomes another in 60 steps: all of a group are like its first image."""
    ends = [np.asarray(pattern(n), float) for n in (0, 1)]
    pixels = np.stack([ends[0] + (ends[1] - ends[0]) * t for t in np.linspace(0, 1, 60)])
    dataset = ImageSet("a", "train", "", pixels=pixels.astype(np.uint8))
    clusters = Clustering(torch.zeros(60).long(), torch.ones(60), torch.ones(1, 2),
                          F.normalize(torch.ones(60, 2)), hashes=torch.full((60,), 77))
    groups, least = duplicates.find_groups(dataset, clusters)
    assert least == 0.9 and 3 < len(groups) < 30
    for (first, *size, _, _), *others in groups:
        assert size == [80, 60, 0]
        for image, *_, similarity, _ in others:
            assert similarity > 0.9 and abs(image - first) < 20


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
    sheets = (tmp_path / "report.html").read_text().count("data:image/webp")
    made_up_run.write_log(tmp_path, '{"epoch": 4, "step": 9, "loss": 2}')
    page.write_page(tmp_path)  # new curves, the same clusters
    assert data_of(tmp_path)["curves"]["loss"][-1] == [9, 2]
    assert data_of(tmp_path)["clusters"] == data["clusters"]
    assert (tmp_path / "report.html").read_text().count("data:image/webp") == sheets > 0


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


def test_one_cluster_of_one_image_and_an_image_that_is_gone(tmp_path):
    made_up_run.write_log(tmp_path)
    clusters = Clustering(torch.tensor([3]), torch.tensor([0.5]), torch.eye(8), torch.eye(8)[:1])
    dataset = ImageSet("a", "train", "", pixels=np.zeros((1, 9, 9, 3), np.uint8))
    page.write_page(tmp_path, dataset, clusters)
    [cluster] = data_of(tmp_path)["clusters"]
    assert cluster["near"] == [] and cluster["place"] == [0, 0]
    gone = ImageSet("folder", "train", str(tmp_path), names=file_names(["gone.png"]))
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


@pytest.mark.parametrize("spread", [0, 1e-30, 1e-9, 1e-3])
def test_outliers_of_features_that_are_nearly_equal(spread):
    """As of a network that has collapsed: their main directions are hard to find in float32."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, 256, generator=generator).relu().expand(60, -1)
        rows = F.normalize(rows + spread * torch.randn(60, 256, generator=generator))
        assert len(page.far_images(rows.numpy(), [3])) == 48
