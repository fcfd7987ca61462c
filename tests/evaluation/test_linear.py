"""Linear evaluation: the recipes' values, the arithmetic against plain PyTorch, and runs that continue."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval_linear import PROTOCOLS, SHORT, choose_protocol, make_parser, published_table
from odc.runtime import program
from odc import distributed
from odc.runtime import checkpoint
from odc.errors import Interrupted, UserError
from odc.evaluation.frozen import Frozen
from odc.features import map_shapes
from odc.data.images import ImageSet
from odc.evaluation.linear import AVGPOOL, COLUMNS, Classifiers, GlobalNorm, Protocol, Training, train_step
from odc.model import ResNet
from tests.processes import run_processes

CPU = torch.device("cpu")


# --- the protocols, value by value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, classes, columns, epochs, lr, steps, nesterov, decay, transform, report", [
    ("imagenet-multihead", 1000, COLUMNS, 90, 0.01, [30, 60], True, 1e-4, "imagenet-multihead", "last"),
    ("imagenet-avgpool", 1000, [AVGPOOL], 100, 30.0, [60, 80], False, 0.0, "imagenet-avgpool", "best"),
    ("places205", 205, COLUMNS, 28, 0.01, [7, 14, 21], True, 1e-4, "places205", "last"),
    ("inaturalist2018", 8142, COLUMNS, 84, 0.01, [24, 48, 72], True, 1e-4, "inaturalist2018", "last"),
])
def test_protocol_values(name, classes, columns, epochs, lr, steps, nesterov, decay, transform, report):
    p = PROTOCOLS[name]
    assert (p.classes, list(p.columns), p.epochs, p.lr, list(p.lr_steps)) == (classes, columns, epochs, lr, steps)
    assert (p.nesterov, p.weight_decay, p.train_transform, p.report) == (nesterov, decay, transform, report)
    assert (p.batch_size, p.lr_gamma, p.momentum) == (256, 0.1, 0.9)


def choose(name, classes, *arguments):
    dataset = ImageSet(name, "train", "/data", classes=[str(k) for k in range(classes)])
    return choose_protocol(make_parser().parse_args(["--weights", "w", *arguments]), dataset)


def test_data_with_a_protocol_of_its_own():
    assert choose("imagenet", 1000) == ("imagenet-multihead", PROTOCOLS["imagenet-multihead"], {})
    assert choose("places205", 205)[0] == "places205"
    assert choose("inaturalist2018", 8142)[0] == "inaturalist2018"


def test_other_data_get_the_short_form():
    for name in ("shapes", "imagenet"):
        chosen, protocol, _ = choose(name, 10)
        assert (chosen, protocol) == ("short", dataclasses.replace(SHORT, classes=10))


def test_every_setting_can_be_given():
    _, protocol, changed = choose(
        "imagenet", 1000, "--epochs", "30", "--batch-size", "64", "--lr", "0.5", "--lr-gamma", "0.2", "--momentum", "0.8",
        "--weight-decay", "0.1", "--train-transform", "places205", "--report", "best")
    assert changed == dict(epochs=30, lr_steps=(10, 20), batch_size=64, lr=0.5, lr_gamma=0.2, momentum=0.8,
                           weight_decay=0.1, train_transform="places205", report="best")
    assert dataclasses.asdict(protocol).items() >= changed.items()
    assert choose("imagenet", 1000, "--epochs", "30", "--lr-steps", "5")[1].lr_steps == (5,)
    assert choose("imagenet", 1000, "--lr-steps")[1].lr_steps == ()


def test_class_counts_must_match():
    for arguments in (["--protocol", "imagenet-multihead"], ["--protocol", "places205", "--num-classes", "4"]):
        with pytest.raises(UserError, match="does not match /data, which has 3.*--num-classes 3"):
            choose("imagenet", 3, *arguments)
    assert choose("imagenet", 3, "--protocol", "imagenet-multihead", "--num-classes", "3")[1].classes == 3


def test_published_rows_stand_beside_their_own_protocol_alone():
    class Images(SimpleNamespace):
        def __len__(self):
            return self.count

    splits = {split: Images(name="imagenet", classes=range(1000), count=count)
              for split, count in (("train", 1281167), ("val", 50000))}
    frozen = SimpleNamespace(**splits, backbone=SimpleNamespace(arch="resnet50", small_stem=False), image_size=224)
    beside = published_table("imagenet-multihead", {}, frozen)
    assert beside.columns == tuple(COLUMNS) and beside.rows["ODC"] == (14.76, 31.82, 42.44, 55.76, 57.70)
    assert published_table("imagenet-avgpool", {}, frozen).rows["ODC"] == (53.42,)
    assert published_table("imagenet-multihead", {"lr": 0.02}, frozen) is None
    assert published_table("places205", {}, frozen) is None and published_table("short", {}, frozen) is None


# --- the arithmetic --------------------------------------------------------------------------------------------------


def test_global_norm_is_batch_norm():
    torch.manual_seed(0)
    norm, oracle = GlobalNorm(5), nn.BatchNorm2d(5, affine=False)
    for _ in range(3):
        x = torch.randn(7, 5, 4, 3) * 3 + torch.arange(5.0)[:, None, None] * 100
        torch.testing.assert_close(norm(x), oracle(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, oracle.running_mean)
    torch.testing.assert_close(norm.running_var, oracle.running_var)
    norm.eval(), oracle.eval()
    torch.testing.assert_close(norm(x), oracle(x), rtol=1e-4, atol=1e-5)


def plain_classifier(shape, pool, column, num_classes):
    """The recipe's words in PyTorch's modules."""
    channels, size = shape[0], pool(torch.zeros(1, *shape)).shape[-1]
    norm = nn.BatchNorm2d(channels, affine=False, momentum=0.1) if column != AVGPOOL else nn.Identity()
    return nn.Sequential(pool, norm, nn.Flatten(), nn.Linear(channels * size * size, num_classes))


def toy_step(rows_of_rank):
    """Three steps on made-up maps, of which this process gets its part; weights, running means and losses."""
    shapes = map_shapes(ResNet("narrow", True), 32)
    classifiers = Classifiers([*COLUMNS, AVGPOOL], shapes, 4, seed=3)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(classifiers.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    for _ in range(3):
        maps = [torch.randn(11, *shape) + 1 for shape in shapes]
        labels = torch.randint(4, (11,))
        rows = slice(*rows_of_rank[distributed.rank()])
        losses.append(train_step(classifiers, optimizer, [m[rows] for m in maps], labels[rows]))
    return {k: v.detach() for k, v in classifiers.state_dict().items()}, torch.stack(losses)


def test_train_step_is_plain_pytorch():
    state, losses = toy_step([(0, 11)])
    shapes = map_shapes(ResNet("narrow", True), 32)
    pools = [nn.AdaptiveAvgPool2d(grid) for grid in (12, 6, 4, 3, 2)] + [nn.AdaptiveAvgPool2d(1)]
    columns = [*COLUMNS, AVGPOOL]
    oracle = nn.ModuleList(plain_classifier(shape, pool, column, 4)
                           for shape, pool, column in zip([*shapes, shapes[4]], pools, columns))
    start = Classifiers(columns, shapes, 4, seed=3)
    for classifier, column in zip(oracle, columns):
        classifier[3].load_state_dict(start.linears[column].state_dict())
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    torch.manual_seed(1)
    for step in range(3):
        maps = [torch.randn(11, *shape) + 1 for shape in shapes]
        labels = torch.randint(4, (11,))
        each = [F.cross_entropy(c(m), labels) for c, m in zip(oracle, [*maps, maps[4]])]
        torch.testing.assert_close(losses[step], torch.stack(each).detach(), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        sum(each).backward()
        optimizer.step()
    for classifier, column in zip(oracle, columns):
        torch.testing.assert_close(state[f"linears.{column}.weight"], classifier[3].weight.detach(), rtol=1e-3, atol=1e-5)


def test_uneven_parts_on_two_processes_are_one_batch():
    state, losses = toy_step([(0, 11)])
    for other, other_losses in run_processes(toy_step, 2, [(0, 7), (7, 11)]):
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
        for key in state:
            torch.testing.assert_close(other[key], state[key], rtol=1e-4, atol=1e-6)


def test_initial_weights():
    classifiers = Classifiers(COLUMNS, map_shapes(ResNet("resnet18"), 64), 50, seed=0)
    weight = classifiers.linears["Feature3"].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(weight.mean().item()) < 1e-4
    assert not classifiers.linears["Feature3"].bias.any()
    again = Classifiers(COLUMNS, map_shapes(ResNet("resnet18"), 64), 50, seed=0)
    assert torch.equal(weight, again.linears["Feature3"].weight)


# --- whole runs ------------------------------------------------------------------------------------------------------


def colours(split, count, seed):
    """Images whose class is their colour, with noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    pixels = generator.integers(0, 120, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return ImageSet("made up", split, "colours", pixels=pixels.astype(np.uint8), labels=torch.from_numpy(labels),
                    classes=["red", "green", "blue"])


PROTOCOL = Protocol("made up", ("Feature2", "Feature5"), 3, epochs=4, lr=0.05, lr_steps=(2, 3), weight_decay=1e-4,
                    nesterov=True, train_transform="imagenet-multihead", report="last", batch_size=16)


def training(path=None, protocols=(PROTOCOL,), val_seed=1, count=74, **options):
    torch.manual_seed(7)
    backbone = ResNet("narrow", True).eval().requires_grad_(False)
    frozen = Frozen(backbone, "made up", colours("train", count, 0), colours("val", 40, val_seed), 16, 0, CPU, "off")
    return Training(frozen, list(protocols), seed=0, path=path, **options)


class Killed(Exception):
    pass


def test_learns_and_leaves_the_backbone_alone():
    run = training()
    before = {k: v.clone() for k, v in run.frozen.backbone.state_dict().items()}
    run.run()
    assert run.results()["Feature2"]["top1"] > 60 and run.results()["Feature2"]["epoch"] == 4
    assert run.results()["Feature2"]["top5"] == 100  # of three classes
    assert all(torch.equal(v, before[k]) for k, v in run.frozen.backbone.state_dict().items())


def test_learning_rate_schedule(monkeypatch):
    rates = []
    monkeypatch.setattr("odc.evaluation.linear.train_step", lambda classifiers, optimizer, maps, labels: (
        rates.append([group["lr"] for group in optimizer.param_groups]), torch.zeros(3))[1])
    avgpool = dataclasses.replace(PROTOCOL, columns=(AVGPOOL,), lr=30.0, lr_steps=(1,))
    training(protocols=(PROTOCOL, avgpool)).run()
    per_epoch = rates[::5]  # 74 images in batches of 16
    assert per_epoch == [pytest.approx(r) for r in ([0.05, 30], [0.05, 3], [0.005, 3], [0.0005, 3])]


@pytest.mark.parametrize("stop", [2, 5, 13])
def test_resumed_run_is_the_same_run(tmp_path, monkeypatch, stop):
    """Killed after `stop` of 20 steps, at a checkpoint or one to two steps behind it."""
    whole = training()
    whole.run()
    path = tmp_path / "run.checkpoint.pth"
    count = 0

    def step_or_die(*arguments):
        nonlocal count
        if count == stop:
            raise Killed
        count += 1
        return train_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("odc.evaluation.linear.train_step", step_or_die)
        training(path, checkpoint_interval=3).run()
    resumed = training(path, checkpoint_interval=3)
    assert (resumed.epoch, resumed.step) > (0, 0) or stop < 3
    resumed.run()
    for key, value in whole.classifiers.state_dict().items():
        assert torch.equal(value, resumed.classifiers.state_dict()[key])
    assert resumed.history == whole.history and resumed.results() == whole.results()


def test_killed_in_an_evaluation_evaluates_again(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint.pth"
    run = training(path)
    monkeypatch.setattr(run, "evaluate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run()
    resumed = training(path)
    assert (resumed.epoch, resumed.step, resumed.history) == (0, 5, [])
    resumed.run()
    assert len(resumed.history) == 4


def test_interrupted_in_an_epoch_saves_first(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint.pth"
    run = training(path)
    monkeypatch.setattr(program, "signal_is_pending", lambda: run.step == 2)
    with pytest.raises(Interrupted):
        run.run()
    monkeypatch.undo()
    assert (training(path).epoch, training(path).step) == (0, 2)


def test_finished_run_is_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint.pth"
    first = training(path)
    first.run()
    again = training(path)
    monkeypatch.setattr("odc.evaluation.linear.train_step", None)
    again.run()
    assert again.results() == first.results()


def test_other_run_is_refused(tmp_path):
    path = tmp_path / "run.checkpoint.pth"
    training(path).save()
    with pytest.raises(UserError, match="lr of Feature2 Feature5 0.05, not 0.06"):
        training(path, [dataclasses.replace(PROTOCOL, lr=0.06)])
    with pytest.raises(UserError, match="val images"):
        training(path, val_seed=2)
    run = training()
    run.frozen.val.labels = run.frozen.val.labels.flip(0)
    with pytest.raises(UserError, match="val images"):
        Training(run.frozen, [PROTOCOL], seed=0, path=path)
    checkpoint.save(path, {"program": "odc train"})
    with pytest.raises(UserError, match="not a checkpoint of eval_linear.py"):
        training(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="run.checkpoint.pth"):
        training(path)


def test_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint.pth"
    run = training(path)
    run.save()
    before = path.read_bytes()
    monkeypatch.setattr("odc.evaluation.linear.train_step", lambda *_: torch.tensor([1.0, torch.nan]))
    with pytest.raises(UserError, match="not finite in epoch 1, by step 5: lower --lr"):
        run.run()
    assert path.read_bytes() == before


def test_last_or_best_epoch():
    run = training(protocols=(PROTOCOL, dataclasses.replace(PROTOCOL, columns=(AVGPOOL,), report="best")))
    run.history = [{c: [top1, 99.0] for c in run.columns} for top1 in (50.0, 70.0, 70.0, 60.0)]
    assert run.results()["Feature5"] == dict(top1=60.0, top5=99.0, epoch=4)
    assert run.results()[AVGPOOL] == dict(top1=70.0, top5=99.0, epoch=2)


def whole_run(count):
    run = training(count=count)
    run.run()
    return run.history, run.losses, {k: v.clone() for k, v in run.classifiers.state_dict().items()}


@pytest.mark.parametrize("count", [74, 65])  # the last batch has 10 images, or would have 1
def test_two_processes_give_the_same_numbers(count):
    history, _, state = whole_run(count)
    for other_history, _, other in run_processes(whole_run, 2, count):
        assert other_history == history
        for key in state:
            torch.testing.assert_close(other[key], state[key], rtol=1e-3, atol=1e-5)


def test_accuracy_counts_every_val_image_once(monkeypatch):
    run = training()
    run.step = 1
    answers = torch.tensor([0, 1, 2]).repeat(14)[:40]
    seen = iter(range(40))

    class Fixed(nn.Module):
        def forward(self, maps):
            rows = [next(seen) for _ in range(len(maps[0]))]
            logits = F.one_hot(answers[rows], 3).float()
            return {"Feature2": logits, "Feature5": -logits}

    run.classifiers = Fixed()
    accuracy = run.evaluate()
    labels = run.frozen.val.labels
    assert accuracy["Feature2"][0] == pytest.approx(100 * (answers == labels).double().mean().item())
    assert accuracy["Feature5"][0] <= 100 * (answers != labels).double().mean().item()
    assert accuracy["Feature5"][1] == 100
