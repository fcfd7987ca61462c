"""The files of this program in torchvision and timm, and theirs in this program."""

import pytest
import torch
import torchvision
from torch import nn

from odc.evaluation import weights
from odc.model import ResNet
from odc.outputs import results

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
    results.write_backbone(tmp_path / "backbone.pth", backbone, 72)
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
