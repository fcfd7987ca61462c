"""clusters.png: which clusters and which images it shows."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from odc.clusters import Clustering
from odc.data.images import ImageSet, Names
from odc.outputs import gallery
from tests.runs import SMALL, run_main


def some_clusters(N=400, K=20, seed=0):
    """Clusters of uneven sizes, the last one empty, and classes of the images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K - 1, (N,), generator=generator) ** 2 // (K - 1)
    similarity = torch.rand(N, generator=generator)
    classes = torch.randint(5, (N,), generator=generator)
    return Clustering(labels, similarity, torch.zeros(K, 2), torch.zeros(N, 2)), classes


def of_labels(labels, K):
    """Clusters with all similarities 1."""
    labels = torch.as_tensor(labels)
    N = len(labels)
    return Clustering(labels, torch.ones(N), torch.zeros(K, 2), torch.zeros(N, 2))


@pytest.mark.parametrize("unreadable", [(), {3, 77, 200, 201}])
def test_description_of_clusters(unreadable):
    clusters, classes = some_clusters()
    described = gallery.describe(clusters, classes, unreadable)
    for k in range(20):
        members = [i for i in range(400) if clusters.labels[i] == k and i not in unreadable]
        order = sorted(members, key=lambda i: -clusters.similarity[i])
        assert described.members[k].tolist() == order and described.sizes[k] == len(members)
        if members:
            mean = float(clusters.similarity[members].mean())
            assert float(described.tightness[k]) == pytest.approx(mean, abs=1e-6)
            counts = Counter(classes[members].tolist())
            most = max(counts.values())
            assert float(described.purity[k]) == pytest.approx(most / len(members))
            assert described.main_class[k] == min(c for c, n in counts.items() if n == most)
    assert described.sizes[19] == 0 and described.tightness[19] == 0 and described.purity[19] == 0
    assert gallery.describe(clusters).purity is None


def test_chosen_clusters():
    clusters, classes = some_clusters()
    described = gallery.describe(clusters, classes)
    sections = dict(gallery.choose(described, seed=3))
    assert list(sections) == ["Largest", "Purest", "Tightest", "Random"]
    filling = [k for k in range(20) if described.sizes[k] >= gallery.COLUMNS]
    assert len(filling) >= gallery.ROWS
    for name, values, among in (("Largest", described.sizes, range(19)),
                                ("Purest", described.purity, filling),
                                ("Tightest", described.tightness, filling)):
        expected = sorted((float(values[k]) for k in among), reverse=True)[: gallery.ROWS]
        assert [float(values[k]) for k in sections[name]] == expected
    assert len(set(sections["Random"])) == gallery.ROWS and 19 not in sections["Random"]
    assert sections["Random"] == dict(gallery.choose(described, seed=3))["Random"]
    assert sections["Random"] != dict(gallery.choose(described, seed=4))["Random"]
    loosest = dict(gallery.choose(gallery.describe(clusters)))["Loosest"]
    expected = sorted(float(described.tightness[k]) for k in filling)[: gallery.ROWS]
    assert [float(described.tightness[k]) for k in loosest] == expected


def test_few_and_tiny_clusters():
    described = gallery.describe(of_labels([0, 0, 2], 4), torch.tensor([0, 1, 1]))
    sections = dict(gallery.choose(described))
    assert sections["Largest"] == [0, 2] and sections["Purest"] == [2, 0]
    caption = gallery.caption(described, 2, ["cat", "dog"])
    assert caption == "1 image · tightness 1.00 · 100% dog"
    assert gallery.caption(described, 0) == "2 images · tightness 1.00 · 50% class 0"


def test_a_row_shows_the_images_closest_to_the_centroid_first():
    N = 30  # image i is of one colour, i
    pixels = np.arange(N, dtype=np.uint8)[:, None, None] + np.full((N, 10, 10), 100, np.uint8)
    dataset = ImageSet("folder", "train", "nowhere", pixels=pixels)
    similarity = torch.rand(N, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(N) >= 20).long()  # 20 images and 10
    clusters = Clustering(labels, similarity, torch.zeros(2, 2), torch.zeros(N, 2))
    unreadable = {int(similarity[:20].argmax())}
    sheet = gallery.draw(dataset, clusters, unreadable, "a title")
    first_row = gallery.MARGIN + gallery.HEADING + gallery.MARGIN // 2 + gallery.HEADING
    y = first_row + gallery.CAPTION + gallery.SIDE // 2
    step = gallery.SIDE + gallery.GAP
    shown = [sheet.getpixel((gallery.MARGIN + column * step + gallery.SIDE // 2, y))[0] - 100
             for column in range(gallery.COLUMNS)]
    order = sorted(set(range(20)) - unreadable, key=lambda i: -similarity[i])
    assert shown == order[: gallery.COLUMNS]


@pytest.mark.filterwarnings("ignore:the image")
def test_an_image_that_cannot_be_read_any_more_leaves_a_gray_square(tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 9), (0, 90, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    dataset = ImageSet("folder", "train", str(tmp_path), names=Names(f"{i}.png" for i in range(3)))
    sheet = gallery.draw(dataset, of_labels([0, 0, 0], 1))
    colours = {colour for _, colour in sheet.getcolors(10**6)}
    assert {(0, 90, 0), (gallery.GRAY,) * 3} <= colours
    pictures = gallery.thumbnails(dataset, [2, 1], 40)
    assert pictures.shape == (2, 40, 40, 3) and (pictures[1] == gallery.GRAY).all()
    assert (pictures[0] == (0, 90, 0)).all()


def test_a_run_draws_at_the_interval_and_at_the_end(folder, tmp_path, monkeypatch):
    titles, draw = [], gallery.draw
    monkeypatch.setattr(gallery, "draw",
                        lambda *arguments: titles.append(arguments[-2]) or draw(*arguments))
    arguments = ["--data", folder, "--output", tmp_path, *SMALL]
    assert run_main(*arguments, "--epochs", "3", "--gallery-interval", "2") == 0
    assert titles == ["folder, epoch 2", "folder, epoch 3"]
    assert Image.open(tmp_path / "clusters.png").size[0] > 1000
    assert (tmp_path / "clusters.png").stat().st_size < 4e6
    assert not list(tmp_path.glob("*.partial"))
