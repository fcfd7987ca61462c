"""The files of this program in torchvision and timm, and theirs in this program's scripts."""

import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import eval_knn
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import open_dataset
from odc.evaluation import weights
from odc.features import extract
from odc.model import ResNet
from odc.outputs import export
from odc.runtime import launch
from tests.runs import SMALL, run_main


@pytest.fixture(scope="module")
def backbone_file(folder, tmp_path_factory):  # noqa: F811
    """backbone.pth of a resnet18, trained for an epoch at 72 pixels, with the usual stem."""
    output = tmp_path_factory.mktemp("resnet18")
    assert run_main("--data", folder, "--output", output, *SMALL, "--epochs", "1",
                    "--batch-size", "64", "--arch", "resnet18", "--image-size", "72") == 0
    return output / "backbone.pth"


def pooled_by_us(path, images):
    backbone, _ = weights.load_backbone(str(path))
    with torch.no_grad():
        return backbone(images)[-1].mean((2, 3))


IMAGES = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))


def test_our_backbone_in_torchvision(backbone_file):
    model = torchvision.models.resnet18()
    state = torch.load(backbone_file, weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES), pooled_by_us(backbone_file, IMAGES), atol=1e-5)


def test_a_backbone_for_small_images_in_torchvision(tmp_path):
    """As the README says: another first convolution, and no max-pool."""
    backbone = ResNet("resnet18", small_stem=True).eval()
    export.save_backbone(tmp_path / "backbone.pth", backbone)
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    images = IMAGES[:, :, :32, :32]
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), backbone(images)[-1].mean((2, 3)), atol=1e-5)


def test_our_backbone_in_timm(backbone_file):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=0)  # no classifier: nothing may be missing
    model.load_state_dict(torch.load(backbone_file, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES), pooled_by_us(backbone_file, IMAGES), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_their_models_in_our_loader(tmp_path, library, arch):
    if library == "timm":
        model = pytest.importorskip("timm").create_model(arch, num_classes=7)
    else:
        model = torchvision.models.get_model(arch, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    backbone, description = weights.load_backbone(str(tmp_path / "model.pth"))
    assert backbone.arch == arch and not backbone.small_stem
    assert "2 left over (fc.weight, fc.bias)" in description
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES), backbone(IMAGES)[-1].mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_eval_knn_judges_their_models(tmp_path, monkeypatch, library):
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for k, name in enumerate(("cat", "dog", "owl")):
            for i in range(count):
                (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 80, (40, 44, 3)) + 80 * (np.arange(3) == k)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    torch.manual_seed(0)
    if library == "timm":
        model = pytest.importorskip("timm").create_model("resnet18", num_classes=7)
    else:
        model = torchvision.models.resnet18()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    result = tmp_path / "result.json"
    monkeypatch.setattr(launch, "catch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", [
        "eval_knn.py", "--weights", str(tmp_path / "model.pth"), "--data", str(tmp_path / "data"),
        "--image-size", "72", "--k", "5", "--device", "cpu", "--workers", "0",
        "--output", str(result)])
    eval_knn.main()
    content = json.loads(result.read_text())
    assert content["arch"] == "resnet18" and content["val_images"] == 9
    # The same by their own forward pass.
    model.fc = torch.nn.Identity()
    model.eval()
    sets = [open_dataset(str(tmp_path / "data"), split) for split in ("train", "val")]
    bank, queries = (torch.nn.functional.normalize(
        extract(model, dataset, evaluation_transform(72), 512, torch.device("cpu")))
        for dataset in sets)
    hits = 0
    for query, label in zip(queries, sets[1].labels.tolist()):
        similarity, nearest = (bank @ query).topk(5)
        votes = torch.zeros(3).index_add_(0, sets[0].labels[nearest], (similarity / 0.07).exp())
        hits += int(votes.argmax()) == label
    assert content["results"]["k=5"]["top1"] == pytest.approx(100 * hits / 9)
