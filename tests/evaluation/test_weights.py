"""Weights of every layout in the field load; anything else is one sentence."""

import argparse
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision

from odc.errors import UserError
from odc.model import ResNet
from odc.evaluation.weights import load_backbone
from tests.processes import ROOT, environment


@pytest.fixture(scope="module")
def resnet18():
    """A backbone with running statistics that no constructor makes."""
    torch.manual_seed(3)
    backbone = ResNet("resnet18")
    for name, value in backbone.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return backbone.state_dict()


def _prefixed(state, prefix, **others):
    return {**{prefix + key: value for key, value in state.items()}, **others}


TENSOR = torch.ones(2, 2)
# What the method's own training script saves, with its neighbours: (content from the backbone's state, where it is).
LAYOUTS = {
    "ours, checkpoint": lambda s: {"backbone": s, "neck": {"fc1.weight": TENSOR}, "head": {"weight": TENSOR},
                                   "arch": "resnet18", "small_stem": False, "epoch": 3},
    "ours, backbone.pth": lambda s: dict(s),
    "torchvision": lambda s: {**s, "fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
    "OpenSelfSup": lambda s: {"meta": {"time": "now"}, "state_dict": _prefixed(
        s, "backbone.", **{"head.fc_cls.weight": TENSOR, "neck.fc0.weight": TENSOR, "memory_bank.centroids": TENSOR})},
    "MMSelfSup 1.x": lambda s: {"meta": {"lr": np.float64(0.1)}, "state_dict": _prefixed(
        s, "backbone.", **{"data_preprocessor.mean": TENSOR, "target_net.0.bn1.weight": TENSOR})},
    "MoCo v1, v2": lambda s: {"epoch": 200, "optimizer": {"state": {0: {"buffer": TENSOR}}}, "state_dict": {
        **_prefixed(_zeros(s), "module.encoder_k."), **_prefixed(s, "module.encoder_q."),
        "module.encoder_q.fc.0.weight": TENSOR, "module.queue": TENSOR, "module.queue_ptr": torch.zeros(1)}},
    "MoCo v3": lambda s: {"state_dict": {
        **_prefixed(_zeros(s), "module.momentum_encoder."), **_prefixed(s, "module.base_encoder."),
        "module.base_encoder.fc.0.weight": TENSOR, "module.predictor.0.weight": TENSOR}},
    "SimSiam": lambda s: {"state_dict": {
        **_prefixed(s, "module.encoder."), "module.encoder.fc.0.weight": TENSOR,
        "module.encoder.fc.1.running_mean": TENSOR, "module.predictor.0.weight": TENSOR}},
    "DINO": lambda s: {"student": {**_prefixed(_zeros(s), "module.backbone."), "module.head.mlp.0.weight": TENSOR},
                       "teacher": {**_prefixed(s, "backbone."), "head.mlp.0.weight": TENSOR},
                       "args": argparse.Namespace(arch="resnet18"), "epoch": 100},
    "SwAV, DeepCluster-v2": lambda s: {**_prefixed(s, "module."), "module.projection_head.0.weight": TENSOR,
                                       "module.prototypes.weight": TENSOR},
    "DeepCluster-v2 heads": lambda s: {"state_dict": {**_prefixed(s, "module."), "module.prototypes.prototypes0.weight":
                                                      TENSOR}, "amp": {"loss_scale": 1.0}},
    "Barlow Twins, checkpoint": lambda s: {"epoch": 9, "model": {
        **_prefixed(s, "module.backbone."), "module.projector.0.weight": TENSOR, "module.bn.running_mean": TENSOR}},
    "VISSL": lambda s: {"classy_state_dict": {"base_model": {"model": {
        "trunk": _prefixed(s, "_feature_blocks."), "heads": {"0.clf.weight": TENSOR}}}}},
    "torch.compile, DDP": lambda s: _prefixed(s, "module._orig_mod."),
    "encoder.": lambda s: {"state_dict": _prefixed(s, "encoder.")},
    "half precision": lambda s: {key: value.half() if value.is_floating_point() else value for key, value in s.items()},
}


def _zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, resnet18, tmp_path):
    torch.save(LAYOUTS[layout](resnet18), tmp_path / "w.pth")
    backbone, text = load_backbone(str(tmp_path / "w.pth"))
    assert (backbone.arch, backbone.small_stem, backbone.training) == ("resnet18", False, False)
    tolerance = 1e-3 if layout == "half precision" else 0
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, resnet18[key], rtol=tolerance, atol=tolerance)
    assert f"{len(resnet18)} tensors matched" in text and "0 missing" in text


def test_left_over_keys_are_counted(resnet18, tmp_path):
    torch.save(LAYOUTS["SimSiam"](resnet18), tmp_path / "w.pth")
    _, text = load_backbone(str(tmp_path / "w.pth"))
    assert "3 left over" in text and "module.encoder.fc.0.weight" in text


def test_file_from_before_the_zip_format(resnet18, tmp_path):
    torch.save(resnet18, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    backbone, _ = load_backbone(str(tmp_path / "old.pth.tar"))
    assert torch.equal(backbone.conv1.weight, resnet18["conv1.weight"])


@pytest.mark.parametrize("arch, small", [(a, s) for a in ("resnet18", "resnet34", "resnet50", "resnet101", "narrow")
                                         for s in (False, True)])
def test_architecture_is_recognised(arch, small, tmp_path):
    torch.save(ResNet(arch, small).state_dict(), tmp_path / "w.pth")
    backbone, _ = load_backbone(str(tmp_path / "w.pth"))
    assert (backbone.arch, backbone.small_stem) == (arch, small)


def test_networks_of_torchvision_and_timm(tmp_path):
    for network in (torchvision.models.resnet50(num_classes=7), timm.create_model("resnet50", num_classes=0)):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        backbone, _ = load_backbone(str(tmp_path / "w.pth"))
        network.eval()
        images = torch.randn(1, 3, 64, 64)
        features = torch.nn.functional.adaptive_avg_pool2d(backbone(images)[-1], 1).flatten(1)
        if hasattr(network, "forward_features"):
            expected = network.forward_features(images).mean((2, 3))
        else:
            network.fc = torch.nn.Identity()
            expected = network(images)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_random_is_seeded_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first, text = load_backbone("random", "narrow", 32, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    again, _ = load_backbone("random", "narrow", 32, seed=5)
    other, _ = load_backbone("random", "narrow", 32, seed=6)
    assert torch.equal(first.layer1[0].conv1.weight, again.layer1[0].conv1.weight)
    assert not torch.equal(first.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    assert first.small_stem and "random" in text
    weight = load_backbone("random")[0].layer3[0].conv2.weight  # fan_in: 256 channels x 3 x 3
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


# --- what is refused -------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("echo it ran > ran.txt",)


def _refused(content, path, arch=None):
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_backbone(str(path), arch)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("zip_format", [True, False])
def test_malicious_pickle(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "w.pth", _use_new_zipfile_serialization=zip_format)
    assert "system" in _refused(None, "w.pth")
    with open("plain.pkl", "wb") as file:
        pickle.dump(Malicious(), file)
    _refused(None, "plain.pkl")
    assert not os.path.exists("ran.txt")


def test_whole_module_is_refused_by_name(tmp_path):
    assert "torchvision.models.resnet.ResNet" in _refused(torchvision.models.resnet18(), tmp_path / "w.pth")


def test_ignored_stand_ins_hide_no_code(tmp_path):
    """The classes that are read as nothing must not open a way for others."""
    class Hidden(argparse.Namespace):
        def __reduce__(self):
            return eval, ("1 + 1",)

    assert "eval" in _refused({"args": argparse.Namespace(inner=Hidden())}, tmp_path / "w.pth")


def test_vision_transformer(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert "Vision Transformer" in _refused(network.state_dict(), tmp_path / "w.pth")
    assert "Vision Transformer" in _refused({"teacher": network.state_dict()}, tmp_path / "w.pth")


def test_other_content(tmp_path, resnet18):
    assert "no ResNet" in _refused({"features.0.weight": TENSOR}, tmp_path / "w.pth")
    assert "no state dict" in _refused({"epoch": 3}, tmp_path / "w.pth")
    assert "no state dict" in _refused([1, 2], tmp_path / "w.pth")
    assert "No such file" in _refused(None, tmp_path / "absent.pth")
    assert "directory" in _refused(None, tmp_path)
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "truncated" in _refused(None, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello, I am a text\n" * 40)
    assert "not a weights file" in _refused(None, tmp_path / "text.pth")
    script = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(script, str(tmp_path / "script.pth"))
    assert "TorchScript" in _refused(None, tmp_path / "script.pth")


def test_partial_match_names_the_keys(tmp_path, resnet18):
    path = tmp_path / "w.pth"
    missing = {k: v for k, v in resnet18.items() if k not in ("layer4.1.bn2.weight", "layer2.0.bn1.bias")}
    message = _refused(missing, path)
    assert "layer4.1.bn2.weight is missing" in message and "layer2.0.bn1.bias is missing" in message
    shape = {**resnet18, "layer3.0.bn1.weight": torch.ones(7)}
    assert "layer3.0.bn1.weight has shape (7,), not (256,)" in _refused(shape, path)
    assert "layer2.0.se.weight is left over" in _refused({**resnet18, "layer2.0.se.weight": TENSOR}, path)
    assert "layer1.0.bn1.bias is not finite" in _refused(
        {**resnet18, "layer1.0.bn1.bias": torch.full((64,), torch.nan)}, path)
    assert "resnet34" in _refused(resnet18, path, "resnet34")
    assert "choose one of" in _refused(resnet18, path, "resnet19")
    for value in ((resnet18["conv1.weight"] * 100).to(torch.int8), resnet18["conv1.weight"].to(torch.complex64),
                  resnet18["conv1.weight"].to(torch.float8_e4m3fn)):
        assert "conv1.weight has type" in _refused({**resnet18, "conv1.weight": value}, path)
    assert "conv1.weight holds no plain numbers" in _refused(
        {**resnet18, "conv1.weight": resnet18["conv1.weight"].to_sparse()}, path)
    wide = torchvision.models.wide_resnet50_2().state_dict()
    assert "layer1.0.conv1.weight has shape" in _refused(wide, path)
    assert "(3, 8, 36, 3)" in _refused(torchvision.models.resnet152().state_dict(), path)


def test_a_damaged_network_is_not_taken_for_its_copy(tmp_path, resnet18):
    moco = {**_prefixed(resnet18, "module.encoder_q."), **_prefixed(resnet18, "module.encoder_k.")}
    del moco["module.encoder_q.layer4.1.bn2.weight"]
    assert "layer4.1.bn2.weight is missing" in _refused({"state_dict": moco}, tmp_path / "w.pth")
    broken = {**resnet18, "bn1.bias": torch.full((64,), torch.nan)}
    assert "bn1.bias is not finite" in _refused({"teacher": broken, "student": resnet18}, tmp_path / "w.pth")


def test_two_networks_in_one_file_are_told_apart_by_arch(tmp_path, resnet18):
    torch.save({"model": torchvision.models.resnet34().state_dict(), "student": resnet18}, tmp_path / "w.pth")
    assert load_backbone(str(tmp_path / "w.pth"))[0].arch == "resnet34"
    assert load_backbone(str(tmp_path / "w.pth"), "resnet18")[0].arch == "resnet18"
    for known, unknown in (("model", "teacher"), ("student", "teacher")):  # whichever comes first
        torch.save({known: resnet18, unknown: torchvision.models.resnet152().state_dict()}, tmp_path / "w.pth")
        assert load_backbone(str(tmp_path / "w.pth"))[0].arch == "resnet18"


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_file(tmp_path, resnet18, zip_format):
    path = tmp_path / "w.pth"
    torch.save(resnet18, path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in (1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _refused(None, path)


def test_flipped_bytes(tmp_path, resnet18):
    path = tmp_path / "w.pth"
    torch.save({"backbone": resnet18}, path)
    whole = bytearray(path.read_bytes())
    for position in (len(whole) // 3, len(whole) // 2, len(whole) * 2 // 3):  # in the tensors
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert "damaged" in _refused(None, path)


def test_what_lies_beside_the_backbone_is_not_read_into_memory(tmp_path, resnet18):
    program = ("import sys; from odc.evaluation.weights import load_backbone\n"
               "for path in sys.argv[1:]:\n    load_backbone(path)\n"
               "    print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))")
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(300 * 2**20 // 4)}}}
    torch.save(resnet18, tmp_path / "small.pth")
    torch.save({"state_dict": resnet18, "optimizer": optimizer}, tmp_path / "large.pth")
    out = subprocess.run([sys.executable, "-c", program, tmp_path / "small.pth", tmp_path / "large.pth"], cwd=ROOT,
                         env=environment(), capture_output=True, text=True, check=True)
    small, large = (int(kib) / 1024 for kib in out.stdout.split())
    assert large - small < 100  # MiB
