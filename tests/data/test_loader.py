"""Which image comes when: the same for any number of workers or processes, and after a stop."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from odc.data import augmentation as augment
from odc.data import loader
from odc.data.augmentation import LINEAR_AUGMENTATIONS, Augmentation, Draw
from odc.errors import Interrupted, UserError
from odc.data.images import ImageSet, UnreadableImage
from odc.data.loader import (default_workers, epoch_batches, evaluation_batches, steps_per_epoch,
                             training_batches)
from odc.runtime import launch
from tests.processes import run_processes

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbered(ImageSet):
    """N images of different sizes; image i is all of colour (i % 256, i // 256, 7).

    bad: the unreadable ones. pause: seconds that reading takes."""

    def __init__(self, count, bad=(), pause=0):
        super().__init__("folder", "train", "made up", pixels=np.zeros((count, 1, 1), np.uint8))
        self.bad, self.pause = bad, pause

    def load(self, i, patient=False):
        time.sleep(self.pause)
        if i in self.bad:
            raise UnreadableImage(f"patient {patient}")
        return Image.new("RGB", (20 + i % 13, 20 + i % 7), (i % 256, i // 256, 7))


def shown(batch):
    """Which image each row of a batch really shows: [B]."""
    return batch.images[:, 0, 0, 0].long() + 256 * batch.images[:, 1, 0, 0].long()


def noise(count=60):
    """N images that differ in every pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    return ImageSet("folder", "train", "made up", pixels=pixels)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for batch, other in zip(batches, others)
        for a, b in zip(batch[:3], other[:3]))


def train(dataset, seed=0, epoch=0, batch_size=8, **options):
    return list(training_batches(dataset, Augmentation(), 16, batch_size, seed, epoch, **options))


def make(kind, dataset=None, **options):
    dataset = dataset or noise()
    if kind == "evaluation":
        transform = augment.evaluation_transform(16)
        return evaluation_batches(dataset, slice(2, 50), transform, 8, **options)
    augmentation = LINEAR_AUGMENTATIONS["imagenet-multihead"]
    batches = training_batches if kind == "training" else epoch_batches
    return batches(dataset, augmentation, 16, 8, 0, 3, **options)


@pytest.mark.parametrize("kind", ["training", "epoch", "evaluation"])
def test_number_of_workers_changes_nothing(kind):
    alone = list(make(kind))
    for workers in (1, 3):
        assert same(alone, list(make(kind, workers=workers)))


def test_resumed_epoch_is_the_rest_of_the_whole_one():
    kind = "training"
    whole = list(make(kind))
    for first_step in (0, 1, 5, len(whole)):
        assert same(whole[first_step:], list(make(kind, first_step=first_step)))
        assert len(make(kind, first_step=first_step)) == len(whole) - first_step
    assert same(whole[5:], list(make(kind, first_step=5, workers=2)))


def test_seed_and_epoch_decide():
    dataset = noise()
    first = train(dataset)
    assert same(first, train(dataset))
    for other in (train(dataset, seed=1), train(dataset, epoch=1)):
        assert not torch.equal(first[0].indices, other[0].indices)
        assert not torch.equal(first[0].draws, other[0].draws)


def test_training_draws_with_replacement():
    """N draws, whole batches; about 1 - 1/e of the images come up; rows show what indices say."""
    dataset = Numbered(1001)
    batches = train(dataset, batch_size=16)
    assert len(batches) == steps_per_epoch(1001, 16) == 63
    for batch in batches:
        assert batch.images.shape == (16, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert torch.equal(shown(batch), batch.indices) and not batch.unreadable
    share = len(torch.cat([batch.indices for batch in batches]).unique()) / 1001
    assert 0.59 < share < 0.67


def test_crops_of_an_image_are_neighbours(monkeypatch):
    """4 crops: a quarter of the images, each read once for all its crops."""
    dataset, loads, load = Numbered(100), [], Numbered.load
    monkeypatch.setattr(Numbered, "load", lambda self, i, *_: loads.append(i) or load(self, i))
    batches = train(dataset, crops=4)
    indices = torch.cat([batch.indices for batch in batches]).view(-1, 4)
    assert len(batches) == 13 and (indices == indices[:, :1]).all()
    assert loads == indices[:, 0].tolist()
    assert len(torch.cat([batch.draws for batch in batches]).unique(dim=0)) == 104


def test_every_item_of_an_epoch_is_augmented_differently():
    for dataset in (Numbered(1), Numbered(100)):  # even the same image, drawn again
        column = Draw._fields.index("angle")
        angles = torch.cat([batch.draws[:, column] for batch in train(dataset)])
        assert len(angles) >= 8 and len(angles.unique()) == len(angles)


@pytest.mark.parametrize("rows", [
    slice(None), slice(3, 17), torch.tensor([5, 5, 0, 19]), slice(4, 4)])
def test_evaluation_gives_every_row_once_in_order(rows):
    dataset = Numbered(20)
    batches = list(evaluation_batches(dataset, rows, augment.evaluation_transform(16), 6))
    indices = torch.cat([batch.indices for batch in batches]) if batches else torch.empty(0).long()
    assert torch.equal(indices, torch.arange(20)[rows])
    assert all(torch.equal(shown(batch), batch.indices) for batch in batches)
    assert all(len(batch.images) == 6 for batch in batches[:-1])


def indices_of(kind, count, batch_size):
    """On a process of the group: its indices, step by step, and the parameters."""
    batches_of = training_batches if kind == "training" else epoch_batches
    batches = list(batches_of(Numbered(count), Augmentation(), 16, batch_size, 0, 0))
    return [batch.indices for batch in batches], [batch.draws for batch in batches]


@pytest.mark.parametrize("kind", ["training", "epoch"])
def test_processes_share_the_draw_of_one(kind):
    """The rows of two processes, in rank order, are those of one process with twice the batch."""
    (alone, drawn), = run_processes(indices_of, 1, kind, 101, 8)
    (first, first_draws), (second, second_draws) = run_processes(indices_of, 2, kind, 101, 4)
    assert len(alone) == len(first) == len(second) == 13
    for ours, *parts in (*zip(alone, first, second), *zip(drawn, first_draws, second_draws)):
        assert torch.equal(torch.cat(parts), ours)
    orders = [set(draws[:, Draw._fields.index("order")].tolist()) for draws in drawn]
    assert {len(order) for order in orders} == {1} and len(set.union(*orders)) > 3


def set_world_size(monkeypatch, world_size):
    monkeypatch.setattr("odc.data.loader.world_size", lambda: world_size)
    monkeypatch.setattr("odc.distributed.world_size", lambda: world_size)


@pytest.mark.parametrize("count, batch_size, W", [
    (5, 1, 4), (4, 1, 4), (98, 3, 4), (100, 8, 1), (3, 8, 1), (7, 2, 1), (7, 100, 3)])
def test_an_epoch_has_every_image_once_and_no_idle_process(monkeypatch, count, batch_size, W):
    indices, steps = [], set()
    set_world_size(monkeypatch, W)
    for rank in range(W):
        monkeypatch.setattr("odc.distributed.rank", lambda: rank)
        parts = [batch.indices for batch in epoch_batches(
            Numbered(count), Augmentation(), 16, batch_size, 0, 0)]
        sizes = [len(part) for part in parts]
        assert min(sizes) > (W == 1) and max(sizes) <= 1 + max(1.5 * batch_size, batch_size + 1)
        indices += parts
        steps.add(len(parts))
    assert len(steps) == 1
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(count))


@pytest.mark.parametrize("count", [127, 128, 129, 131, 159, 160, 161, 191])
def test_the_steps_of_an_epoch_do_not_depend_on_the_number_of_processes(monkeypatch, count):
    for world_size in (1, 2, 4, 32):
        set_world_size(monkeypatch, world_size)
        batches = epoch_batches(Numbered(count), Augmentation(), 16, 64 // world_size, 0, 0)
        assert len(batches) == (2 if count < 160 else 3)


def test_an_epoch_of_fewer_images_than_processes_is_refused(monkeypatch):
    set_world_size(monkeypatch, 4)
    with pytest.raises(UserError, match="3 images for 4 processes"):
        epoch_batches(Numbered(3), Augmentation(), 16, 8, 0, 0)


@pytest.mark.parametrize("in_memory, cores, processes, answer", [
    (True, 64, 1, 0), (False, 64, 1, 4), (False, 64, 8, 4), (False, 2, 1, 2), (False, 2, 2, 0),
    (False, 1, 4, 0), (False, 2, "", 2)])
def test_default_workers(monkeypatch, in_memory, cores, processes, answer):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    assert default_workers(in_memory) == answer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["epoch", "evaluation"])
def test_unreadable_images_have_no_row_up_to_a_limit(kind, workers):
    options = dict(unreadable_limit=2) if kind == "evaluation" else {}  # else 1% of 300
    batches = list(make(kind, Numbered(300, bad=(3, 41)), workers=workers, **options))
    found = torch.cat([batch.indices for batch in batches]).sort().values.tolist()
    wanted = range(2, 50) if kind == "evaluation" else range(300)
    assert found == [i for i in wanted if i not in (3, 41)]
    assert {i for batch in batches for i in batch.unreadable.items()} == {
        (3, "patient False"), (41, "patient False")}
    assert all(torch.equal(shown(batch), batch.indices) for batch in batches)
    with pytest.raises(UserError, match="made up/4. and . others? cannot be read .patient False"):
        list(make(kind, Numbered(300, bad=range(40, 44)), workers=workers, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_training_cannot_read_any_more_is_waited_for_and_named(workers):
    with pytest.raises(UserError, match="made up/7 cannot be read .patient True.: restore it"):
        train(Numbered(20, bad=[7]), epoch=1, workers=workers)


CHILDREN = f"/proc/self/task/{os.getpid()}/children"
needs_proc = pytest.mark.skipif(not os.path.exists(CHILDREN), reason="needs /proc")


def children():
    """Process ids of this process's children."""
    with open(CHILDREN) as file:
        return {int(word) for word in file.read().split()}


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_the_training_process(number):
    before = children()
    batches = iter(make("training", Numbered(64, pause=0.01), workers=2))
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, number)
    assert len(list(batches)) == 7


@needs_proc
def test_workers_end_with_the_epoch():
    before = children()
    batches = iter(make("training", workers=2))
    next(batches)
    del batches  # in the middle of the epoch, as when a run stops
    assert children() <= before


@pytest.mark.parametrize("error, raised", [
    (RuntimeError("Pin memory thread exited unexpectedly"), UserError),
    (ConnectionResetError(104, "Connection reset by peer"), UserError),
    (RuntimeError("a mistake of ours"), RuntimeError)])
def test_what_torch_raises_for_a_dead_worker(monkeypatch, error, raised):
    def broken(self):
        raise error
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    with pytest.raises(raised, match="worker has died|a mistake of ours"):
        train(noise())


class Stuck(Numbered):
    """Its worker lives, but gives nothing, as when a batch was lost on the way."""

    def load(self, i, patient=False):
        time.sleep(15)


@pytest.mark.parametrize("pending, error, words", [
    (False, UserError, "no batch in 2 s"), (True, Interrupted, "as a signal asked")])
def test_waits_for_a_batch_are_bounded_and_see_signals(monkeypatch, pending, error, words):
    monkeypatch.setattr(loader, "POLL", 1)
    monkeypatch.setattr(loader, "LONGEST_WAIT", 2)
    monkeypatch.setattr(launch, "signal_is_pending", lambda: pending)
    batches = iter(training_batches(Stuck(8), Augmentation(), 16, 4, 0, 0, workers=1))
    with pytest.raises(error, match=words):
        next(batches)
