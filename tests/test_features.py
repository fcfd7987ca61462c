"""Every image gets its row, on any number of processes, and the cache is never wrong."""

import glob
import multiprocessing
import os
import resource
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from odc import distributed
from odc.data.augmentation import normalise, resize_center_crop
from odc.data.datasets import open_dataset
from odc.errors import Interrupted, UserError
from odc.features import cache_path, extract, pixel_features, save_rows, weights_fingerprint
from odc.model import ResNet
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


def test_pixels_as_features(tmp_path):
    dataset = open_dataset(picture_folder(tmp_path, 5))
    pixels = torch.stack([small(dataset.load(i)) for i in range(5)]).flatten(1).float()
    expected = pixels / pixels.norm(dim=1, keepdim=True)
    features = pixel_features(dataset, small, 16, CPU, batch_size=2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def extracted(folder, jobs):
    """For each (batch size, cache): this process's features, and the number of images it used."""
    dataset, results = open_dataset(folder), []
    for batch_size, cache in jobs:
        used = []

        def forward(images):
            used.append(len(images))
            return sums(images)

        rows = extract(forward, dataset, small, 19, CPU, batch_size, cache=cache)
        results.append((rows, sum(used)))
    return results


@pytest.mark.parametrize("W", [1, 2])
def test_every_row_once_in_order(tmp_path, W):
    folder, cache = picture_folder(tmp_path / "images", 13), str(tmp_path / "cache" / "x.npy")
    expected = expected_rows(folder)
    jobs = [(3, None), (4, cache), (5, cache), (100, None)]
    ranks = run_processes(extracted, W, folder, jobs) if W > 1 else [extracted(folder, jobs)]
    for job in range(4):
        assert_rows(torch.cat([results[job][0] for results in ranks]), expected)
    # The cache is written by the first job that names it, and read by the second.
    assert [sum(results[job][1] for results in ranks) for job in range(4)] == [13, 13, 0, 13]
    assert os.listdir(tmp_path / "cache") == ["x.npy"]
    ((again, used),) = extracted(folder, [(6, cache)])  # one process reads what any W wrote
    assert used == 0
    assert_rows(again, expected)
    assert np.load(cache).shape == (13, 19) and np.load(cache).dtype == np.float32


def test_two_processes_read_what_one_wrote(tmp_path):
    folder, cache = picture_folder(tmp_path / "images", 13), str(tmp_path / "x.npy")
    ((whole, _),) = extracted(folder, [(4, cache)])
    parts = run_processes(extracted, 2, folder, [(4, cache)])
    assert [used for ((_, used),) in parts] == [0, 0]
    assert torch.equal(torch.cat([rows for ((rows, _),) in parts]), whole)


def test_more_processes_than_images(tmp_path):
    folder, cache = picture_folder(tmp_path / "images", 2), str(tmp_path / "x.npy")
    for job in zip(*run_processes(extracted, 3, folder, [(4, cache), (4, cache), (4, None)])):
        assert_rows(torch.cat([rows for rows, _ in job]), expected_rows(folder))
        assert sorted(len(rows) for rows, _ in job) == [0, 1, 1]


def test_chosen_images_only(tmp_path):
    folder = picture_folder(tmp_path, 9)
    images = torch.tensor([7, 2, 2, 5])
    rows = extract(sums, open_dataset(folder), small, 19, CPU, 3, images=images)
    assert_rows(rows, expected_rows(folder)[images])


def test_unreadable_images(tmp_path):
    """Up to 1% are stood in for, and then nothing is kept; above that it is an error."""
    folder, cache = picture_folder(tmp_path / "images", 150), str(tmp_path / "cache.npy")
    (tmp_path / "images" / "007.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="007.png"):
        rows = extract(sums, open_dataset(folder), small, 19, CPU, cache=cache)
    assert len(rows) == 150 and rows.isfinite().all()
    assert not os.path.exists(cache)
    (tmp_path / "images" / "009.png").write_bytes(b"")
    words = "2 of 150 images in .* cannot be read"
    with warnings.catch_warnings(), pytest.raises(UserError, match=words):
        warnings.simplefilter("ignore")
        extract(sums, open_dataset(folder), small, 19, CPU)


# --- the cache -----------------------------------------------------------------------------------


def test_other_weights_data_or_transform_have_another_file(tmp_path):
    network, other = ResNet("narrow", True), ResNet("narrow", True)
    other.load_state_dict(network.state_dict())
    assert weights_fingerprint(network) == weights_fingerprint(other)
    other.bn1.running_mean[3] += 1e-6
    assert weights_fingerprint(network) != weights_fingerprint(other)
    parts = [("w", "data", "t"), ("v", "data", "t"), ("w", "data2", "t"), ("w", "data", "t2")]
    paths = [cache_path(tmp_path, *of) for of in parts]
    assert len(set(paths)) == 4 and cache_path(tmp_path, "w", "data", "t") == paths[0]
    assert {os.path.dirname(path) for path in paths} == {str(tmp_path)}


@pytest.mark.parametrize("keep", [0, 40, -4])
def test_damaged_cache(tmp_path, keep):
    """Empty, cut off in the header, and cut off in the last number."""
    folder, cache = picture_folder(tmp_path / "images", 3), str(tmp_path / "x.npy")
    extracted(folder, [(4, cache)])
    os.truncate(cache, keep if keep >= 0 else os.path.getsize(cache) + keep)
    with pytest.raises(UserError, match="x.npy is damaged; delete it"):
        extracted(folder, [(4, cache)])


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    folder = picture_folder(tmp_path / "images", 3)
    with pytest.raises(UserError, match=f"--features-cache {tmp_path}/file: .*choose another"):
        extracted(folder, [(4, str(tmp_path / "file" / "x.npy"))])


def test_a_kill_while_writing_leaves_no_cache(tmp_path, monkeypatch):
    folder, cache = picture_folder(tmp_path / "images", 13), str(tmp_path / "x.npy")

    def killed():
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        extracted(folder, [(4, cache)])

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not os.path.exists(cache)
    assert glob.glob(cache + ".*.partial")  # it was in the middle
    for used in (13, 0):
        ((rows, number),) = extracted(folder, [(4, cache)])
        assert_rows(rows, expected_rows(folder))
        assert number == used
    assert os.path.exists(cache)


def test_two_runs_write_the_same_cache(tmp_path, monkeypatch):
    """The second begins while the first is in the middle. Neither disturbs the other."""
    folder, cache = picture_folder(tmp_path / "images", 13), str(tmp_path / "x.npy")
    other, fsync = [], os.fsync

    def second(file):
        if not other:
            other.append(True)
            extracted(folder, [(4, cache)])
            os.remove(cache)
        fsync(file)

    monkeypatch.setattr(os, "fsync", second)
    extracted(folder, [(4, cache)])
    assert other and sorted(os.listdir(tmp_path)) == ["images", "x.npy"]
    assert_rows(torch.from_numpy(np.load(cache)), expected_rows(folder))


def stopped(folder, cache):
    """What extraction says if process 1 fails in its first batch."""
    def forward(images):
        if distributed.rank() == 1:
            raise UserError("process 1 cannot go on.")
        return sums(images)

    try:
        extract(forward, open_dataset(folder), small, 19, CPU, 2, cache=cache)
    except UserError as error:
        return str(error)


def test_an_error_on_one_process_stops_all_and_leaves_no_files(tmp_path):
    folder = picture_folder(tmp_path / "images", 9)
    messages = run_processes(stopped, 2, folder, str(tmp_path / "x.npy"), timeout=120)
    assert messages == ["process 1 cannot go on."] * 2
    assert os.listdir(tmp_path) == ["images"]


def test_a_signal_stops_between_two_batches_and_leaves_no_files(tmp_path, monkeypatch):
    folder, used = picture_folder(tmp_path / "images", 9), []

    def forward(images):
        used.append(len(images))
        return sums(images)

    monkeypatch.setattr("odc.runtime.launch.signal_is_pending", lambda: len(used) == 2)
    with pytest.raises(Interrupted):
        extract(forward, open_dataset(folder), small, 19, CPU, 2, cache=str(tmp_path / "x.npy"))
    assert used == [2, 2] and os.listdir(tmp_path) == ["images"]


def written_on_a_full_disk(path, full_rank):
    """What saving says if a process may not write files above 400 bytes, as on a full disk."""
    features = torch.ones(100, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        save_rows(path, features, 100 * distributed.world_size(), "--output here")
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("W, full_rank", [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_is_one_sentence_and_leaves_no_files(tmp_path, W, full_rank):
    call = written_on_a_full_disk, W, str(tmp_path / "x.npy"), full_rank
    messages = run_processes(*call) if W > 1 else [written_on_a_full_disk(*call[2:])]
    assert len(set(messages)) == 1
    assert messages[0].startswith("--output here: could not be written (")
    assert messages[0].endswith("; make room, or choose another folder.")
    assert os.listdir(tmp_path) == []


def test_a_cache_is_never_replaced_by_half_of_another(tmp_path):
    """Where writing fails, the file that was there stays as it was."""
    path = str(tmp_path / "x.npy")
    save_rows(path, torch.zeros(5, 3), 5, "--output here")
    assert "could not be written" in written_on_a_full_disk(path, 0)
    assert np.array_equal(np.load(path), np.zeros((5, 3)))
    assert os.listdir(tmp_path) == ["x.npy"]
