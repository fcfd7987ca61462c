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
from eval_linear import evaluate, make_parser, restore, save, train_epoch
from odc import distributed
from odc.data.augmentation import LINEAR_AUGMENTATIONS, augment_batch
from odc.data.images import ImageSet, Names
from odc.data.loader import epoch_batches
from odc.errors import Interrupted, UserError
from odc.evaluation.frozen_backbone import FrozenBackbone
from odc.evaluation.linear import (
    AVGPOOL, COLUMNS, FINE_TUNED, PROTOCOLS, FineTuned, LinearClassifiers, Protocol,
    choose_images, choose_protocols, choose_results, make_classifiers, published_table)
from odc.evaluation.pooling import map_shapes
from odc.features import weights_fingerprint
from odc.model import ResNet
from odc.runtime import checkpoint, launch
from tests.processes import run_processes

CPU = torch.device("cpu")


# --- the protocols, value by value ---------------------------------------------------------------


@pytest.mark.parametrize("name, classes, columns, epochs, lr, steps, nesterov, decay, reported", [
    ("imagenet-multihead", 1000, COLUMNS, 90, 0.01, (30, 60), True, 1e-4, "last"),
    ("imagenet-avgpool", 1000, (AVGPOOL,), 100, 30.0, (60, 80), False, 0.0, "best"),
    ("places205", 205, COLUMNS, 28, 0.01, (7, 14, 21), True, 1e-4, "last"),
    ("inaturalist2018", 8142, COLUMNS, 84, 0.01, (24, 48, 72), True, 1e-4, "last"),
])
def test_values_of_linear_protocols(name, classes, columns, epochs, lr, steps, nesterov, decay,
                                    reported):
    p = PROTOCOLS[name]
    assert (p.classes, p.columns, p.epochs, p.lr, p.lr_steps) == (classes, columns, epochs, lr,
                                                                  steps)
    assert (p.nesterov, p.weight_decay, p.reported) == (nesterov, decay, reported)
    assert p.train_transform == name
    assert (p.batch_size, p.lr_gamma, p.momentum, p.head_lr) == (256, 0.1, 0.9, 1.0)


@pytest.mark.parametrize("name, decay, head", [("imagenet-1percent", 5e-4, 100.0),
                                               ("imagenet-10percent", 1e-4, 10.0)])
def test_values_of_fine_tuning(name, decay, head):
    p = PROTOCOLS[name]
    assert (p.classes, p.columns, p.epochs, p.lr_steps) == (1000, (FINE_TUNED,), 20, (12, 16))
    assert (p.lr, p.head_lr, p.lr_gamma, p.weight_decay) == (0.1, head, 0.2, decay)
    assert (p.batch_size, p.momentum, p.nesterov, p.reported) == (256, 0.9, False, "last")
    crops = LINEAR_AUGMENTATIONS[p.train_transform]
    assert (crops.min_scale, crops.flip, crops.fixed_scale) == (0.08, 0.5, False)
    assert (crops.rotation, crops.jitter, crops.grayscale, crops.lighting) == (0, (0,) * 4, 0, 0)


def choose(name, classes, *arguments):
    """(name, Protocol, settings that are not the recipe's) for data with so many classes."""
    dataset = ImageSet(name, "train", "/data", classes=[str(k) for k in range(classes)])
    args = make_parser().parse_args(["--weights", "w", *arguments])
    name, protocols, changed = choose_protocols(args, dataset)
    return name, protocols[0], changed


def test_data_with_a_protocol_of_its_own():
    expected = "imagenet-multihead", PROTOCOLS["imagenet-multihead"], {}
    assert choose("imagenet", 1000) == expected
    assert choose("places205", 205)[0] == "places205"
    assert choose("inaturalist2018", 8142)[0] == "inaturalist2018"


def test_other_data_get_the_short_form():
    for name in ("shapes", "imagenet"):
        expected = "short", dataclasses.replace(PROTOCOLS["short"], classes=10), {}
        assert choose(name, 10) == expected
    expected = dataclasses.replace(PROTOCOLS["finetune"], classes=10)
    assert choose("shapes", 10, "--protocol", "finetune")[1:] == (expected, {})


def test_every_setting_can_be_given():
    _, protocol, changed = choose(
        "imagenet", 1000, "--epochs", "30", "--batch-size", "64", "--lr", "0.5", "--lr-gamma",
        "0.2", "--momentum", "0.8", "--weight-decay", "0.1", "--train-transform", "places205",
        "--reported", "best")
    assert changed == dict(
        epochs=30, lr_steps=(10, 20), batch_size=64, lr=0.5, lr_gamma=0.2, momentum=0.8,
        weight_decay=0.1, train_transform="places205", reported="best")
    assert dataclasses.asdict(protocol).items() >= changed.items()
    assert choose("imagenet", 1000, "--epochs", "30", "--lr-steps", "5")[1].lr_steps == (5,)
    assert choose("imagenet", 1000, "--lr-steps")[1].lr_steps == ()
    fine_tuning = choose("shapes", 3, "--protocol", "finetune", "--head-lr", "7")
    assert fine_tuning[2] == dict(head_lr=7)


def test_class_counts_must_match():
    for arguments in (["--protocol", "imagenet-multihead"],
                      ["--protocol", "places205", "--num-classes", "4"]):
        with pytest.raises(UserError, match="does not match /data, which has 3.*--num-classes 3"):
            choose("imagenet", 3, *arguments)
    _, protocol, _ = choose("imagenet", 3, "--protocol", "imagenet-multihead",
                            "--num-classes", "3")
    assert protocol.classes == 3


@pytest.mark.parametrize("arguments, message", [
    (["--head-lr", "10"], "--head-lr 10 is for fine-tuning"),
    (["--protocol", "imagenet-1percent", "--num-classes", "3"], "--subset, or a --train-share"),
    (["--protocol", "finetune", "--with-avgpool"], "--with-avgpool needs a frozen backbone"),
    (["--protocol", "finetune", "--amp", "fp16"], "--amp fp16.*use bf16 or off")])
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
    for changed in ({"lr": 0.02}, {"epochs": 10}, {"lr": 0.01, "epochs": 10}):
        assert published_table(name, changed, imagenet_run(train)) is None
    assert published_table(name, {}, imagenet_run()) is None  # all of the labels


# --- the images to train on ----------------------------------------------------------------------


def named_images():
    """12 images of three classes, some with spaces in their names."""
    names = [f"class {k}/image {i}.png" for k in range(3) for i in range(4)]
    return ImageSet("folder", "train", "/data", names=Names(names), classes=list("abc"),
                    labels=torch.arange(12) // 4)


def test_subset(tmp_path):
    lines = ["class 2/image 3.png", "class 0/image 1.png 0", "", "class 1/image 0.png 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    chosen = choose_images(named_images(), str(tmp_path / "list.txt"))
    assert [chosen.name_of(i) for i in range(3)] == [
        "class 0/image 1.png", "class 1/image 0.png", "class 2/image 3.png"]
    assert chosen.labels.tolist() == [0, 1, 2] and chosen.classes == list("abc")


def test_a_whole_name_in_a_subset_comes_before_a_name_and_a_label(tmp_path):
    names = ["a.png", "a.png 2.png", "b.png"]
    dataset = ImageSet("folder", "train", "/data", names=Names(names), classes=list("ab"),
                       labels=torch.tensor([0, 0, 1]))
    (tmp_path / "list.txt").write_text("\ufeffa.png 2.png\nb.png\n", encoding="utf-8")
    chosen = choose_images(dataset, str(tmp_path / "list.txt"))
    assert [chosen.name_of(i) for i in range(len(chosen))] == ["a.png 2.png", "b.png"]


@pytest.mark.parametrize("text, message", [
    ("class 0/image 1.png\nclass 0/none.png\n", "1 of its 2 images, such as 'class 0/none.png'"),
    ("", "fewer than 2 images"), ("class 0/image 1.png", "fewer than 2 images"),
    ("\x80\udcff", "1 of its 1 images")])
def test_subset_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "list.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"--subset .*list.txt: .*{message}"):
        choose_images(named_images(), str(tmp_path / "list.txt"))


def test_train_share():
    dataset = ImageSet("shapes", "train", "shapes", pixels=np.arange(100, dtype=np.uint8),
                       labels=torch.tensor([0] * 60 + [1] * 30 + [2] * 10), classes=list("abc"))
    chosen = choose_images(dataset, train_share=0.1, seed=1)
    assert chosen.labels.bincount().tolist() == [6, 3, 1]
    assert (dataset.labels[chosen.pixels.astype(int)] == chosen.labels).all()
    again, other = (choose_images(dataset, train_share=0.1, seed=seed) for seed in (1, 2))
    assert (again.pixels == chosen.pixels).all() and (other.pixels != chosen.pixels).any()
    assert choose_images(dataset, train_share=0.01).labels.tolist() == [0, 1, 2]
    assert choose_images(dataset) is dataset
    with pytest.raises(UserError, match="give one of them"):
        choose_images(dataset, "list.txt", 0.1)


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
    "made up", ("Feature2", "Feature5"), 3, epochs=4, lr=0.05, lr_steps=(2, 3), weight_decay=1e-4,
    nesterov=True, train_transform="imagenet-multihead", reported="last", batch_size=16)
FINE_TUNING = dataclasses.replace(
    PROTOCOLS["finetune"].shortened(3), classes=3, batch_size=16)


class Run:
    """eval_linear.py's parts on made-up images, as its `main` puts them together."""

    def __init__(self, output=None, protocols=(PROTOCOL,), count=74, val_seed=1,
                 checkpoint_interval=1000):
        torch.manual_seed(7)
        backbone = ResNet("narrow", True).eval().requires_grad_(False)
        self.args = SimpleNamespace(output=output and str(output), seed=0, background=None,
                                    checkpoint_interval=checkpoint_interval)
        self.network = FrozenBackbone(
            backbone, weights_fingerprint(backbone), "made up", colours("train", count, 0),
            colours("val", 40, val_seed), 16, 0, CPU, "off")
        self.protocols = list(protocols)
        self.classifiers = make_classifiers(self.network, self.protocols, seed=0)
        self.optimizer = torch.optim.SGD(self.classifiers.optimizer_groups(self.protocols))
        self.progress = None

    @property
    def parts(self):
        return self.args, self.network, self.protocols, self.classifiers, self.optimizer

    def start(self):
        self.progress = restore(*self.parts)
        return self

    def train(self):
        """Train to the end, from the checkpoint if there is one."""
        self.start()
        eval_linear.train(*self.parts, self.progress)
        return self


class Killed(Exception):
    pass


def kill(*arguments):
    raise Killed


def kill_after(monkeypatch, steps):
    """Raise Killed instead of the optimizer's step that follows so many."""
    count, step = 0, torch.optim.SGD.step

    def step_or_die(*arguments):
        nonlocal count
        if count == steps:
            raise Killed
        count += 1
        return step(*arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", step_or_die)


@pytest.fixture
def path(tmp_path):
    """Where a run whose --output is run.json keeps its checkpoint."""
    return tmp_path / "run.checkpoint.pth"


def output(path):
    return path.with_name("run.json")


# --- the arithmetic ------------------------------------------------------------------------------


def training_batches(run):
    """The batches of the first epoch: images as the network sees them, and labels."""
    protocol, images = run.protocols[0], run.network.train
    for batch in epoch_batches(images, LINEAR_AUGMENTATIONS[protocol.train_transform], 16,
                               protocol.batch_size, seed=0, epoch=0):
        yield augment_batch(batch.images, batch.draws), images.labels[batch.indices]


def assert_equal_losses(run, losses):
    """The sums over an epoch are those of the losses [steps, columns]."""
    torch.testing.assert_close(torch.tensor(run.progress.losses), losses.sum(0).detach(),
                               rtol=1e-4, atol=1e-4)


def plain_classifier(shape, pool, column, classes):
    """The recipe's words in PyTorch's modules."""
    channels, size = shape[0], pool(torch.zeros(1, *shape)).shape[-1]
    norm = nn.Identity()
    if column != AVGPOOL:
        norm = nn.BatchNorm2d(channels, affine=False, momentum=0.1)
    return nn.Sequential(pool, norm, nn.Flatten(), nn.Linear(channels * size * size, classes))


def test_linear_classifiers_are_plain_pytorch():
    everything = dataclasses.replace(PROTOCOL, columns=(*COLUMNS, AVGPOOL))
    run = Run(protocols=[everything]).start()
    shapes = map_shapes(run.network.backbone, 16)
    pools = [nn.AdaptiveAvgPool2d(min(grid, shape[1]))
             for grid, shape in zip((12, 6, 4, 3, 2, 1), [*shapes, shapes[4]])]
    oracle = nn.ModuleList(plain_classifier(shape, pool, column, 3) for shape, pool, column
                           in zip([*shapes, shapes[4]], pools, everything.columns))
    for classifier, column in zip(oracle, everything.columns):
        classifier[3].load_state_dict(run.classifiers.linears[column].state_dict())
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.05, momentum=0.9, nesterov=True,
                                weight_decay=1e-4)
    losses = []
    for images, labels in training_batches(run):
        maps = run.network.backbone(images)
        losses.append(torch.stack([F.cross_entropy(classifier(feature_map), labels)
                                   for classifier, feature_map in zip(oracle, [*maps, maps[4]])]))
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    train_epoch(*run.parts, run.progress)
    assert_equal_losses(run, torch.stack(losses))
    for classifier, column in zip(oracle, everything.columns):
        torch.testing.assert_close(run.classifiers.linears[column].weight, classifier[3].weight,
                                   rtol=1e-3, atol=1e-5)


def test_fine_tuning_is_plain_pytorch():
    run = Run(protocols=[FINE_TUNING]).start()
    backbone = copy.deepcopy(run.network.backbone)
    for module in backbone.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d
    head = nn.Linear(backbone.out_channels[-1], 3)
    head.load_state_dict(run.classifiers.head.state_dict())
    optimizer = torch.optim.SGD(
        [dict(params=backbone.parameters(), lr=FINE_TUNING.lr),
         dict(params=head.parameters(), lr=FINE_TUNING.lr * FINE_TUNING.head_lr)],
        momentum=0.9, weight_decay=FINE_TUNING.weight_decay)
    losses = []
    backbone.train()
    for images, labels in training_batches(run):
        losses.append(F.cross_entropy(head(backbone(images)[-1].mean((2, 3))), labels)[None])
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    train_epoch(*run.parts, run.progress)
    assert_equal_losses(run, torch.stack(losses))
    expected = {**{f"backbone.{name}": value for name, value in backbone.state_dict().items()},
                **{f"head.{name}": value for name, value in head.state_dict().items()}}
    assert expected.keys() == run.classifiers.state_dict().keys()
    for name, value in run.classifiers.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_initial_weights():
    def make():
        return LinearClassifiers(None, map_shapes(ResNet("resnet18"), 64), COLUMNS, 50, seed=0)

    linear = make().linears["Feature3"]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(linear.weight.mean().item()) < 1e-4 and not linear.bias.any()
    assert torch.equal(linear.weight, make().linears["Feature3"].weight)
    first, second = (FineTuned(ResNet("narrow", True), 500, None, seed=0) for _ in range(2))
    assert first.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not first.head.bias.any() and torch.equal(first.head.weight, second.head.weight)


def test_learns_and_leaves_the_backbone_alone():
    run = Run().train()
    results = choose_results(run.protocols, run.progress.history)
    assert results["Feature2"]["top1"] > 60 and results["Feature2"]["epoch"] == 4
    assert results["Feature2"]["top5"] == 100  # of three classes
    assert weights_fingerprint(run.network.backbone) == run.network.fingerprint


def test_fine_tuning_learns_in_the_backbone():
    run = Run(protocols=[dataclasses.replace(FINE_TUNING, epochs=6, lr_steps=(4, 5))])
    before = {name: value.clone() for name, value in run.classifiers.state_dict().items()}
    run.train()
    assert run.progress.history[-1][FINE_TUNED][0] > 60
    assert all(not torch.equal(value, before[name])
               for name, value in run.classifiers.state_dict().items())


def test_learning_rate_schedule(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: rates.append(
        [group["lr"] for group in optimizer.param_groups]))
    avgpool = dataclasses.replace(PROTOCOL, columns=(AVGPOOL,), lr=30.0, lr_steps=(1,))
    Run(protocols=(PROTOCOL, avgpool)).train()
    expected = [0.05, 30], [0.05, 3], [0.005, 3], [0.0005, 3]
    assert rates[::5] == [pytest.approx(rate) for rate in expected]  # 74 images, 16 in a batch
    rates.clear()
    Run(protocols=[dataclasses.replace(FINE_TUNING, lr=0.1, head_lr=10.0, lr_steps=(1, 2))]).train()
    expected = [0.1, 1], [0.02, 0.2], [0.004, 0.04]
    assert rates[::5] == [pytest.approx(rate) for rate in expected]


# --- runs that stop and continue -----------------------------------------------------------------


@pytest.mark.parametrize("protocol, stop", [(PROTOCOL, 2), (PROTOCOL, 5), (PROTOCOL, 13),
                                            (FINE_TUNING, 8), (FINE_TUNING, 10)])
def test_resumed_run_is_the_same_run(path, monkeypatch, protocol, stop):
    """Killed after some of 15 or 20 steps, at a checkpoint or one to two steps behind it."""
    whole = Run(protocols=[protocol]).train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, stop)
        Run(output(path), [protocol], checkpoint_interval=3).train()
    resumed = Run(output(path), [protocol], checkpoint_interval=3).start()
    assert (resumed.progress.epoch, resumed.progress.step) > (0, 0) or stop < 3
    resumed.train()
    for key, value in whole.classifiers.state_dict().items():
        assert torch.equal(value, resumed.classifiers.state_dict()[key])
    assert resumed.progress.history == whole.progress.history


def test_killed_in_an_evaluation_evaluates_again(path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(eval_linear, "evaluate", kill)
        Run(output(path)).train()
    resumed = Run(output(path)).start()
    progress = resumed.progress
    assert (progress.epoch, progress.step, progress.history) == (0, 5, [])
    assert len(resumed.train().progress.history) == 4


def test_interrupted_in_an_epoch_saves_first(path, monkeypatch):
    run = Run(output(path)).start()
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        patch.setattr(launch, "signal_is_pending", lambda: run.progress.step == 2)
        eval_linear.train(*run.parts, run.progress)
    progress = Run(output(path)).start().progress
    assert (progress.epoch, progress.step) == (0, 3)


def test_finished_run_is_not_run_again(path, monkeypatch):
    first = Run(output(path)).train()
    monkeypatch.setattr(eval_linear, "train_epoch", kill)
    assert Run(output(path)).train().progress == first.progress


def test_other_run_is_refused(path):
    run = Run(output(path)).start()
    save(*run.parts, run.progress)
    with pytest.raises(UserError, match="lr of Feature2 Feature5 0.05, not 0.06"):
        Run(output(path), [dataclasses.replace(PROTOCOL, lr=0.06)]).start()
    with pytest.raises(UserError, match="val images"):
        Run(output(path), val_seed=2).start()
    relabelled, white = Run(output(path)), Run(output(path))
    relabelled.network.val.labels = relabelled.network.val.labels.flip(0)
    with pytest.raises(UserError, match="val images"):
        relabelled.start()
    white.args.background = "white"
    with pytest.raises(UserError, match="background None, not white"):
        white.start()
    checkpoint.save(path, {"program": "odc train"})
    with pytest.raises(UserError, match="not a checkpoint of eval_linear.py"):
        Run(output(path)).start()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="run.checkpoint.pth"):
        Run(output(path)).start()


def test_loss_that_is_not_finite_keeps_the_checkpoint(path):
    run = Run(output(path)).start()
    save(*run.parts, run.progress)
    before = path.read_bytes()
    run.classifiers.linears["Feature5"].bias.data[1] = torch.nan
    with pytest.raises(UserError, match="not finite in epoch 1, by step 5: lower --lr"):
        train_epoch(*run.parts, run.progress)
    assert path.read_bytes() == before


def test_last_or_best_epoch():
    best = dataclasses.replace(PROTOCOL, columns=(AVGPOOL,), reported="best")
    history = [{column: [top1, 99.0] for column in (*PROTOCOL.columns, AVGPOOL)}
               for top1 in (50.0, 70.0, 70.0, 60.0)]
    results = choose_results([PROTOCOL, best], history)
    assert results["Feature5"] == dict(top1=60.0, top5=99.0, epoch=4)
    assert results[AVGPOOL] == dict(top1=70.0, top5=99.0, epoch=2)


# --- several processes, and the accuracy ---------------------------------------------------------


def whole_run(protocol, count):
    run = Run(protocols=[protocol], count=count).train()
    return run.progress.history, {k: v.clone() for k, v in run.classifiers.state_dict().items()}


# Fine-tuning is so sensitive that after two epochs any difference in rounding shows.
@pytest.mark.parametrize("protocol", [PROTOCOL, dataclasses.replace(FINE_TUNING, epochs=1)],
                         ids=["linear", "fine-tuning"])
@pytest.mark.parametrize("count", [74, 65])  # the last batch has 10 images, or would have 1
def test_two_processes_give_the_same_numbers(protocol, count):
    """In the second case they have 9 and 8 images in the last batch."""
    history, state = whole_run(protocol, count)
    for other_history, other in run_processes(whole_run, 2, protocol, count):
        assert other_history == history
        for key in state:
            torch.testing.assert_close(other[key], state[key], rtol=1e-3, atol=1e-5)


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


def accuracy_of(unreadable):
    """The accuracy of fixed answers [40], from 1 or 2 processes."""
    run = Run().start()
    run.progress.step = 1
    answers = torch.tensor([0, 1, 2]).repeat(14)[:40]
    own = distributed.shard(40)
    run.network.val.unreadable = {i: "broken" for i in unreadable if own.start <= i < own.stop}
    accuracy = evaluate(run.network, run.protocols, Answers(answers[own]), run.progress)
    return answers, run.network.val.labels, accuracy, run.progress.unreadable


@pytest.mark.parametrize("unreadable", [[], [3, 30]])
def test_accuracy_counts_every_readable_val_image_once(unreadable, capsys):
    answers, labels, accuracy, count = accuracy_of(unreadable)
    line = f"{len(unreadable)} of 40 val images cannot be read; they are left out"
    assert count == len(unreadable) and (line in capsys.readouterr().out) == bool(unreadable)
    readable = [i for i in range(40) if i not in unreadable]
    hits = (answers == labels)[readable].double()
    assert accuracy["Feature2"][0] == pytest.approx(100 * hits.mean().item())
    assert accuracy["Feature5"][0] <= 100 * (1 - hits).mean().item()
    assert accuracy["Feature5"][1] == 100
    for *_, other, other_count in run_processes(accuracy_of, 2, unreadable):
        assert (other, other_count) == (accuracy, count)
