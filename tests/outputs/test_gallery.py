"""clusters.png: which clusters and which images it shows."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from odc.outputs import export
from odc.outputs import gallery
from odc.data.images import ImageSet, Names
from odc.memory import ODCMemory
from tests.processes import run_processes
from tests.runs import SMALL, run_main


def some_clusters(N=400, K=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K - 1, (N,), generator=generator) ** 2 // (K - 1)  # uneven sizes, the last one empty
    return labels, torch.rand(N, generator=generator), torch.randint(5, (N,), generator=generator)


def test_description_of_clusters():
    labels, similarity, classes = some_clusters()
    clusters = gallery.describe(labels, similarity, 20, classes)
    for k in range(20):
        members = [i for i in range(400) if labels[i] == k]
        assert clusters.sizes[k] == len(members)
        if members:
            assert float(clusters.similarity[k]) == pytest.approx(float(similarity[members].mean()), abs=1e-6)
            counts = Counter(classes[members].tolist())
            most = max(counts.values())
            assert float(clusters.purity[k]) == pytest.approx(most / len(members))
            assert clusters.main_class[k] == min(c for c, count in counts.items() if count == most)
    assert clusters.sizes[19] == 0 and clusters.similarity[19] == 0 and clusters.purity[19] == 0


def test_chosen_clusters():
    labels, similarity, classes = some_clusters()
    clusters = gallery.describe(labels, similarity, 20, classes)
    sections = dict(gallery.choose(clusters, seed=3))
    assert list(sections) == ["Largest", "Purest", "Tightest", "Random"]
    filling = [k for k in range(20) if clusters.sizes[k] >= gallery.COLUMNS]
    assert len(filling) >= gallery.ROWS
    for name, values, among in (("Largest", clusters.sizes, range(19)), ("Purest", clusters.purity, filling),
                                ("Tightest", clusters.similarity, filling)):
        expected = sorted((float(values[k]) for k in among), reverse=True)[: gallery.ROWS]
        assert [float(values[k]) for k in sections[name]] == expected
    assert len(set(sections["Random"])) == gallery.ROWS and 19 not in sections["Random"]
    assert sections["Random"] == dict(gallery.choose(clusters, seed=3))["Random"]
    assert sections["Random"] != dict(gallery.choose(clusters, seed=4))["Random"]
    loosest = dict(gallery.choose(gallery.describe(labels, similarity, 20)))["Loosest"]
    expected = sorted(float(clusters.similarity[k]) for k in filling)[: gallery.ROWS]
    assert [float(clusters.similarity[k]) for k in loosest] == expected


def test_few_and_tiny_clusters():
    clusters = gallery.describe(torch.tensor([0, 0, 2]), torch.rand(3), 4, torch.tensor([0, 1, 1]))
    assert dict(gallery.choose(clusters))["Largest"] == [0, 2] and dict(gallery.choose(clusters))["Purest"] == [2, 0]
    assert gallery.caption(2, clusters, ["cat", "dog"]).startswith("1 image · 100% dog · similarity ")
    assert gallery.caption(0, clusters).startswith("2 images · 50% class 0 · similarity ")


def test_a_row_shows_the_images_closest_to_the_centroid_first():
    N = 30  # image i is of one colour, i
    pixels = np.arange(N, dtype=np.uint8)[:, None, None] + np.full((N, 10, 10), 100, np.uint8)
    dataset = ImageSet("folder", "train", "nowhere", pixels=pixels)
    labels = (torch.arange(N) >= 20).long()  # 20 images and 10
    similarity = torch.rand(N, generator=torch.Generator().manual_seed(0))
    sheet = gallery.draw(dataset, labels, similarity, 2, "a title")
    first_row = gallery.MARGIN + gallery.HEADING + gallery.MARGIN // 2 + gallery.HEADING
    y = first_row + gallery.CAPTION + gallery.SIDE // 2
    step = gallery.SIDE + gallery.GAP
    shown = [sheet.getpixel((gallery.MARGIN + column * step + gallery.SIDE // 2, y))[0] - 100
             for column in range(gallery.COLUMNS)]
    assert shown == sorted(range(20), key=lambda i: -similarity[i])[: gallery.COLUMNS]


def test_an_unreadable_image_leaves_a_gray_square(tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 9), (0, 90, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    dataset = ImageSet("folder", "train", str(tmp_path), names=Names(f"{i}.png" for i in range(3)))
    sheet = gallery.draw(dataset, torch.zeros(3, dtype=torch.int64), torch.ones(3), 1)
    assert {(0, 90, 0), (225, 225, 228)} <= {colour for _, colour in sheet.getcolors(10**6)}


def similarities_of_shards(features, labels):
    memory = ODCMemory(len(features), features.shape[1], 6)
    memory.initialize(features, labels)
    return export.similarities(memory)


def test_similarities_are_gathered_from_all_processes():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 6
    alone = similarities_of_shards(features, labels)
    first, second = run_processes(similarities_of_shards, 2, features, labels)
    assert torch.equal(first, alone) and second is None
    unit = torch.nn.functional.normalize(features)
    expected = [float(torch.cosine_similarity(unit[i], unit[labels == labels[i]].mean(0), dim=0)) for i in range(50)]
    assert alone.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_run_draws_at_the_interval_and_at_the_end(folder, tmp_path, monkeypatch):  # noqa: F811
    titles, draw = [], gallery.draw
    monkeypatch.setattr(gallery, "draw", lambda *arguments: titles.append(arguments[-2]) or draw(*arguments))
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--epochs", "3", "--gallery-interval", "2") == 0
    assert titles == ["folder, epoch 2", "folder, epoch 3"]
    assert Image.open(tmp_path / "clusters.png").size[0] > 1000
    assert (tmp_path / "clusters.png").stat().st_size < 4e6 and not list(tmp_path.glob("*.partial"))
