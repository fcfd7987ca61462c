"""Extraction fills one row for every image, on any number of processes, and its cache is never stale."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from odc import distributed
from odc.data.augmentation import normalise, resize_center_crop
from odc.data.layouts import open_dataset
from odc.errors import UserError
from odc.features import (
    Cache, extract, extract_rows, map_pools, map_shapes, pooled_shapes, weights_fingerprint,
)
from odc.model import ResNet
from tests.processes import run_processes

CPU = torch.device("cpu")


def small(image):
    return resize_center_crop(image, 16, 16)


def sums(images):
    """Two features that tell every image: sums by channel, and by column."""
    return [images.sum((2, 3)), images.sum((1, 2))]


def picture_folder(folder, count):
    generator = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)).save(f"{folder}/{i:03d}.png")
    return str(folder)


# --- pooled maps -----------------------------------------------------------------------------------------------------


def test_pooled_dims_of_resnet50_at_224():
    shapes = map_shapes(ResNet("resnet50"), 224)
    assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [c * h * w for c, h, w in pooled_shapes(shapes)] == [9216, 9216, 8192, 9216, 8192]
    assert [h for _, h, _ in pooled_shapes(shapes)] == [12, 6, 4, 3, 2]


def test_first_pool_counts_its_padding():
    pool = map_pools(map_shapes(ResNet("resnet50"), 224))[0]
    corner = pool(torch.ones(1, 1, 112, 112))[0, 0, 0, 0]
    assert corner == pytest.approx(36 / 100)  # 6 x 6 pixels of 10 x 10 are in the map


@pytest.mark.parametrize("arch, size, grids", [("resnet18", 224, [12, 6, 4, 3, 2]), ("resnet50", 160, [12, 6, 4, 3, 2]),
                                               ("narrow", 32, [12, 6, 4, 3, 2]), ("resnet18", 48, [12, 6, 4, 3, 2])])
def test_other_sizes_pool_to_the_same_grid(arch, size, grids):
    shapes = map_shapes(ResNet(arch, size <= 64), size)
    pooled = pooled_shapes(shapes)
    assert [h for _, h, _ in pooled] == [min(grid, h) for grid, (_, h, _) in zip(grids, shapes)]
    for pool, shape, expected in zip(map_pools(shapes), shapes, pooled):
        assert pool(torch.zeros(2, *shape)).shape == (2, *expected)


def test_a_grid_is_no_larger_than_its_map():
    shapes = map_shapes(ResNet("resnet18"), 32)  # maps of 16, 8, 4, 2, 1
    assert [h for _, h, _ in pooled_shapes(shapes)] == [12, 6, 4, 2, 1]


# --- extraction ------------------------------------------------------------------------------------------------------


def expected_rows(dataset):
    images = torch.stack([small(dataset.load(i)) for i in range(len(dataset))])
    return sums(normalise(images))


def extracted(folder, jobs):
    """For each of the jobs (batch size, cache folder or None): own rows, all rows, images seen, numbers of own rows."""
    dataset = open_dataset(folder)
    results = []
    for batch_size, cache_folder in jobs:
        seen = []

        def forward(images):
            seen.append(len(images))
            return sums(images)

        cache = cache_folder and Cache(cache_folder, dataset.fingerprint, "small")
        own = extract_rows(forward, dataset, small, [3, 16], CPU, batch_size, cache=cache)
        whole = extract(forward, dataset, small, [3, 16], CPU, batch_size, cache=cache)
        rows = distributed.shard(len(dataset))
        results.append(([x.clone() for x in own], [x.clone() for x in whole], sum(seen), rows))
    return results


@pytest.mark.parametrize("W", [1, 2])
def test_every_row_once_in_order(tmp_path, W):
    folder = picture_folder(tmp_path / "images", 13)
    expected = expected_rows(open_dataset(folder))
    cache = str(tmp_path / "cache")
    jobs = [(3, None), (4, cache), (5, cache), (100, None)]
    ranks = run_processes(extracted, W, folder, jobs) if W > 1 else [extracted(folder, jobs)]
    for job, (_, folder_of_cache) in enumerate(jobs):
        for own, whole, _, rows in (results[job] for results in ranks):
            for part, matrix, truth in zip(own, whole, expected):
                torch.testing.assert_close(part, truth[rows], rtol=1e-5, atol=1e-3)
                torch.testing.assert_close(matrix, truth, rtol=1e-5, atol=1e-3)
    # Without a cache both functions go over the images; with one, only the first that needs them.
    assert [sum(results[job][2] for results in ranks) for job in range(4)] == [26, 13, 0, 26]
    assert [name for name in os.listdir(cache) if "partial" in name] == []
    (again,) = extracted(folder, [(6, cache)])  # W = 1 reads what any W wrote
    assert again[2] == 0
    torch.testing.assert_close(again[1][0], expected[0], rtol=1e-5, atol=1e-3)


def test_more_processes_than_images(tmp_path):
    folder = picture_folder(tmp_path / "images", 2)
    jobs = [(4, str(tmp_path / "cache")), (4, None)]
    for results in run_processes(extracted, 3, folder, jobs):
        for own, whole, _, rows in results:
            assert len(own[0]) == rows.stop - rows.start and whole[1].shape == (2, 16)


def test_a_single_width_gives_a_single_matrix(tmp_path):
    dataset = open_dataset(picture_folder(tmp_path, 3))
    rows = extract_rows(lambda images: images.sum((2, 3)), dataset, small, 3, CPU)
    torch.testing.assert_close(rows, expected_rows(dataset)[0], rtol=1e-5, atol=1e-3)
    assert not rows.requires_grad


def test_cache_follows_weights_data_and_transform(tmp_path):
    network, other = ResNet("narrow", True), ResNet("narrow", True)
    other.load_state_dict(network.state_dict())
    assert weights_fingerprint(network) == weights_fingerprint(other)
    other.bn1.running_mean[3] += 1e-6
    assert weights_fingerprint(network) != weights_fingerprint(other)
    paths = {Cache(tmp_path, *parts).path for parts in (("w", "data", "t"), ("v", "data", "t"), ("w", "data2", "t"),
                                                        ("w", "data", "t2"))}
    assert len(paths) == 4
    assert Cache(tmp_path, "w", "data", "t").path in paths


def test_unreadable_images(tmp_path):
    folder = picture_folder(tmp_path / "images", 150)
    (tmp_path / "images" / "007.png").write_bytes(b"")
    dataset = open_dataset(folder)
    with pytest.warns(UserWarning, match="007.png"):
        rows = extract_rows(sums, dataset, small, [3, 16], CPU)
    assert len(rows[0]) == 150 and rows[0].isfinite().all()
    (tmp_path / "images" / "009.png").write_bytes(b"")
    with warnings.catch_warnings(), pytest.raises(UserError, match="2 of 150 images cannot be read"):
        warnings.simplefilter("ignore")
        extract_rows(sums, open_dataset(folder), small, [3, 16], CPU)


def fails_on_one_process(folder, cache_folder):
    def forward(images):
        if distributed.rank() == 1:
            raise UserError("process 1 cannot go on.")
        return sums(images)

    dataset = open_dataset(folder)
    try:
        extract_rows(forward, dataset, small, [3, 16], CPU, 2, cache=Cache(cache_folder, "x"))
    except UserError as error:
        return str(error)


def test_an_error_on_one_process_stops_all_and_leaves_no_files(tmp_path):
    folder = picture_folder(tmp_path / "images", 9)
    messages = run_processes(fails_on_one_process, 2, folder, str(tmp_path / "cache"), timeout=120)
    assert messages == ["process 1 cannot go on."] * 2
    assert os.listdir(tmp_path / "cache") == []


def test_cache_that_cannot_be_opened_leaves_nothing(tmp_path, monkeypatch):
    """The main process makes the files, and then a process cannot open them."""
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("odc.features.open", refuse, raising=False)
    with pytest.raises(UserError, match="Too many open files"), Cache(str(tmp_path), "x").writing(5, 3):
        pass
    assert os.listdir(tmp_path) == []


def test_cache_that_cannot_be_written_or_read(tmp_path):
    dataset = open_dataset(picture_folder(tmp_path / "images", 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        extract_rows(sums, dataset, small, [3, 16], CPU, cache=Cache(str(tmp_path / "file"), "x"))
    cache = Cache(str(tmp_path / "cache"), "x")
    extract_rows(sums, dataset, small, [3, 16], CPU, cache=cache)
    path = os.path.join(cache.path, "1.npy")
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 4)
    with pytest.raises(UserError, match="damaged; delete it"):
        extract_rows(sums, dataset, small, [3, 16], CPU, cache=cache)
