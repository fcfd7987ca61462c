"""The files of this program in torchvision and timm, and theirs in this program's scripts."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

IMAGES = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))


def their_model(library, arch, **options):
    if library == "timm":
        return pytest.importorskip("timm").create_model(arch, **options)
    return torchvision.models.get_model(arch, **options)


def assert_same_features(model, backbone):
    """Both have the same average-pooled features, and they are not all zero."""
    model.fc = nn.Identity()
    with torch.no_grad():
        ours = backbone.eval()(IMAGES)[-1].mean((2, 3))
        assert ours.any() and torch.allclose(model.eval()(IMAGES), ours, atol=1e-4)


@pytest.mark.parametrize("library, small_stem", [("torchvision", False), ("torchvision", True),
                                                 ("timm", False)])
def test_our_backbone_in_their_model(tmp_path, library, small_stem):
    """As the README says: for small images with another first convolution, and no max-pool."""
    backbone = ResNet("resnet18", small_stem)
    backbone(IMAGES)  # running statistics that are not those of the start
    export.save_backbone(tmp_path / "backbone.pth", backbone, 72)
    model = their_model(library, "resnet18")
    model.fc = nn.Identity()
    if small_stem:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    assert_same_features(model, backbone)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_their_models_in_our_loader(tmp_path, library, arch):
    model = their_model(library, arch, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    backbone, description = weights.load_backbone(str(tmp_path / "model.pth"))
    assert backbone.arch == arch and not backbone.small_stem
    assert "2 left over (fc.weight, fc.bias)" in description
    assert_same_features(model, backbone)


def test_eval_knn_judges_their_model(tmp_path, monkeypatch):
    generator, data = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 8), ("val", 3)):
        for k, name in enumerate(("cat", "dog", "owl")):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (40, 44, 3)) + 80 * (np.arange(3) == k)
                Image.fromarray(pixels.astype(np.uint8)).save(data / split / name / f"{i}.png")
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    monkeypatch.setattr(launch, "catch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", [
        "eval_knn.py", "--weights", str(tmp_path / "model.pth"), "--data", str(data),
        "--image-size", "72", "--k", "5", "--device", "cpu", "--workers", "0",
        "--output", str(tmp_path / "result.json")])
    eval_knn.main()
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["arch"] == "resnet18" and content["val_images"] == 9
    # The same by their own forward pass.
    model.fc = nn.Identity()
    sets = [open_dataset(str(data), split) for split in ("train", "val")]
    bank, queries = (F.normalize(extract(model.eval(), dataset, evaluation_transform(72), 512,
                                         torch.device("cpu"))) for dataset in sets)
    similarity, nearest = (queries @ bank.T).topk(5)
    votes = torch.zeros(9, 3).scatter_add_(1, sets[0].labels[nearest], (similarity / 0.07).exp())
    hits = int((votes.argmax(1) == sets[1].labels).sum())
    assert content["results"]["k=5"]["top1"] == pytest.approx(100 * hits / 9)
