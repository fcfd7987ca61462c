"""Linear evaluation and fine-tuning: the recipes' values, the arithmetic against plain PyTorch,
and runs that continue."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval_linear
from eval_linear import evaluate, load_checkpoint, make_parser, save_checkpoint, train_epoch
from odc import distributed
from odc.data.augmentation import LINEAR_AUGMENTATIONS, augment_batch
from odc.data.images import ImageSet, Names
from odc.data.loader import epoch_batches
from odc.errors import Interrupted, UserError
from odc.evaluation.frozen_backbone import FrozenBackbone
from odc.evaluation.linear import (
    AVGPOOL, COLUMNS, FINE_TUNED, PROTOCOLS, Protocol, choose_images, choose_protocol,
    choose_results, make_classifiers, make_optimizer, published_table)
from odc.evaluation.pooling import map_shapes
from odc.features import weights_fingerprint
from odc.model import ResNet
from odc.runtime import checkpoint, launch
from tests.processes import run_processes

CPU = torch.device("cpu")


# --- the protocols, value by value ---------------------------------------------------------------


@pytest.mark.parametrize("name, columns, epochs, lr, steps, nesterov, decay, reported", [
    ("imagenet-multihead", COLUMNS, 90, 0.01, (30, 60), True, 1e-4, "last"),
    ("imagenet-avgpool", (AVGPOOL,), 100, 30.0, (60, 80), False, 0.0, "best"),
    ("places205", COLUMNS, 28, 0.01, (7, 14, 21), True, 1e-4, "last"),
    ("inaturalist2018", COLUMNS, 84, 0.01, (24, 48, 72), True, 1e-4, "last"),
])
def test_values_of_linear_protocols(name, columns, epochs, lr, steps, nesterov, decay, reported):
    p = PROTOCOLS[name]
    assert (p.columns, p.epochs, p.lr, p.lr_steps) == (columns, epochs, lr, steps)
    assert (p.nesterov, p.weight_decay, p.reported) == (nesterov, decay, reported)
    assert p.train_transform == name
    assert (p.batch_size, p.lr_gamma, p.head_lr) == (256, 0.1, 1.0)


@pytest.mark.parametrize("name, decay, head", [("imagenet-1percent", 5e-4, 100.0),
                                               ("imagenet-10percent", 1e-4, 10.0)])
def test_values_of_fine_tuning(name, decay, head):
    p = PROTOCOLS[name]
    assert (p.columns, p.epochs, p.lr_steps) == ((FINE_TUNED,), 20, (12, 16))
    assert (p.lr, p.head_lr, p.lr_gamma, p.weight_decay) == (0.1, head, 0.2, decay)
    assert (p.batch_size, p.nesterov, p.reported) == (256, False, "last")
    crops = LINEAR_AUGMENTATIONS[p.train_transform]
    assert (crops.min_scale, crops.flip, crops.fixed_scale) == (0.08, 0.5, False)
    assert (crops.rotation, crops.jitter, crops.grayscale, crops.lighting) == (0, (0,) * 4, 0, 0)


def choose(name, classes, *arguments):
    """(name, Protocol, settings that are not the recipe's) for data with so many classes."""
    dataset = ImageSet(name, "train", "/data", classes=[str(k) for k in range(classes)])
    return choose_protocol(make_parser().parse_args(["--weights", "w", *arguments]), dataset)


@pytest.mark.parametrize("data, classes, name", [
    ("imagenet", 1000, "imagenet-multihead"), ("places205", 205, "places205"),
    ("inaturalist2018", 8142, "inaturalist2018"), ("shapes", 10, "short"),
    ("imagenet", 10, "short")])
def test_protocol_of_the_data(data, classes, name):
    assert choose(data, classes) == (name, PROTOCOLS[name], {})
    assert choose(data, classes, "--protocol", "finetune")[1:] == (PROTOCOLS["finetune"], {})


def test_settings_that_can_be_given():
    _, protocol, changed = choose("imagenet", 1000, "--epochs", "30", "--batch-size", "64",
                                  "--lr", "0.5")
    assert changed == dict(epochs=30, lr_steps=(10, 20), batch_size=64, lr=0.5)
    assert dataclasses.asdict(protocol).items() >= changed.items()
    fine_tuning = choose("shapes", 3, "--protocol", "finetune", "--head-lr", "7")
    assert fine_tuning[2] == dict(head_lr=7)


@pytest.mark.parametrize("arguments, message", [
    (["--head-lr", "10"], "--head-lr 10 is for fine-tuning"),
    (["--protocol", "imagenet-1percent"], "--subset, or a --train-share"),
    (["--subset", "a", "--train-share", "0.1"], "not allowed with argument --subset"),
    (["--protocol", "finetune", "--amp", "fp16"], "--amp fp16.*use bf16 or off"),
    (["--batch-size", "1"], "at least 2 each: choose a --batch-size")])
def test_settings_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        choose("shapes", 3, *arguments)


def imagenet_run(train=1281167, image_size=224):
    """What `published_table` looks at, of a run on ImageNet."""
    class Images(SimpleNamespace):
        def __len__(self):
            return self.count

    splits = {split: Images(name="imagenet", classes=range(1000), count=count)
              for split, count in (("train", train), ("val", 50000))}
    return SimpleNamespace(**splits, backbone=SimpleNamespace(arch="resnet50", small_stem=False),
                           image_size=image_size)


def test_published_rows_stand_beside_their_own_protocol_alone():
    network = imagenet_run()
    beside = published_table("imagenet-multihead", {}, network)
    assert beside.columns == COLUMNS
    assert beside.rows["ODC"] == (14.76, 31.82, 42.44, 55.76, 57.70)
    assert published_table("imagenet-avgpool", {}, network).rows["ODC"] == (53.42,)
    assert published_table("imagenet-multihead", {"lr": 0.02}, network) is None
    assert published_table("imagenet-multihead", {"lr": 0.1}, network) is None
    assert published_table("imagenet-multihead", {}, imagenet_run(image_size=160)) is None
    assert published_table("places205", {}, network) is None
    assert published_table("short", {}, network) is None


@pytest.mark.parametrize("name, train, odc, deepcluster, random", [
    ("imagenet-1percent", 12811, (32.39, 61.02), (33.44, 58.62), (1.56, 4.99)),
    ("imagenet-10percent", 128116, (58.15, 82.55), (52.94, 77.96), (21.78, 44.24))])
def test_published_rows_of_semi_supervised_imagenet(name, train, odc, deepcluster, random):
    table = published_table(name, {}, imagenet_run(train))
    assert table.columns == (FINE_TUNED,)
    for i, n in enumerate((1, 5)):
        assert table.rows[f"ODC, top-{n}"] == (odc[i],)
        assert table.rows[f"DeepCluster (Sobel input), top-{n}"] == (deepcluster[i],)
        assert table.rows[f"random (Kaiming), top-{n}"] == (random[i],)
    # The rows are the best of these learning rates, so a run with another of them may be compared.
    for changed in ({"lr": 0.001}, {"head_lr": 1.0}, {"lr": 0.01, "head_lr": 100.0}):
        assert published_table(name, changed, imagenet_run(train)) is not None
    for changed in ({"lr": 0.02}, {"epochs": 10}, {"lr": 0.01, "batch_size": 64}):
        assert published_table(name, changed, imagenet_run(train)) is None
    assert published_table(name, {}, imagenet_run()) is None  # all of the labels


# --- the images to train on ----------------------------------------------------------------------


def named_images():
    """12 images of three classes, some with spaces in their names."""
    names = [f"class {k}/image {i}.png" for k in range(3) for i in range(4)]
    return ImageSet("folder", "train", "/data", names=Names(names), classes=list("abc"),
                    labels=torch.arange(12) // 4)


def test_subset(tmp_path):
    lines = ["\ufeffclass 2/image 3.png", "class 0/image 1.png 0", "", "class 1/image 0.png 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    chosen = choose_images(named_images(), str(tmp_path / "list.txt"))
    assert [chosen.name_of(i) for i in range(3)] == [
        "class 0/image 1.png", "class 1/image 0.png", "class 2/image 3.png"]
    assert chosen.labels.tolist() == [0, 1, 2] and chosen.classes == list("abc")


@pytest.mark.parametrize("text, message", [
    ("class 0/image 1.png\nclass 0/none.png\n", "1 of its 2 images .* but not 'class 0/none.png'"),
    ("", "0 of its 0 images.* 2 or more"), ("class 0/image 1.png", "1 of its 1 images.* 2 or more"),
    ("\x80\udcff", "0 of its 1 images")])
def test_subset_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "list.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"--subset .*list.txt: {message}"):
        choose_images(named_images(), str(tmp_path / "list.txt"))


def test_train_share():
    dataset = ImageSet("shapes", "train", "shapes", pixels=np.arange(100, dtype=np.uint8),
                       labels=torch.tensor([0] * 60 + [1] * 30 + [2] * 10), classes=list("abc"))
    chosen = choose_images(dataset, train_share=0.1, seed=1)
    assert chosen.labels.bincount().tolist() == [6, 3, 1]
    assert (dataset.labels[chosen.pixels.astype(int)] == chosen.labels).all()
    again, other = (choose_images(dataset, train_share=0.1, seed=seed) for seed in (1, 2))
    assert (again.pixels == chosen.pixels).all() and (other.pixels != chosen.pixels).any()
    assert again.fingerprint == chosen.fingerprint != other.fingerprint
    assert choose_images(dataset, train_share=0.01).labels.tolist() == [0, 1, 2]
    assert choose_images(dataset) is dataset


# --- runs on made-up images ----------------------------------------------------------------------


def colours(split, count, seed):
    """Images whose class is their colour, with noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    pixels = generator.integers(0, 120, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return ImageSet("made up", split, "colours", pixels=pixels.astype(np.uint8),
                    labels=torch.from_numpy(labels), classes=["red", "green", "blue"])


PROTOCOL = Protocol(
    "made up", ("Feature2", "Feature5"), epochs=4, lr=0.05, lr_steps=(2, 3), weight_decay=1e-4,
    nesterov=True, train_transform="imagenet-multihead", reported="last", batch_size=16)
ALL_COLUMNS = dataclasses.replace(PROTOCOL, columns=(*COLUMNS, AVGPOOL))
FINE_TUNING = dataclasses.replace(PROTOCOLS["finetune"].shortened(3), batch_size=16)


class Run:
    """eval_linear.py's parts on made-up images, as its `main` puts them together."""

    def __init__(self, output=None, protocol=PROTOCOL, val_seed=1, seed=0):
        torch.manual_seed(7)
        backbone = ResNet("narrow", True).eval().requires_grad_(False)
        self.args = SimpleNamespace(output=output and str(output), seed=seed)
        self.network = FrozenBackbone(
            backbone, weights_fingerprint(backbone), "made up", colours("train", 74, 0),
            colours("val", 40, val_seed), 16, 0, CPU, "off")
        self.protocol = protocol
        self.classifiers = make_classifiers(self.network, protocol)
        self.optimizer = make_optimizer(self.classifiers, protocol)

    @property
    def parts(self):
        return self.args, self.network, self.protocol, self.classifiers, self.optimizer

    def load(self):
        """The history of the checkpoint."""
        self.settings = eval_linear.settings_of(self.args, self.network, self.protocol)
        return load_checkpoint(self.args, self.settings, self.classifiers, self.optimizer)

    def save(self):
        """Load, then save with no epoch done."""
        history = self.load()
        save_checkpoint(self.args, self.settings, self.classifiers, self.optimizer, history)

    def train(self):
        """Train to the end, from the checkpoint if there is one; returns the history."""
        history = self.load()
        eval_linear.train(*self.parts, history)
        return history


@pytest.fixture
def path(tmp_path):
    """Where a run whose --output is run.json keeps its checkpoint."""
    return tmp_path / "run.checkpoint.pth"


def output(path):
    return path.with_name("run.json")


# --- the arithmetic ------------------------------------------------------------------------------


GRIDS = {**dict(zip(COLUMNS, (12, 6, 4, 3, 2))), AVGPOOL: 1, FINE_TUNED: 1}


class PlainClassifiers(nn.Module):
    """The recipe's words in PyTorch's modules, with the weights of some LinearClassifiers."""

    def __init__(self, run):
        super().__init__()
        self.backbone, self.heads = copy.deepcopy(run.network.backbone), nn.ModuleList()
        self.fine_tuning = run.protocol.columns == (FINE_TUNED,)
        shapes = map_shapes(self.backbone, 16)
        self.maps = [COLUMNS.index(c) if c in COLUMNS else 4 for c in run.protocol.columns]
        for column, i in zip(run.protocol.columns, self.maps):
            channels, grid = shapes[i][0], min(GRIDS[column], shapes[i][1])
            norm = nn.BatchNorm2d(channels, affine=False, momentum=0.1)
            self.heads.append(nn.Sequential(
                nn.AdaptiveAvgPool2d(grid), norm if column in COLUMNS else nn.Identity(),
                nn.Flatten(), nn.Linear(channels * grid**2, 3)))
            self.heads[-1][3].load_state_dict(run.classifiers.linears[column].state_dict())

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and self.fine_tuning)
        return self

    def forward(self, images):
        maps = self.backbone(images)
        return [head(maps[i]) for head, i in zip(self.heads, self.maps)]


def plain_epoch(run, W):
    """The first epoch by PlainClassifiers, one copy for each of W processes: copies, losses.

    A copy has its part of each batch, and normalises by it. The gradients of all are summed.
    """
    p, images = run.protocol, run.network.train
    copies = [PlainClassifiers(run).train()]
    groups = [dict(params=copies[0].heads.parameters(), lr=p.lr * p.head_lr)]
    if copies[0].fine_tuning:
        copies[0].backbone.requires_grad_(True)
        groups.append(dict(params=copies[0].backbone.parameters(), lr=p.lr))
    copies += [copy.deepcopy(copies[0]) for _ in range(W - 1)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=p.nesterov,
                                weight_decay=p.weight_decay)
    losses = []
    for batch in epoch_batches(images, LINEAR_AUGMENTATIONS[p.train_transform], 16, p.batch_size,
                               seed=0, epoch=0):
        pixels, labels = augment_batch(batch.images, batch.draws), images.labels[batch.indices]
        ends = [len(labels) * r // W for r in range(W + 1)]
        losses.append(0)
        for module, start, end in zip(copies, ends, ends[1:]):
            losses[-1] += torch.stack([
                F.cross_entropy(logits, labels[start:end], reduction="sum") / len(labels)
                for logits in module(pixels[start:end])])
        optimizer.zero_grad()
        losses[-1].sum().backward()
        for parameters in zip(*(module.parameters() for module in copies)):
            for other in parameters[1:] if parameters[0].grad is not None else ():
                parameters[0].grad += other.grad
                other.grad = None
        optimizer.step()
        for module in copies[1:]:
            for own, first in zip(module.parameters(), copies[0].parameters()):
                own.data.copy_(first.data)
    return copies[0], torch.stack(losses).mean(0).tolist()


def first_epoch(protocol):
    """Losses and state after the first epoch of eval_linear.py, on this process."""
    run = Run(protocol=protocol)
    losses = train_epoch(*run.parts, 0)
    distributed.share_statistics(run.classifiers)
    return losses, {name: value.clone() for name, value in run.classifiers.state_dict().items()}


@pytest.mark.parametrize("W", [1, 2])
@pytest.mark.parametrize("protocol", [ALL_COLUMNS, FINE_TUNING], ids=["linear", "fine-tuning"])
def test_an_epoch_is_plain_pytorch(protocol, W):
    """On a CPU each process normalises by its own part; then all have the statistics of the first.
    """
    plain, expected = plain_epoch(Run(protocol=protocol), W)
    runs = [first_epoch(protocol)] if W == 1 else run_processes(first_epoch, W, protocol)
    for losses, state in runs:
        assert losses == pytest.approx(expected, rel=1e-4)
        for head, column in zip(plain.heads, protocol.columns):
            torch.testing.assert_close(state[f"linears.{column}.weight"], head[3].weight.data,
                                       rtol=1e-3, atol=1e-5)
            if column in COLUMNS:
                torch.testing.assert_close(state[f"features.{column}.1.running_var"],
                                           head[1].running_var)
        for name, value in plain.backbone.state_dict().items() if plain.fine_tuning else ():
            torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=1e-3, atol=5e-5)


def test_cuda_processes_share_their_batch_norm(monkeypatch):
    run = Run(protocol=FINE_TUNING)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in run.classifiers.modules())
    converted = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(run.network, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: converted.append(device) or module)
    classifiers = make_classifiers(run.network, FINE_TUNING)
    assert count == sum(isinstance(m, nn.SyncBatchNorm) for m in classifiers.modules()) > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in classifiers.modules())
    assert converted == [run.network.device]


@pytest.mark.parametrize("protocol, column", [(PROTOCOL, "Feature2"), (FINE_TUNING, FINE_TUNED)])
def test_initial_weights(protocol, column):
    first, second, other = (
        make_classifiers(Run().network, protocol, seed).linears[column] for seed in (0, 0, 1))
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.15)  # 48 to 1728 numbers
    assert abs(first.weight.mean().item()) < 2e-3 and not first.bias.any()
    assert torch.equal(first.weight, second.weight) and not torch.equal(first.weight, other.weight)


def test_learns_and_leaves_the_backbone_alone():
    run = Run()
    results = choose_results(run.protocol, run.train())
    assert results["Feature2"]["top1"] > 60 and results["Feature2"]["epoch"] == 4
    assert results["Feature2"]["top5"] == 100  # of three classes
    assert weights_fingerprint(run.network.backbone) == run.network.fingerprint


@pytest.mark.parametrize("protocol, expected", [
    (PROTOCOL, [[0.05], [0.05], [0.005], [0.0005]]),
    (dataclasses.replace(FINE_TUNING, lr=0.1, head_lr=10.0, lr_steps=(1, 2)),
     [[1, 0.1], [0.2, 0.02], [0.04, 0.004]])])
def test_learning_rate_schedule(monkeypatch, protocol, expected):
    rates = []
    monkeypatch.setattr(eval_linear, "evaluate", lambda *_: {})
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: rates.append(
        [group["lr"] for group in optimizer.param_groups]))
    Run(protocol=protocol).train()
    assert rates[::5] == [pytest.approx(rate) for rate in expected]  # 74 images, 16 in a batch


# --- runs that stop and continue -----------------------------------------------------------------


@pytest.mark.parametrize("protocol, stop", [(PROTOCOL, 0), (PROTOCOL, 13), (FINE_TUNING, 8)])
def test_resumed_run_is_the_same_run(path, monkeypatch, protocol, stop):
    """A signal comes after some of 15 or 20 steps. The epoch begins anew."""
    whole = Run(protocol=protocol)
    history = whole.train()
    count, step = 0, torch.optim.SGD.step

    def counted(*arguments):
        nonlocal count
        count += 1
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", counted)
        patch.setattr(launch, "signal_is_pending", lambda: count == stop)
        message = f"Stopped in epoch {stop // 5 + 1},.*command begins this epoch anew"
        with pytest.raises(Interrupted, match=message):
            Run(output(path), protocol).train()
    assert path.exists() == (stop >= 5)
    resumed = Run(output(path), protocol)
    assert resumed.load() == history[: stop // 5]
    assert resumed.train() == history
    for key, value in whole.classifiers.state_dict().items():
        assert torch.equal(value, resumed.classifiers.state_dict()[key])


def test_finished_run_is_not_run_again(path, monkeypatch):
    history = Run(output(path)).train()
    monkeypatch.delattr(eval_linear, "train_epoch")
    assert Run(output(path)).train() == history


@pytest.mark.parametrize("change, message", [
    (dict(protocol=dataclasses.replace(PROTOCOL, lr=0.06)), "run with lr 0.05, not 0.06"),
    (dict(val_seed=2), "val images"), (dict(seed=1), "seed 0, not 1")])
def test_other_run_is_refused(path, change, message):
    Run(output(path)).save()
    with pytest.raises(UserError, match=message):
        Run(output(path), **change).load()


def test_other_file_is_refused(path):
    checkpoint.write_dict(path, {"program": "odc train"})
    with pytest.raises(UserError, match="not a checkpoint of this version of eval_linear.py"):
        Run(output(path)).load()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="run.checkpoint.pth"):
        Run(output(path)).load()


def test_loss_that_is_not_finite_keeps_the_checkpoint(path):
    run = Run(output(path))
    run.save()
    before = path.read_bytes()
    run.classifiers.linears["Feature5"].bias.data[1] = torch.nan
    with pytest.raises(UserError, match="not finite in epoch 1: lower --lr"):
        eval_linear.train(*run.parts, [])
    assert path.read_bytes() == before


def test_last_or_best_epoch():
    history = [{"Feature5": [top1, 99.0]} for top1 in (50.0, 70.0, 70.0, 60.0)]
    for reported, top1, epoch in (("last", 60.0, 4), ("best", 70.0, 2)):
        protocol = dataclasses.replace(PROTOCOL, columns=("Feature5",), reported=reported)
        assert choose_results(protocol, history) == {
            "Feature5": dict(top1=top1, top5=99.0, epoch=epoch)}


# --- the accuracy --------------------------------------------------------------------------------


class Answers(nn.Module):
    """Gives fixed answers [N] to the images in their order, and in Feature5 the opposite ones."""

    columns = ["Feature2", "Feature5"]

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        now, self.answers = self.answers.split([len(images), len(self.answers) - len(images)])
        logits = F.one_hot(now, 3).float()
        return {"Feature2": logits, "Feature5": -logits}


def accuracy_of_fixed_answers():
    """The accuracy of fixed answers [40], from 1 or 2 processes."""
    run, answers = Run(), torch.tensor([0, 1, 2]).repeat(14)[:40]
    accuracy = evaluate(run.network, run.protocol, Answers(answers[distributed.shard(40)]))
    return answers, run.network.val.labels, accuracy


def test_accuracy_counts_every_val_image_once():
    answers, labels, accuracy = accuracy_of_fixed_answers()
    hits = (answers == labels).double()
    assert accuracy["Feature2"][0] == pytest.approx(100 * hits.mean().item())
    assert accuracy["Feature5"][0] <= 100 * (1 - hits).mean().item()
    assert accuracy["Feature5"][1] == 100
    for *_, other in run_processes(accuracy_of_fixed_answers, 2):
        assert other == accuracy
