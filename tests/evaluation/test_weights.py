"""Weights of every layout in the field load; anything else is one sentence."""

import argparse
import collections
import datetime
import os
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

from odc.errors import UserError
from odc.evaluation.weights import load_backbone
from odc.model import ResNet
from tests.runtime.test_checkpoint import recompressed


@pytest.fixture(scope="module")
def narrow():
    """A backbone with running statistics that no constructor makes."""
    torch.manual_seed(3)
    backbone = ResNet("narrow")
    for name, value in backbone.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return backbone.state_dict()


TENSOR = torch.ones(2, 2)
# What training scripts save: (the keys that lead to the state dict, prefix of the network in it,
# prefix of its moving average, names of other tensors).
LAYOUTS = {
    "ours, checkpoint": ("backbone", "", "", ""),
    "torchvision": ("", "", "", "fc.bias"),
    "OpenSelfSup": ("state_dict", "backbone.", "", "head.fc_cls.weight memory_bank.centroids"),
    "MMSelfSup 1.x": ("state_dict", "backbone.", "",
                      "data_preprocessor.mean target_net.0.bn1.weight"),
    "MoCo v1, v2": ("state_dict", "module.encoder_q.", "module.encoder_k.",
                    "module.encoder_q.fc.0.weight module.queue module.queue_ptr"),
    "MoCo v3": ("state_dict", "module.base_encoder.", "module.momentum_encoder.",
                "module.base_encoder.fc.0.weight module.predictor.0.weight"),
    "SimSiam": ("state_dict", "module.encoder.", "", "module.encoder.fc.0.weight "
                "module.encoder.fc.1.running_mean module.predictor.0.weight"),
    "DINO": ("teacher", "backbone.", "", "head.mlp.0.weight"),
    "SwAV, DeepCluster-v2": ("", "module.", "",
                             "module.projection_head.0.weight module.prototypes.weight"),
    "Barlow Twins": ("model", "module.backbone.", "",
                     "module.projector.0.weight module.bn.running_mean"),
    "VISSL": ("classy_state_dict base_model model trunk", "_feature_blocks.", "", ""),
    "torch.compile, DDP": ("", "module._orig_mod.", "", ""),
    "half precision": ("", "", "", ""),
    "nn.Sequential, all children": ("", "", "", "9.weight"),
    "lightly": ("state_dict", "backbone.", "", "projection_head.layers.0.weight"),
    "BYOL": ("", "online_encoder.net.", "target_encoder.net.",
             "online_encoder.projector.net.0.weight"),
    "Hugging Face": ("", "resnet.", "", "classifier.1.weight"),
    "CIFAR ResNets": ("", "", "", ""),
}
CHILDREN = dict(conv1=0, bn1=1, layer1=4, layer2=5, layer3=6, layer4=7)  # in an nn.Sequential
RENAMED = {layout: [(r"^\w+", lambda m: str(CHILDREN[m[0]]))]
           for layout in ("nn.Sequential, all children", "lightly", "BYOL")} | {
    "CIFAR ResNets": [("downsample", "shortcut")],
    "Hugging Face": [
        (r"^conv1\.", "embedder.embedder.convolution."),
        (r"^bn1\.", "embedder.embedder.normalization."),
        (r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers."),
        (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (r"downsample\.0", "shortcut.convolution"), (r"downsample\.1", "shortcut.normalization")],
}


def _prefixed(state, prefix, **others):
    return {**{prefix + key: value for key, value in state.items()}, **others}


def _zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


def _content(layout, state):
    """What a training script saves, made from the backbone's state."""
    containers, prefix, average, others = LAYOUTS[layout]
    for pattern, name in RENAMED.get(layout, ()):
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    if layout == "half precision":
        state = {key: value.half() if value.is_floating_point() else value
                 for key, value in state.items()}
    content = {**(_prefixed(_zeros(state), average) if average else {}), **_prefixed(state, prefix),
               **dict.fromkeys(others.split(), TENSOR)}
    for container in reversed(containers.split()):
        content = {"epoch": 3, "meta": {"lr": np.float64(0.1)}, "heads": {"0.clf.weight": TENSOR},
                   "args": argparse.Namespace(arch="narrow"),
                   "optimizer": {"state": {0: {"buffer": TENSOR}}}, container: content}
    return content


def _loaded(content, path, arch=None, zip_format=True):
    """What `load_backbone` returns for a file with this content, or if None with what is there."""
    if content is not None:
        torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    return load_backbone(str(path), arch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, narrow, tmp_path):
    backbone, text = _loaded(_content(layout, narrow), tmp_path / "w.pth")
    assert (backbone.arch, backbone.small_stem, backbone.training) == ("narrow", False, False)
    tolerance = 1e-3 if layout == "half precision" else 0
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, narrow[key], rtol=tolerance, atol=tolerance)
    assert f"{len(narrow)} tensors matched" in text and "0 missing" in text


@pytest.mark.parametrize("arch, small", [
    ("resnet18", False), ("resnet34", True), ("resnet101", False), ("narrow", True)])
def test_architecture_is_recognised(arch, small, tmp_path):
    backbone, _ = _loaded(ResNet(arch, small).state_dict(), tmp_path / "w.pth")
    assert (backbone.arch, backbone.small_stem) == (arch, small)


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


# --- objects beside the tensors ------------------------------------------------------------------


def _beside(monkeypatch):
    """What trainers save beside the tensors, with classes of packages that need not be installed.

    They are gone after monkeypatch.undo(), so that reading cannot import them.
    """
    def put(name, kind):
        module, kind.__qualname__ = name.rsplit(".", 1)
        kind.__name__, kind.__module__ = kind.__qualname__, module
        for function in filter(callable, vars(kind).values()):
            function.__qualname__ = f"{kind.__name__}.{function.__name__}"
            function.__module__ = module
        for part in (module.split(".")[0], module):
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], kind.__name__, kind)
        return kind

    class HistoryBuffer:  # of MMEngine 0.10, in its "message_hub"
        def __init__(self):
            self._log_history = np.array([7.0, 6.0])
            # Functions of a class are pickled as the call getattr(HistoryBuffer, "mean").
            self.statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            pass

    class DictConfig:  # of omegaconf
        def __getstate__(self):
            return {"_content": {"lr": 0.3}, "_flags_cache": None}

    class EarlyStopping:  # of Lightning
        __slots__ = ("patience",)

    put("mmengine.logging.history_buffer.HistoryBuffer", HistoryBuffer)
    put("pytorch_lightning.callbacks.EarlyStopping", EarlyStopping)
    AttributeDict = put("lightning_fabric.utilities.data.AttributeDict", type("_", (dict,), {}))
    settings = put("easydict.EasyDict", type("_", (dict,), {}))(lr=0.3)
    settings.lr = 0.3  # as an item and as an attribute
    stopping = EarlyStopping()
    stopping.patience = 3
    return {
        "message_hub": {"log": collections.OrderedDict({"train/loss": HistoryBuffer()})},
        "hyper_parameters": put("omegaconf.dictconfig.DictConfig", DictConfig)(),
        "more": AttributeDict(optimizer=AttributeDict(lr=0.3)), "args": settings,
        "callbacks": {type(stopping): stopping}, "date": datetime.datetime(2026, 1, 1),
        "log": collections.defaultdict(list, loss=[1.0]), "last": collections.deque([1, 2]),
        "path": Path("a"), "scheduler": torch.optim.lr_scheduler.StepLR(
            torch.optim.SGD([torch.nn.Parameter(TENSOR)], lr=0.1), 1),
    }


@pytest.mark.parametrize("zip_format", [True, False])
def test_objects_beside_the_tensors_are_passed_over_by_name(
        narrow, tmp_path, monkeypatch, zip_format):
    torch.save({"state_dict": narrow, **_beside(monkeypatch)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=zip_format)
    monkeypatch.undo()
    backbone, text = load_backbone(str(tmp_path / "w.pth"))
    assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])
    assert re.search("passed over: objects of mmengine.*HistoryBuffer, .* and .* more", text)
    assert not any(name in sys.modules for name in ("mmengine", "easydict", "pytorch_lightning"))


# --- what is refused -----------------------------------------------------------------------------


class Malicious(argparse.Namespace):
    def __reduce__(self):
        return eval, ("open('ran.txt', 'w').close()",)


def _zero_weights(make):
    """A network's state dict of zeros that all lie in one place."""
    with torch.device("meta"):
        state = make().state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


def _refused(content, path, arch=None):
    with pytest.raises(UserError) as error:
        _loaded(content, path, arch)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_does_not_run(tmp_path, monkeypatch, narrow, zip_format):
    monkeypatch.chdir(tmp_path)
    beside = {"args": argparse.Namespace(inner=Malicious()), "list": [Malicious()]}
    assert "builtins.eval" in _refused({"state_dict": Malicious()}, "w.pth")
    text = _loaded({**beside, "model": narrow}, "w.pth", zip_format=zip_format)[1]
    assert "passed over: objects of argparse.Namespace, builtins.eval" in text
    Path("plain.pkl").write_bytes(pickle.dumps(Malicious()))
    _refused(None, "plain.pkl")
    assert not os.path.exists("ran.txt")


def test_other_content(tmp_path, narrow):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pth"))
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello, I am a text\n" * 40)
    for name, words in {"absent.pth": "No such file", "": "a directory", "pipe": "or a device",
                        "/dev/zero": "or a device", "empty.pth": "truncated",
                        "text.pth": "not a weights file", "script.pth": "TorchScript"}.items():
        assert words in _refused(None, tmp_path / name)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2).state_dict()
    for content, words in (({"features.0.weight": TENSOR}, "features.0.weight"),
                           ({"teacher": vit}, "cls_token"), ({"epoch": 3}, "no state dict"),
                           (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")):
        assert "no ResNet" in (message := _refused(content, tmp_path / "w.pth"))
        assert words in message


@pytest.mark.parametrize("change, message", [
    ({"layer4.0.bn2.weight": None}, "layer4.0.bn2.weight is missing"),
    ({"layer3.0.bn1.weight": torch.ones(7)}, r"layer3.0.bn1.weight has shape \(7,\), not \(64,\)"),
    ({"layer2.0.se.weight": TENSOR}, "layer2.0.se.weight is left over"),
    ({"bn1.bias": torch.full((16,), torch.nan)}, "bn1.bias .* is negative or not finite"),
    ({"bn1.running_var": -torch.ones(16)}, "bn1.running_var .* is negative or"),
    # DeepCluster's networks see the two channels of a Sobel filter.
    ({"conv1.weight": torch.ones(16, 2, 7, 7)}, r"shape \(16, 2, 7, 7\), not \(16, 3, 7, 7\)"),
    *(({"bn1.bias": value}, "holds no plain floats") for value in (
        torch.ones(16, dtype=torch.int8), torch.ones(16, dtype=torch.complex64),
        torch.ones(16).to(torch.float8_e4m3fn), torch.ones(16).to_sparse()))])
def test_partial_match_names_the_keys(tmp_path, narrow, change, message):
    state = {key: value for key, value in {**narrow, **change}.items() if value is not None}
    assert re.search(message, _refused(state, tmp_path / "w.pth"))


def test_another_architecture(tmp_path, narrow):
    path = tmp_path / "w.pth"
    assert "resnet34" in _refused(narrow, path, "resnet34")
    wide = _zero_weights(torchvision.models.wide_resnet50_2)
    assert "layer1.0.conv1.weight has shape" in _refused(wide, path)
    assert "(3, 8, 36, 3)" in _refused(_zero_weights(torchvision.models.resnet152), path)


def test_a_damaged_network_is_not_taken_for_its_copy(tmp_path, narrow):
    moco = {**_prefixed(narrow, "module.encoder_q."), **_prefixed(narrow, "module.encoder_k.")}
    del moco["module.encoder_q.layer4.0.bn2.weight"]
    assert "layer4.0.bn2.weight is missing" in _refused({"state_dict": moco}, tmp_path / "w.pth")
    broken = {**narrow, "bn1.bias": torch.full((16,), torch.nan)}
    content = {"teacher": broken, "student": narrow}
    assert "bn1.bias holds no plain floats, or is negative" in _refused(content, tmp_path / "w.pth")


def test_two_networks_in_one_file_are_told_apart_by_arch(tmp_path, narrow):
    path = tmp_path / "w.pth"
    content = {"model": torchvision.models.resnet34().state_dict(), "student": narrow}
    assert _loaded(content, path)[0].arch == "resnet34"
    assert _loaded(None, path, "narrow")[0].arch == "narrow"
    deep = _zero_weights(torchvision.models.resnet152)
    for known, unknown in (("model", "teacher"), ("student", "teacher")):  # whichever comes first
        assert _loaded({known: narrow, unknown: deep}, path)[0].arch == "narrow"


@pytest.mark.parametrize("copy, trained", [
    ("model_ema", "net"), ("ema", "network"), ("momentum_encoder", "base_encoder"),
    ("target_network", "online_network"), ("net_ema", "semantic_net"), ("student", "teacher_ema"),
    ("student_backbone", "teacher_backbone")])
def test_the_trained_network_or_teacher_comes_first(tmp_path, narrow, copy, trained):
    for content in ({copy: _zeros(narrow), trained: narrow},
                    _prefixed(_zeros(narrow), copy + ".", **_prefixed(narrow, trained + "."))):
        backbone, text = _loaded(content, tmp_path / "w.pth")
        assert f"under '{trained}" in text
        assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])


def test_a_counter_without_use_and_a_name_that_is_not_utf8(tmp_path, narrow):
    path = tmp_path / os.fsdecode(b"name\xe9.pth")
    odd = {**narrow, "bn1.num_batches_tracked": torch.ones(1, dtype=torch.int64)}
    assert _loaded(odd, path)[0].arch == "narrow"


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_and_damaged_files(tmp_path, narrow, zip_format):
    path = tmp_path / "w.pth"
    torch.save(narrow, path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in (1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _refused(None, path)
    for position in (len(whole) // 3, len(whole) // 2) if zip_format else ():  # in the tensors
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "damaged" in _refused(None, path)


# --- damaged and foreign files: any exception is one sentence ------------------------------------


def test_a_file_that_refers_to_itself_is_visited_once(tmp_path, narrow):
    content = {f"key{i}": None for i in range(300)}
    content |= {key: content for key in content} | {"list": [content] * 300}
    assert "no state dict" in _refused(content, tmp_path / "w.pth")
    content["state_dict"] = {**narrow, "again": content}
    assert "72 tensors matched" in _loaded(content, tmp_path / "w.pth")[1]


@pytest.mark.parametrize("zip_format", [True, False])
def test_flipped_bits_of_the_structure(tmp_path, zip_format):
    """In the zip directory and in the pickle, where the tensors' checksums do not reach."""
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "model": {"conv1.weight": TENSOR}}, path,
               _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        flipped = whole[position] ^ 1 << position % 8
        path.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        assert str(path) in _refused(None, path)


def test_an_archive_that_was_compressed_is_refused(tmp_path, narrow):
    torch.save(narrow, tmp_path / "w.pth")
    recompressed(tmp_path / "w.pth")
    assert "it is compressed" in _refused(None, tmp_path / "w.pth")


def test_a_name_stands_for_the_file_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError))
    with pytest.raises(UserError, match="^--pretrained resnet18: "):
        load_backbone("resnet18", option="--pretrained")
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    backbone, told = load_backbone("resnet18")
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"]) and "resnet18-f37072fd" in told
