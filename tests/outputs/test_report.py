"""report.html: what it says of the clusters; tests/outputs/test_page.py opens it in a browser."""

import base64
import functools
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from odc.data.images import ImageSet
from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.outputs import report
from tests.outputs import made_up_run
from tests.outputs.test_curves import polylines, svgs

SIZES = made_up_run.SIZES


def data_of(folder):  # noqa: F811
    """The data in a page."""
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run.write_run(tmp_path_factory.mktemp("made up"))


def test_clusters_of_the_page(run):
    output, dataset, clusters = run
    data = data_of(output)
    assert [cluster["size"] for cluster in data["clusters"]] == sorted(filter(None, SIZES))[::-1]
    earlier = np.bincount(np.load(output / "labels_epoch_2.npy"), minlength=len(SIZES))
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
        assert counts[cluster["main"]] == counts.max()
        assert cluster["growth"] == len(members) - earlier[cluster["id"]]
        assert cluster["caption"].startswith(f"{len(members)} image")
        assert cluster["caption"].endswith(f"{cluster['growth']:+} since epoch 2")
    assert data["classes"] == made_up_run.CLASSES and data["notes"] == []


def test_nearest_clusters_and_the_map(run):
    centroids = run[2].centroids
    clusters = data_of(run[0])["clusters"]
    present = [cluster["id"] for cluster in clusters]
    for cluster in clusters:
        scores = {k: float(centroids[k] @ centroids[cluster["id"]]) for k in present}
        del scores[cluster["id"]]
        best = sorted(scores.values(), reverse=True)[: report.NEAR]
        assert [scores[k] for k in cluster["near"]] == pytest.approx(best, abs=1e-6)
    places = np.array([cluster["place"] for cluster in clusters])
    expected = PCA(2).fit_transform(centroids[present].numpy())
    expected /= np.abs(expected).max()
    for axis in range(2):
        assert np.abs(places[:, axis]) == pytest.approx(np.abs(expected[:, axis]), abs=2e-3)


def test_near_duplicates_and_outliers(run):
    _, dataset, clusters = run
    data, paths = data_of(run[0]), data_of(run[0])["images"]["path"]
    features, N = clusters.features, len(dataset)
    number = {shown_name(dataset, i): i for i in range(N)}
    nearest = []
    for i in range(N):
        others = [j for j in range(N) if j != i and clusters.labels[j] == clusters.labels[i]]
        nearest += sorted((float(features[i] @ features[j]), i, j) for j in others)[-1:]
    expected, seen = [], set()
    for score, i, j in sorted(nearest, reverse=True):
        if not {i, j} & seen:
            expected.append((score, {i, j}))
            seen |= {i, j}
    assert len(data["pairs"]) == report.PAIRS
    for pair, (score, images) in zip(data["pairs"], expected):
        assert pair["similarity"] == pytest.approx(score, abs=1e-4)
        assert {number[paths[n]] for n in pair["images"]} == images
    furthest = sorted(range(N), key=lambda i: clusters.similarity[i])[: report.OUTLIERS]
    assert [clusters.similarity[number[paths[n]]] for n in data["outliers"]] == [
        clusters.similarity[i] for i in furthest]


def test_pairs_of_large_clusters_and_of_many_copies(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2500, 16, generator=generator))
    for i, j in ((0, 2499), (1100, 3), (2000, 2001)):
        features[j] = features[i]
    features[10:30] = features[10]  # would be 190 pairs
    monkeypatch.setattr(report, "PAIRS", 14)
    pairs = report.near_duplicates(features.numpy(), [np.arange(2500), np.arange(0)])
    pairs = [{i, j} for score, i, j in pairs if score > 0.9999]
    assert all(pair in pairs for pair in ({0, 2499}, {1100, 3}, {2000, 2001}))
    images = [i for pair in pairs for i in pair]
    assert len(images) == len(set(images)) and set(images) & set(range(10, 30))


def test_a_large_run_shows_a_sample_of_each_cluster_and_says_so(run, tmp_path, monkeypatch):
    _, dataset, clusters = run
    made_up_run.write_log(tmp_path)
    monkeypatch.setattr(report, "IMAGES", 200)
    report.save(tmp_path, dataset, clusters)
    data = data_of(tmp_path)
    counts = {cluster["size"]: cluster["count"] for cluster in data["clusters"]}
    assert counts == {size: min(size, 200 // 9) for size in SIZES if size}
    assert f"{sum(counts.values())} of {len(dataset)} images" in data["notes"][0]
    assert "growth" not in data["clusters"][0]  # without copies of earlier labels
    largest = data["clusters"][0]
    order = clusters.similarity[:150].argsort(descending=True, stable=True).tolist()
    shown = data["images"]["path"][: largest["count"]]
    assert shown[:8] == [shown_name(dataset, i) for i in order[:8]]
    assert shown[-4:] == [shown_name(dataset, i) for i in order[-4:]]
    names = [shown_name(dataset, i) for i in range(150)]
    ranks = [order.index(names.index(path)) for path in shown]
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("count", [4, 5, 11, 12, 13, 30])
@pytest.mark.parametrize("size", [1, 12, 13, 31, 1000])
def test_samples(count, size):
    images = list(range(size))
    drawn = report.sample(images, count)
    assert len(drawn) == min(count, size) and drawn == sorted(set(drawn))
    assert drawn[0] == 0 and drawn[-1] == size - 1
    assert report.sample(images, size) == images


def shown_name(dataset, i):
    return dataset.name_of(i).encode("utf-8", "replace").decode()


@functools.cache
def sheet(folder, n):  # noqa: F811
    """The n-th sprite sheet of a page, decoded."""
    page = (folder / "report.html").read_text()
    code = re.search(rf"\.sheet{n} \{{.*?base64,(.*?)\)", page)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"), float)


def tile(folder, n):  # noqa: F811
    """The n-th picture of a page: the mean of its middle."""
    pixels = sheet(folder, n // 256)
    side = len(pixels) // 16
    x, y = n % 16 * side, n % 256 // 16 * side
    return pixels[y + 4 : y + side - 4, x + 4 : x + side - 4].mean((0, 1))


def test_every_picture_is_in_its_tile(run):
    output, dataset, _ = run
    paths = data_of(output)["images"]["path"]
    assert len(paths) > 256
    index = {shown_name(dataset, i): i for i in range(len(dataset))}
    for n, path in enumerate(paths):
        i = index[path]
        assert tile(output, n) == pytest.approx([i % 256, 90, 255 - i % 256], abs=12)


def test_the_page_stands_alone_and_is_safe(run):
    page = (run[0] / "report.html").read_text()
    before, data = page.split('id="data">')
    data, after = data.split("</script>", 1)
    assert "<" not in data and page.count("</script>") == 2
    code = before.replace('http-equiv="Content-Security-Policy"', "") + after
    assert not re.search("http|src=|document.title|@import|url\\((?!data:)", code)
    assert "default-src 'none'" in before
    assert f"<h1>{html.escape('<b>run & co')}</h1>" in page
    assert "{{title}}" not in page and "{{data}}.png" in page


def test_unreadable_images_are_left_out(tmp_path):
    output, dataset, clusters = made_up_run.write_run(tmp_path, unreadable={0, 200})
    data = data_of(output)
    assert "2 images cannot be read" in data["notes"][0]
    assert not {shown_name(dataset, 0), shown_name(dataset, 200)} & set(data["images"]["path"])
    assert data["clusters"][0]["size"] == SIZES[0] - 1


def test_images_in_memory_and_sets_without_labels(tmp_path):
    made_up_run.write_log(tmp_path)
    pixels = np.full((len(made_up_run.images()), 8, 8), 77, np.uint8)
    dataset = ImageSet("cifar10", "train", "nowhere", pixels=pixels)
    clusters = made_up_run.clusters()
    clusters.features = None
    report.save(tmp_path, dataset, clusters)
    data = data_of(tmp_path)
    assert "purity" not in data["clusters"][0] and data["classes"] == [] and data["pairs"] == []
    assert "features.npy is missing" in data["notes"][0] and "0" in data["images"]["path"]
    assert tile(tmp_path, 20) == pytest.approx([77, 77, 77], abs=3)
    dataset.labels = torch.arange(len(dataset)) % 2  # and no names of classes
    report.save(tmp_path, dataset, clusters)
    assert data_of(tmp_path)["classes"] == ["class 0", "class 1"]


def test_a_page_of_one_cluster_and_one_image(tmp_path):
    made_up_run.write_log(tmp_path)
    clusters = made_up_run.clusters()
    clusters.labels, clusters.similarity = torch.tensor([3]), torch.tensor([0.5])
    clusters.features = clusters.features[:1]
    report.save(tmp_path, ImageSet("a", "train", "", pixels=np.zeros((1, 9, 9, 3), np.uint8)),
                clusters)
    [cluster] = data_of(tmp_path)["clusters"]
    assert cluster["near"] == [] and cluster["place"] == [0, 0]


# --- made from what a run has left ---------------------------------------------------------------


def rebuilt(run, tmp_path, *arguments):
    """The data of the page that the command makes in a copy of a run's folder."""
    output = tmp_path / run[0].name
    shutil.copytree(run[0], output)
    (output / "report.html").unlink()
    report.main([str(output), *map(str, arguments)])
    return output


def without_text(data):
    return {name: value for name, value in data.items() if name != "notes"}


def test_the_page_of_a_run_can_be_made_again(finished, tmp_path, capsys):  # noqa: F811
    page = (finished / "report.html").read_text()
    assert {"Loss", "Clusters against classes", "Cluster sizes"} <= svgs(page).keys()
    assert len(polylines(svgs(page)["Loss"])[0]) == 20
    output = rebuilt([finished], tmp_path)
    assert str(output / "report.html") in capsys.readouterr().out
    before, after = data_of(finished), data_of(output)
    assert before["clusters"] == after["clusters"] and after["pictures"]
    assert sum(cluster["size"] for cluster in after["clusters"]) == 150


def test_the_page_of_a_run_that_went_on_says_of_when_its_clusters_are(finished, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    with open(output / "log.jsonl", "a") as log:
        log.write(json.dumps(dict(epoch=3, step=25, loss=1.0)) + "\n")
    np.save(output / "labels_epoch_best.npy", np.zeros(150, np.int64))  # a user's own
    report.main([str(output)])
    page = (output / "report.html").read_text()
    assert "epoch 2, step 20" in page and "epoch 3, step 25" not in page
    assert "since epoch 1" in page


@pytest.mark.parametrize("name", ["centroids.npy", "features.npy"])
def test_an_empty_file_of_a_run(finished, tmp_path, name):  # noqa: F811
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(UserError, match="not what one run of train.py wrote"):
        report.main([str(tmp_path / "run")])


def test_the_page_says_why_there_are_no_pictures(run, tmp_path, capsys):
    output = rebuilt(run, tmp_path)  # no checkpoint.pth that says where the images are
    data = data_of(output)
    assert not data["pictures"] and "checkpoint.pth is missing" in data["notes"][0]
    assert "--data" in data["notes"][0] and data["notes"][0][-20:-1] in capsys.readouterr().out
    assert ".sheet0" not in (output / "report.html").read_text()
    assert data["images"]["path"] == data_of(run[0])["images"]["path"]  # in their order, with names
    shutil.rmtree(output)
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    notes = data_of(rebuilt(run, tmp_path, "--data", tmp_path))["notes"]
    assert "other images" in notes[0] and str(tmp_path) in notes[0]


def test_images_where_they_are_now(tmp_path):
    dataset = made_up_run.write_images(tmp_path / "images", made_up_run.images())
    found = open_dataset(str(tmp_path / "images"))
    clusters = made_up_run.clusters()
    made_up_run.write_log(tmp_path / "run")
    made_up_run.write_clusters(tmp_path / "run", found, clusters, {5})
    report.main([str(tmp_path / "run"), "--data", str(tmp_path / "images")])
    data = data_of(tmp_path / "run")
    assert data["pictures"] and "1 images cannot" in data["notes"][0] and len(dataset) == len(found)


def test_files_that_are_gone_and_files_that_are_not_images(run, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(run[1].root, root)
    for path in root.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.warns(UserWarning, match="cannot be read"):
        made_up_run.write_log(tmp_path / "run")
        found = open_dataset(str(root))
        made_up_run.write_clusters(tmp_path / "run", found, run[2])
        report.main([str(tmp_path / "run"), "--data", str(root)])
    data = data_of(tmp_path / "run")
    assert not data["pictures"] and "in a row cannot be read" in data["notes"][-1]


def test_a_page_of_curves_alone(tmp_path, capsys):
    made_up_run.write_log(tmp_path)
    report.main([str(tmp_path)])
    assert "clusters.csv is missing" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert list(svgs(page)) == ["Loss"] and "epoch 3, step 8" in page and data_of(tmp_path) == {}
    (tmp_path / "log.jsonl").write_text("")
    report.main([str(tmp_path)])
    assert "no step yet" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="nowhere"):
        report.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("table", ["path,cluster,similarity\na.png,cat,0.5\n", "a\n1\n", "",
                                   "path,cluster,similarity\n"])
def test_another_table_is_refused(run, tmp_path, table):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "clusters.csv").write_text(table)
    with pytest.raises(UserError, match="clusters.csv, .* are not what one run of train.py wrote"):
        report.main([str(tmp_path / "run")])
