"""Linear evaluation and fine-tuning: the recipes' values, plain PyTorch's results, resuming."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval_linear
from eval_linear import (
    evaluate, load_checkpoint, make_parser, save_checkpoint, settings_of, train, train_epoch)
from odc import distributed
from odc.data.augmentation import (
    LINEAR_AUGMENTATIONS, Augmentation, augment_batch, evaluation_transform, normalise)
from odc.data.images import ImageSet, file_names
from odc.data.loader import epoch_batches
from odc.errors import Interrupted, UserError
from odc.evaluation.frozen_backbone import FrozenBackbone
from odc.evaluation.linear import (
    AVGPOOL, COLUMNS, FINE_TUNED, PROTOCOLS, LinearClassifiers, Protocol, choose_images,
    choose_protocol, choose_results, make_optimizer)
from odc.evaluation.pooling import map_shapes
from odc.features import weights_fingerprint
from odc.model import ResNet
from odc.runtime import checkpoint, launch
from tests.processes import run_processes


@pytest.mark.parametrize("name, columns, epochs, lr, steps, gamma, decay, head_lr, reported", [
    ("imagenet-multihead", COLUMNS, 90, 0.01, (30, 60), 0.1, 1e-4, 1, "last"),
    ("imagenet-avgpool", (AVGPOOL,), 100, 30.0, (60, 80), 0.1, 0.0, 1, "best"),
    ("places205", COLUMNS, 28, 0.01, (7, 14, 21), 0.1, 1e-4, 1, "last"),
    ("inaturalist2018", COLUMNS, 84, 0.01, (24, 48, 72), 0.1, 1e-4, 1, "last"),
    ("imagenet-1percent", (FINE_TUNED,), 20, 0.1, (12, 16), 0.2, 5e-4, 100, "last"),
    ("imagenet-10percent", (FINE_TUNED,), 20, 0.1, (12, 16), 0.2, 1e-4, 10, "last")])
def test_values_of_protocols(name, columns, epochs, lr, steps, gamma, decay, head_lr, reported):
    p = PROTOCOLS[name]
    assert (p.columns, p.epochs, p.lr, p.lr_steps) == (columns, epochs, lr, steps)
    assert (p.lr_gamma, p.weight_decay, p.head_lr, p.reported) == (gamma, decay, head_lr, reported)
    assert (p.nesterov, p.batch_size) == (columns == COLUMNS, 256)
    assert p.train_transform == ("imagenet-avgpool" if "percent" in name else name)
    if columns != COLUMNS:
        assert LINEAR_AUGMENTATIONS[p.train_transform] == Augmentation(
            min_scale=0.08, flip=0.5, rotation=0, jitter=(0,) * 4, grayscale=0)


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
    given = ["--epochs", "30", "--batch-size", "64", "--lr", "0.5"]
    _, protocol, changed = choose("imagenet", 1000, *given)
    assert changed == dict(epochs=30, lr_steps=(10, 20), batch_size=64, lr=0.5)
    assert dataclasses.asdict(protocol).items() >= changed.items()
    assert choose("shapes", 3, "--protocol", "finetune", "--head-lr", "7")[2] == dict(head_lr=7)


@pytest.mark.parametrize("arguments, message", [
    (["--head-lr", "10"], "--head-lr 10 is for fine-tuning"),
    (["--protocol", "imagenet-1percent"], "--subset, or a --train-share"),
    (["--subset", "a", "--train-share", "0.1"], "not allowed with argument --subset"),
    (["--batch-size", "3"], "at least 4 each: choose a --batch-size")])
def test_settings_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        choose("shapes", 3, *arguments)


@pytest.mark.parametrize("lines, expected", [
    (["\ufeffclass 2/image 3.png", "class 0/image 1.png 0", "", "class 1/image 0.png 1"],
     ["class 0/image 1.png", "class 1/image 0.png", "class 2/image 3.png"]),
    (["class 0/image 1.png", "class 0/none.png"], "1 of its 2 images are not .*'class 0/none.png'"),
    ([], "0 of its 0 images"), (["\x80\udcff"], "1 of its 1 images")])
def test_subset(tmp_path, lines, expected):
    (tmp_path / "list").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    names = [f"class {k}/image {i}.png" for k in range(3) for i in range(4)]
    dataset = ImageSet("folder", "train", "/data", file_names(names), labels=torch.arange(12) // 4)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"--subset .*list: {expected}"):
            choose_images(dataset, str(tmp_path / "list"))
    else:
        chosen = choose_images(dataset, str(tmp_path / "list"))
        assert [chosen.name_of(i) for i in range(3)] == expected
        assert chosen.labels.tolist() == [0, 1, 2]


def test_train_share():
    dataset = ImageSet("shapes", "train", "shapes", pixels=np.arange(100, dtype=np.uint8),
                       labels=torch.tensor([0] * 60 + [1] * 30 + [2] * 10), classes=list("abc"))
    chosen, again, other = (choose_images(dataset, None, 0.1, seed) for seed in (1, 1, 2))
    assert chosen.labels.bincount().tolist() == [6, 3, 1]
    assert (dataset.labels[chosen.pixels.astype(int)] == chosen.labels).all()
    assert again.fingerprint == chosen.fingerprint != other.fingerprint
    assert choose_images(dataset, train_share=0.01).labels.tolist() == [0, 1, 2]


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

    def __init__(self, path=None, protocol=PROTOCOL):
        torch.manual_seed(7)
        backbone = ResNet("narrow", True).eval().requires_grad_(False)
        args = SimpleNamespace(output=path and str(path.with_name("run.json")), seed=0)
        self.network = FrozenBackbone(backbone, "made up", colours("train", 74, 0),
                                      colours("val", 40, 1), 16, 0, torch.device("cpu"))
        self.protocol = protocol
        self.classifiers = LinearClassifiers(self.network, protocol.columns)
        self.parts = (args, self.network, protocol, self.classifiers,
                      make_optimizer(self.classifiers, protocol))

    def load(self):
        """The history of the checkpoint."""
        args, network, protocol, *saved = self.parts
        return load_checkpoint(args, settings_of(args, network, protocol), *saved)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.checkpoint.pth"


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
            norm = nn.BatchNorm2d(shapes[i][0], affine=False, momentum=0.1)
            self.heads.append(nn.Sequential(
                nn.AdaptiveAvgPool2d(min(GRIDS[column], shapes[i][1])),
                norm if column in COLUMNS else nn.Identity(), nn.Flatten(),
                copy.deepcopy(run.classifiers.linears[column])))

    def forward(self, images):
        maps = self.backbone.train(self.fine_tuning)(images)
        return [head(maps[i]) for head, i in zip(self.heads, self.maps)]


def plain_epoch(run, W):
    """The first epoch by PlainClassifiers, as W processes share it: the module, its losses.

    Each part of a batch is normalised by itself, and the statistics are those of the first part.
    """
    p, images, module = run.protocol, run.network.train, PlainClassifiers(run)
    groups = [dict(params=module.heads.parameters(), lr=p.lr * p.head_lr)]
    if module.fine_tuning:
        module.backbone.requires_grad_(True)
        groups.append(dict(params=module.backbone.parameters(), lr=p.lr))
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=p.nesterov,
                                weight_decay=p.weight_decay)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    losses = []
    for batch in epoch_batches(images, LINEAR_AUGMENTATIONS[p.train_transform], 16, p.batch_size,
                               seed=0, epoch=0):
        labels, parts = images.labels[batch.indices], []
        ends = [len(labels) * r // W for r in range(W + 1)]
        for r, part in enumerate(map(slice, ends, ends[1:])):
            for norm in norms:
                norm.momentum = 0.1 if r == 0 else 0.0
            parts.append(module(augment_batch(batch.images[part], batch.draws[part])))
        losses.append(torch.stack([F.cross_entropy(torch.cat(logits), labels)
                                   for logits in zip(*parts)]))
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    return module, torch.stack(losses).mean(0).tolist()


def first_epoch(protocol):
    """Losses and state after the first epoch of eval_linear.py, on this process."""
    run = Run(protocol=protocol)
    losses = train_epoch(*run.parts, 0)
    distributed.share_statistics(run.classifiers)
    return losses, run.classifiers.state_dict()


@pytest.mark.parametrize("W", [1, 2])
@pytest.mark.parametrize("protocol", [ALL_COLUMNS, FINE_TUNING], ids=["linear", "fine-tuning"])
def test_an_epoch_is_plain_pytorch(protocol, W):
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
            if value.is_floating_point():
                torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=1e-3, atol=5e-5)


def test_cuda_processes_share_their_batch_norm(monkeypatch):
    run = Run(protocol=FINE_TUNING)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in run.classifiers.modules())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(run.network, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    modules = list(LinearClassifiers(run.network, FINE_TUNING.columns).modules())
    assert count == sum(isinstance(m, nn.SyncBatchNorm) for m in modules) > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)


def test_initial_weights():
    first, again, other = (
        LinearClassifiers(Run().network, [AVGPOOL], seed).linears[AVGPOOL] for seed in (0, 0, 1))
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.15) and not first.bias.any()
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


def test_learns_and_leaves_the_backbone_alone():
    run = Run()
    before = weights_fingerprint(run.network.backbone)
    top1, top5 = train(*run.parts)[-1]["Feature2"]
    assert top1 > 60 and top5 == 100  # of three classes
    assert weights_fingerprint(run.network.backbone) == before


@pytest.mark.parametrize("protocol, expected", [
    (PROTOCOL, [[0.05], [0.05], [0.005], [0.0005]]),
    (dataclasses.replace(FINE_TUNING, lr=0.1, head_lr=10.0, lr_steps=(1, 2)),
     [[1, 0.1], [0.2, 0.02], [0.04, 0.004]])])
def test_learning_rate_schedule(monkeypatch, protocol, expected):
    rates = []
    monkeypatch.setattr(eval_linear, "evaluate", lambda *_: {})
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: rates.append(
        [group["lr"] for group in optimizer.param_groups]))
    train(*Run(protocol=protocol).parts)
    assert rates[::5] == [pytest.approx(rate) for rate in expected]  # 74 images, 16 in a batch


@pytest.mark.parametrize("protocol, stop", [(PROTOCOL, 0), (PROTOCOL, 13), (FINE_TUNING, 8)])
def test_resumed_run_is_the_same_run(path, monkeypatch, protocol, stop):
    """A signal comes after some of 15 or 20 steps. The epoch begins anew."""
    whole = Run(protocol=protocol)
    history = train(*whole.parts)
    steps, step = [], torch.optim.SGD.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *args: (steps.append(1), step(*args)))
        patch.setattr(launch, "signal_is_pending", lambda: len(steps) == stop)
        with pytest.raises(Interrupted):
            train(*Run(path, protocol).parts)
    assert path.exists() == (stop >= 5)
    assert Run(path, protocol).load() == history[: stop // 5]
    resumed = Run(path, protocol)
    assert train(*resumed.parts) == history
    for key, value in whole.classifiers.state_dict().items():
        assert torch.equal(value, resumed.classifiers.state_dict()[key])
    monkeypatch.delattr(eval_linear, "train_epoch")  # a finished run is not run again
    assert train(*Run(path, protocol).parts) == history


@pytest.mark.parametrize("change, words", [
    (dict(program="odc train"), "no checkpoint of eval_linear.py"),
    (dict(classifiers={}), "damaged"), (dict(optimizer={}), "damaged")])
def test_a_file_that_does_not_fit_is_refused(path, change, words):
    args, network, protocol, *parts = Run(path).parts
    settings = settings_of(args, network, protocol)
    save_checkpoint(args, settings, *parts, [dict.fromkeys(protocol.columns, [60.0, 90.0])])
    assert len(Run(path).load()) == 1
    checkpoint.write_dict(path, checkpoint.read_dict(path) | change)
    with pytest.raises(UserError, match=f"{path}.*{words}"):
        Run(path).load()


def test_a_loss_that_is_not_finite_is_not_saved(path):
    with pytest.raises(UserError, match="not finite in epoch 1: lower --lr"):
        train(*Run(path, dataclasses.replace(PROTOCOL, lr=1e38)).parts)
    assert not path.exists()


@pytest.mark.parametrize("reported, top1, epoch", [("last", 60.0, 4), ("best", 70.0, 2)])
def test_last_or_best_epoch(reported, top1, epoch):
    history = [{"Feature5": [top1, 99.0]} for top1 in (50.0, 70.0, 70.0, 60.0)]
    protocol = dataclasses.replace(PROTOCOL, columns=("Feature5",), reported=reported)
    assert choose_results(protocol, history)["Feature5"] == dict(top1=top1, top5=99, epoch=epoch)


def accuracy_of_a_run():
    run = Run()
    return evaluate(run.network, run.protocol, run.classifiers)


def test_accuracy_counts_every_val_image_once():
    run = Run()
    images = torch.stack([evaluation_transform(16)(run.network.val.load(i)) for i in range(40)])
    logits = run.classifiers.eval()(normalise(images))["Feature5"]
    top1 = 100 * (logits.argmax(1) == run.network.val.labels).double().mean().item()
    for accuracy in accuracy_of_a_run(), *run_processes(accuracy_of_a_run, 2):
        assert accuracy["Feature5"] == pytest.approx([top1, 100])  # of three classes
