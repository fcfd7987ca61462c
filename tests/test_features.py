"""Every image gets its row on any number of processes; those that cannot be read leave the set."""

import os
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from odc import distributed
from odc.data.augmentation import normalise, resize_center_crop
from odc.data.datasets import open_dataset
from odc.data.images import UnreadableImage
from odc.errors import Interrupted, UserError
from odc.features import extract, reshard, unit_pixels, write_rows
from tests.processes import run_processes

CPU = torch.device("cpu")


def small(image):
    return resize_center_crop(image, 16, 16)


def sums(images):
    """[B, 3, 16, 16] -> [B, 19]: sums by channel, and by column. They differ for every image."""
    return torch.cat([images.sum((2, 3)), images.sum((1, 2))], 1)


def picture_folder(folder, count):
    generator = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        pixels = generator.integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{i:03d}.png")
    return str(folder)


def expected_rows(folder):
    dataset = open_dataset(folder)
    return sums(normalise(torch.stack([small(dataset.load(i)) for i in range(len(dataset))])))


def assert_rows(rows, expected):
    assert not rows.requires_grad
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-3)


# --- rows ----------------------------------------------------------------------------------------


def test_pixels_as_features():
    pixels = torch.rand(5, 3, 40, 40, dtype=torch.float64)
    images = normalise((pixels * 255).round().byte())
    expected = F.normalize(F.adaptive_avg_pool2d((pixels * 255).round() / 255, 32).flatten(1))
    torch.testing.assert_close(unit_pixels(images), expected.float(), rtol=1e-4, atol=1e-5)


def extracted(folder, batch_sizes, broken=(), share=0.01):
    """For each batch size: this process's features; what is left of the set; the error or None."""
    results = []
    for batch_size in batch_sizes:
        dataset = open_dataset(folder)
        load = dataset.load

        def broken_load(i, patient=False):
            if dataset.name_of(i) in broken:
                raise UnreadableImage("made so")
            return load(i, patient)

        dataset.load = broken_load
        try:
            rows, error = extract(sums, dataset, small, 19, CPU, batch_size,
                                  unreadable_share=share), None
        except UserError as caught:
            rows, error = None, str(caught)
        names = [dataset.name_of(i) for i in range(len(dataset))]
        results.append((rows, names, dataset.left_out, error))
    return results


@pytest.mark.parametrize("W, count", [(1, 13), (2, 13), (3, 2)])
def test_every_row_once_in_order(tmp_path, W, count):
    folder = picture_folder(tmp_path, count)
    ranks = run_processes(extracted, W, folder, [3, 5, 100])
    for results in zip(*ranks):
        assert_rows(torch.cat([rows for rows, *_ in results]), expected_rows(folder))
        assert max(len(rows) for rows, *_ in results) == -(-count // W)


@pytest.mark.parametrize("W", [1, 2, 4])
def test_images_that_cannot_be_read_leave_the_set_on_every_process(tmp_path, W):
    folder = picture_folder(tmp_path, 40)
    broken = {"000.png", "001.png", "002.png", "003.png", "017.png"}
    ranks = run_processes(extracted, W, folder, [3, 100], broken, 0.125)
    kept = [i for i in range(40) if f"{i:03}.png" not in broken]
    for results in zip(*ranks):
        assert_rows(torch.cat([rows for rows, *_ in results]), expected_rows(folder)[kept])
        sizes = [len(rows) for rows, *_ in results]
        assert max(sizes) - min(sizes) <= 1  # the shards of what is left
        for _, names, left_out, _ in results:
            assert names == [f"{i:03}.png" for i in kept]
            assert left_out == dict.fromkeys(broken, "made so")


def test_too_many_unreadable_images_are_an_error_everywhere(tmp_path):
    folder = picture_folder(tmp_path, 40)
    ranks = run_processes(extracted, 2, folder, [4], {"030.png"})
    assert {result[0][3] for result in ranks} == {
        f"1 of 40 images in {folder} cannot be read, such as '030.png' (made so): repair or remove "
        "them."}
    ranks = run_processes(extracted, 2, folder, [4], {"030.png"}, 0)
    assert {result[0][3] for result in ranks} == {
        f"{folder}/030.png cannot be read (made so): restore it, and start the same command again."}


def resharded(counts):
    start = sum(counts[: distributed.rank()])
    rows = torch.arange(start, start + counts[distributed.rank()])[:, None].expand(-1, 2)
    return reshard(rows)


@pytest.mark.parametrize("counts", [(9,), (0, 7), (5, 0, 1, 1), (2, 3, 2, 3)])
def test_rows_are_dealt_anew(counts):
    parts = run_processes(resharded, len(counts), counts)
    assert torch.cat(parts)[:, 1].tolist() == list(range(sum(counts)))
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= 1


def stopped(folder):
    """What extraction says if process 1 fails in its first batch."""
    def forward(images):
        if distributed.rank() == 1:
            raise UserError("process 1 cannot go on.")
        return sums(images)

    try:
        extract(forward, open_dataset(folder), small, 19, CPU, 2)
    except UserError as error:
        return str(error)


def test_an_error_on_one_process_stops_all(tmp_path):
    messages = run_processes(stopped, 2, picture_folder(tmp_path, 9), timeout=120)
    assert messages == ["process 1 cannot go on."] * 2


def test_a_signal_stops_between_two_batches(tmp_path, monkeypatch):
    used = []

    def forward(images):
        used.append(len(images))
        return sums(images)

    monkeypatch.setattr("odc.runtime.launch.signal_is_pending", lambda: len(used) == 2)
    with pytest.raises(Interrupted):
        extract(forward, open_dataset(picture_folder(tmp_path, 9)), small, 19, CPU, 2)
    assert used == [2, 2]


# --- rows of all processes in one file -----------------------------------------------------------


def written_on_a_full_disk(path, full_rank):
    """What saving says if a process may not write files above 400 bytes, as on a full disk."""
    features = torch.ones(100, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        write_rows(path, features, 100 * distributed.world_size())
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("W, full_rank", [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_is_one_sentence_and_leaves_the_file_from_before(tmp_path, W, full_rank):
    path = str(tmp_path / "x.npy")
    write_rows(path, torch.zeros(5, 3), 5)
    messages = run_processes(written_on_a_full_disk, W, path, full_rank)
    assert len(set(messages)) == 1 and messages[0].startswith(f"{path}: File too large; put ")
    assert np.array_equal(np.load(path), np.zeros((5, 3)))
    assert os.listdir(tmp_path) == ["x.npy"]
