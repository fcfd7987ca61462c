"""Weights of every layout in the field load; anything else is one sentence."""

import argparse
import collections
import datetime
import os
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

from odc.errors import UserError
from odc.evaluation.weights import _read, load_backbone, load_pretrained
from odc.model import ResNet


@pytest.fixture(scope="module")
def narrow():
    """A backbone with running statistics that no constructor makes."""
    torch.manual_seed(3)
    backbone = ResNet("narrow")
    for name, value in backbone.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return backbone.state_dict()


def _prefixed(state, prefix, **others):
    return {**{prefix + key: value for key, value in state.items()}, **others}


TENSOR = torch.ones(2, 2)
# What the method's own training script saves, made from the backbone's state.
LAYOUTS = {
    "ours, checkpoint": lambda s: {
        "backbone": s, "neck": {"fc1.weight": TENSOR}, "head": {"weight": TENSOR},
        "arch": "narrow", "small_stem": False, "epoch": 3},
    "ours, backbone.pth": lambda s: dict(s),
    "torchvision": lambda s: {**s, "fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
    "OpenSelfSup": lambda s: {"meta": {"time": "now"}, "state_dict": _prefixed(
        s, "backbone.", **{"head.fc_cls.weight": TENSOR, "neck.fc0.weight": TENSOR,
                           "memory_bank.centroids": TENSOR})},
    "MMSelfSup 1.x": lambda s: {"meta": {"lr": np.float64(0.1)}, "state_dict": _prefixed(
        s, "backbone.", **{"data_preprocessor.mean": TENSOR, "target_net.0.bn1.weight": TENSOR})},
    "MoCo v1, v2": lambda s: {
        "epoch": 200, "optimizer": {"state": {0: {"buffer": TENSOR}}}, "state_dict": {
            **_prefixed(_zeros(s), "module.encoder_k."), **_prefixed(s, "module.encoder_q."),
            "module.encoder_q.fc.0.weight": TENSOR, "module.queue": TENSOR,
            "module.queue_ptr": torch.zeros(1)}},
    "MoCo v3": lambda s: {"state_dict": {
        **_prefixed(_zeros(s), "module.momentum_encoder."), **_prefixed(s, "module.base_encoder."),
        "module.base_encoder.fc.0.weight": TENSOR, "module.predictor.0.weight": TENSOR}},
    "SimSiam": lambda s: {"state_dict": {
        **_prefixed(s, "module.encoder."), "module.encoder.fc.0.weight": TENSOR,
        "module.encoder.fc.1.running_mean": TENSOR, "module.predictor.0.weight": TENSOR}},
    "DINO": lambda s: {"student": {**_prefixed(_zeros(s), "module.backbone."),
                                   "module.head.mlp.0.weight": TENSOR},
                       "teacher": {**_prefixed(s, "backbone."), "head.mlp.0.weight": TENSOR},
                       "args": argparse.Namespace(arch="narrow"), "epoch": 100},
    "SwAV, DeepCluster-v2": lambda s: _prefixed(
        s, "module.", **{"module.projection_head.0.weight": TENSOR,
                         "module.prototypes.weight": TENSOR}),
    "DeepCluster-v2 heads": lambda s: {"state_dict": _prefixed(
        s, "module.", **{"module.prototypes.prototypes0.weight": TENSOR}),
        "amp": {"loss_scale": 1.0}},
    "Barlow Twins, checkpoint": lambda s: {"epoch": 9, "model": _prefixed(
        s, "module.backbone.", **{"module.projector.0.weight": TENSOR,
                                  "module.bn.running_mean": TENSOR})},
    "VISSL": lambda s: {"classy_state_dict": {"base_model": {"model": {
        "trunk": _prefixed(s, "_feature_blocks."), "heads": {"0.clf.weight": TENSOR}}}}},
    "torch.compile, DDP": lambda s: _prefixed(s, "module._orig_mod."),
    "encoder.": lambda s: {"state_dict": _prefixed(s, "encoder.")},
    "half precision": lambda s: {key: value.half() if value.is_floating_point() else value
                                 for key, value in s.items()},
    "nn.Sequential": lambda s: _sequential(s),
    "nn.Sequential, all children": lambda s: {**_sequential(s), "9.weight": TENSOR},
    "lightly": lambda s: {"state_dict": _prefixed(
        _sequential(s), "backbone.", **{"projection_head.layers.0.weight": TENSOR})},
    "BYOL": lambda s: {**_prefixed(_sequential(_zeros(s)), "target_encoder.net."),
                       **_prefixed(_sequential(s), "online_encoder.net."),
                       "online_encoder.projector.net.0.weight": TENSOR},
    "Hugging Face": lambda s: {**_hugging_face(s), "classifier.1.weight": TENSOR},
    "CIFAR ResNets": lambda s: {key.replace("downsample", "shortcut"): value
                                for key, value in s.items()},
}


def _sequential(state):
    """The names that nn.Sequential gives to the children of torchvision's ResNet."""
    numbers = dict(conv1=0, bn1=1, layer1=4, layer2=5, layer3=6, layer4=7)
    return {re.sub(r"^\w+", lambda m: str(numbers[m[0]]), key): value
            for key, value in state.items()}


def _hugging_face(state):
    """The names in the ResNets of Hugging Face's transformers."""
    renamed = {}
    for key, value in state.items():
        first, rest = key.split(".", 1)
        if first in ("conv1", "bn1"):
            kind = "convolution" if first == "conv1" else "normalization"
            renamed[f"resnet.embedder.embedder.{kind}.{rest}"] = value
            continue
        block, part, rest = rest.split(".", 2)
        if part == "downsample":
            kind, rest = rest.split(".", 1)
            part = "shortcut." + ("convolution" if kind == "0" else "normalization")
        else:
            kind = "convolution" if part[:-1] == "conv" else "normalization"
            part = f"layer.{int(part[-1]) - 1}.{kind}"
        stage = int(first.removeprefix("layer")) - 1
        renamed[f"resnet.encoder.stages.{stage}.layers.{block}.{part}.{rest}"] = value
    return renamed


def _zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, narrow, tmp_path):
    torch.save(LAYOUTS[layout](narrow), tmp_path / "w.pth")
    backbone, text = load_backbone(str(tmp_path / "w.pth"))
    assert (backbone.arch, backbone.small_stem, backbone.training) == ("narrow", False, False)
    tolerance = 1e-3 if layout == "half precision" else 0
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, narrow[key], rtol=tolerance, atol=tolerance)
    assert f"{len(narrow)} tensors matched" in text and "0 missing" in text


def test_left_over_keys_are_counted_in_a_file_from_before_the_zip_format(narrow, tmp_path):
    torch.save(LAYOUTS["SimSiam"](narrow), tmp_path / "old.pth.tar",
               _use_new_zipfile_serialization=False)
    backbone, text = load_backbone(str(tmp_path / "old.pth.tar"))
    assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])
    assert "3 left over" in text and "module.encoder.fc.0.weight" in text


@pytest.mark.parametrize("arch, small", [
    ("resnet18", False), ("resnet34", True), ("resnet50", True), ("resnet101", False),
    ("narrow", True)])
def test_architecture_is_recognised(arch, small, tmp_path):
    torch.save(ResNet(arch, small).state_dict(), tmp_path / "w.pth")
    backbone, _ = load_backbone(str(tmp_path / "w.pth"))
    assert (backbone.arch, backbone.small_stem) == (arch, small)


def test_networks_of_torchvision_and_timm(tmp_path):
    for network in (torchvision.models.resnet50(num_classes=7),
                    timm.create_model("resnet50", num_classes=0)):
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


# --- objects beside the tensors ------------------------------------------------------------------


@pytest.fixture
def packages():
    """Modules of packages that need not be installed: call it with "module.Class" and a class.

    They are gone before a file is read, so that reading cannot import them.
    """
    made = []

    def put(name, kind):
        module, kind.__qualname__ = name.rsplit(".", 1)
        kind.__name__, kind.__module__ = kind.__qualname__, module
        for function in filter(callable, vars(kind).values()):
            function.__qualname__ = f"{kind.__name__}.{function.__name__}"
            function.__module__ = module
        parts = module.split(".")
        for i in range(len(parts)):
            made.append(".".join(parts[: i + 1]))
            sys.modules.setdefault(made[-1], types.ModuleType(made[-1]))
        setattr(sys.modules[module], kind.__name__, kind)
        return kind

    def remove():
        for name in made:
            sys.modules.pop(name, None)

    yield put, remove
    remove()


def _mmengine(put):
    """What MMEngine 0.10 saves as "message_hub": the same pickle, operation by operation."""

    class HistoryBuffer:
        def __init__(self):
            self.max_length = 1_000_000
            self._log_history = np.array([7.0, 6.0])
            self._count_history = np.array([1, 1])
            # Functions of a class are pickled as the call getattr(HistoryBuffer, "min").
            self.statistics_methods = {"min": HistoryBuffer.min, "mean": HistoryBuffer.mean}

        def min(self):
            pass

        def mean(self):
            pass

    buffer = put("mmengine.logging.history_buffer.HistoryBuffer", HistoryBuffer)()
    return {"message_hub": {"log_scalars": collections.OrderedDict({"train/loss": buffer})}}


def _lightning(put):
    """Settings and callbacks as trainers on top of Lightning keep them, solo-learn among them."""

    class DictConfig:  # of omegaconf
        def __init__(self):
            self._content = {"lr": 0.3}

        def __getstate__(self):
            return {"_content": self._content, "_flags_cache": None}

    class Slotted:
        __slots__ = ("patience",)

    AttributeDict = put("lightning_fabric.utilities.data.AttributeDict", type("_", (dict,), {}))
    EasyDict = put("easydict.EasyDict", type("_", (dict,), {}))
    settings = EasyDict(lr=0.3)
    settings.lr = 0.3  # as an item and as an attribute
    stopping = put("pytorch_lightning.callbacks.EarlyStopping", Slotted)()
    stopping.patience = 3
    return {
        "hyper_parameters": put("omegaconf.dictconfig.DictConfig", DictConfig)(),
        "more": AttributeDict(optimizer=AttributeDict(lr=0.3)), "args": settings,
        "callbacks": {type(stopping): stopping}, "date": datetime.datetime(2026, 1, 1),
        "log": collections.defaultdict(list, loss=[1.0]), "last": collections.deque([1, 2]),
        "path": Path("a"), "scheduler": torch.optim.lr_scheduler.StepLR(
            torch.optim.SGD([torch.nn.Parameter(TENSOR)], lr=0.1), 1),
    }


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("beside, names", [
    (_mmengine, ["mmengine.logging.history_buffer.HistoryBuffer", "and 2 more"]),
    (_lightning, ["omegaconf.dictconfig.DictConfig", "AttributeDict", "easydict.EasyDict"])])
def test_objects_beside_the_tensors_are_passed_over_by_name(
        narrow, tmp_path, packages, beside, names, zip_format):
    put, remove = packages
    torch.save({"state_dict": narrow, **beside(put)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=zip_format)
    remove()
    backbone, text = load_backbone(str(tmp_path / "w.pth"))
    assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])
    assert "passed over: objects of" in text and all(name in text for name in names)
    assert not any(name in sys.modules for name in ("mmengine", "easydict", "pytorch_lightning"))


def test_a_state_dict_in_another_kind_of_dict(narrow, tmp_path):
    torch.save(collections.defaultdict(list, model=collections.defaultdict(list, narrow)),
               tmp_path / "w.pth")
    assert "72 tensors matched under 'model'" in load_backbone(str(tmp_path / "w.pth"))[1]


@pytest.mark.parametrize("name, content", [
    ("resnetblur50-84f4748f.pth", lambda s: s),
    ("w.pth", lambda s: {"state_dict": s, "args": argparse.Namespace(model="resnetaa50")}),
    ("w.pth", lambda s: {"model": s, "cfg": {"model": {"architecture": "resnetblur50"}}})])
def test_other_pooling_is_named(narrow, tmp_path, name, content):
    """Anti-aliased networks of timm have all tensors of a ResNet, and compute something else."""
    torch.save(content(narrow), tmp_path / name)
    text = load_backbone(str(tmp_path / name))[1]
    assert re.search("it names resnet(aa|blur)50, whose pooling this backbone lacks", text)
    torch.save(narrow, tmp_path / "resnet50.pth")
    assert "whose pooling" not in load_backbone(str(tmp_path / "resnet50.pth"))[1]


# --- what is refused -----------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("echo it ran > ran.txt",)


def _without_storage(network):
    """A state dict of zeros that all lie in one place."""
    with torch.device("meta"):
        state = network().state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


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
    message = _refused(torchvision.models.resnet18(), tmp_path / "w.pth")
    assert "no state dict" in message and "torchvision.models.resnet.ResNet" in message


class Hidden(argparse.Namespace):
    def __reduce__(self):
        return eval, ("open('ran.txt', 'w').close()",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_beside_the_tensors_does_not_run(tmp_path, monkeypatch, narrow, zip_format):
    monkeypatch.chdir(tmp_path)
    hidden = {"args": argparse.Namespace(inner=Hidden()), "list": [Hidden()]}
    assert "builtins.eval" in _refused(hidden, "w.pth")
    torch.save({**hidden, "model": narrow}, "w.pth", _use_new_zipfile_serialization=zip_format)
    assert "passed over: objects of argparse.Namespace, builtins.eval" in load_backbone("w.pth")[1]
    assert not os.path.exists("ran.txt")


def test_networks_with_attention(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=2)
    for content in (network.state_dict(), {"teacher": network.state_dict()},
                    timm.create_model("botnet26t_256").state_dict()):
        assert "a network with attention, such as" in _refused(content, tmp_path / "w.pth")


def test_two_input_channels(tmp_path, narrow):
    """DeepCluster's networks see the two channels of a Sobel filter."""
    sobel = {**narrow, "conv1.weight": narrow["conv1.weight"][:, :2]}
    message = _refused(_prefixed(sobel, "backbone."), tmp_path / "w.pth")
    assert "its first convolution takes 2 channels (of a Sobel filter, perhaps)" in message


def test_other_content(tmp_path, narrow):
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


def test_partial_match_names_the_keys(tmp_path, narrow):
    path = tmp_path / "w.pth"
    missing = {key: value for key, value in narrow.items()
               if key not in ("layer4.0.bn2.weight", "layer2.0.bn1.bias")}
    message = _refused(missing, path)
    assert "layer4.0.bn2.weight is missing" in message and "layer2.0.bn1.bias is missing" in message
    shape = {**narrow, "layer3.0.bn1.weight": torch.ones(7)}
    assert "layer3.0.bn1.weight has shape (7,), not (64,)" in _refused(shape, path)
    more = {**narrow, "layer2.0.se.weight": TENSOR}
    assert "layer2.0.se.weight is left over" in _refused(more, path)
    assert "layer1.0.bn1.bias is not finite" in _refused(
        {**narrow, "layer1.0.bn1.bias": torch.full((16,), torch.nan)}, path)
    assert "resnet34" in _refused(narrow, path, "resnet34")
    assert "choose one of" in _refused(narrow, path, "resnet19")
    first = narrow["conv1.weight"]
    for value in ((first * 100).to(torch.int8), first.to(torch.complex64),
                  first.to(torch.float8_e4m3fn), first.to_sparse()):
        assert "holds no plain floats" in _refused({**narrow, "conv1.weight": value}, path)
    wide, deep = (_without_storage(torchvision.models.wide_resnet50_2),
                  _without_storage(torchvision.models.resnet152))
    assert "layer1.0.conv1.weight has shape" in _refused(wide, path)
    assert "(3, 8, 36, 3)" in _refused(deep, path)


def test_a_damaged_network_is_not_taken_for_its_copy(tmp_path, narrow):
    moco = {**_prefixed(narrow, "module.encoder_q."), **_prefixed(narrow, "module.encoder_k.")}
    del moco["module.encoder_q.layer4.0.bn2.weight"]
    assert "layer4.0.bn2.weight is missing" in _refused({"state_dict": moco}, tmp_path / "w.pth")
    broken = {**narrow, "bn1.bias": torch.full((16,), torch.nan)}
    content = {"teacher": broken, "student": narrow}
    assert "bn1.bias is not finite" in _refused(content, tmp_path / "w.pth")


def test_two_networks_in_one_file_are_told_apart_by_arch(tmp_path, narrow):
    torch.save({"model": torchvision.models.resnet34().state_dict(), "student": narrow},
               tmp_path / "w.pth")
    assert load_backbone(str(tmp_path / "w.pth"))[0].arch == "resnet34"
    assert load_backbone(str(tmp_path / "w.pth"), "narrow")[0].arch == "narrow"
    deep = _without_storage(torchvision.models.resnet152)
    for known, unknown in (("model", "teacher"), ("student", "teacher")):  # whichever comes first
        torch.save({known: narrow, unknown: deep}, tmp_path / "w.pth")
        assert load_backbone(str(tmp_path / "w.pth"))[0].arch == "narrow"


@pytest.mark.parametrize("copy, trained", [
    ("model_ema", "net"), ("ema", "network"), ("momentum_encoder", "base_encoder"),
    ("target_network", "online_network"), ("net_ema", "semantic_net")])
def test_the_trained_network_comes_before_its_moving_average(tmp_path, narrow, copy, trained):
    torch.save({copy: _zeros(narrow), trained: narrow}, tmp_path / "w.pth")
    backbone, text = load_backbone(str(tmp_path / "w.pth"))
    assert f"under '{trained}" in text
    assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])


def test_the_teacher_of_a_flat_file_comes_before_its_student(tmp_path, narrow):
    torch.save({**_prefixed(_zeros(narrow), "student_backbone."),
                **_prefixed(narrow, "teacher_backbone.")}, tmp_path / "w.pth")
    assert "under 'teacher_backbone" in load_backbone(str(tmp_path / "w.pth"))[1]
    torch.save({**_prefixed(_zeros(narrow), "student."), **_prefixed(narrow, "teacher_ema.")},
               tmp_path / "w.pth")
    assert "under 'teacher_ema" in load_backbone(str(tmp_path / "w.pth"))[1]


def test_what_evaluation_does_not_use_may_be_odd_and_what_it_uses_not(tmp_path, narrow):
    odd = {**narrow, "bn1.num_batches_tracked": torch.ones(1, dtype=torch.int64)}
    torch.save(odd, tmp_path / "w.pth")
    assert load_backbone(str(tmp_path / "w.pth"))[0].arch == "narrow"
    assert "bn1.running_var is negative" in _refused(
        {**narrow, "bn1.running_var": -narrow["bn1.running_var"]}, tmp_path / "w.pth")


def test_a_name_that_is_not_utf8(tmp_path, narrow):
    path = tmp_path / os.fsdecode(b"name\xe9.pth")
    torch.save(narrow, path)
    assert load_backbone(str(path))[0].arch == "narrow"


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_file(tmp_path, narrow, zip_format):
    path = tmp_path / "w.pth"
    torch.save(narrow, path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in (1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _refused(None, path)


def test_flipped_bytes(tmp_path, narrow):
    path = tmp_path / "w.pth"
    torch.save({"backbone": narrow}, path)
    whole = bytearray(path.read_bytes())
    for position in (len(whole) // 3, len(whole) // 2, len(whole) * 2 // 3):  # in the tensors
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert "damaged" in _refused(None, path)


def test_what_lies_beside_the_backbone_is_not_read_into_memory(tmp_path, narrow):
    content = {"state_dict": narrow, "optimizer": {"momentum": torch.zeros(300 * 2**20 // 4)}}
    torch.save(content, tmp_path / "w.pth")
    del content

    def resident():  # MiB of memory that is no mapped file
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024

    before = resident()
    content = _read(str(tmp_path / "w.pth"))
    assert resident() - before < 100 and len(content[0]["optimizer"]["momentum"]) > 7e7


# --- damaged and foreign files: any exception is one sentence ------------------------------------


def test_a_file_that_refers_to_itself_is_visited_once(tmp_path, narrow):
    content = {f"key{i}": None for i in range(300)}
    content |= {key: content for key in content} | {"list": [content] * 300}
    assert "no state dict" in _refused(content, tmp_path / "w.pth")
    content["state_dict"] = {**narrow, "again": content}
    torch.save(content, tmp_path / "w.pth")
    assert "72 tensors matched" in load_backbone(str(tmp_path / "w.pth"))[1]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert "a directory or a device" in _refused(None, tmp_path / "pipe")
    assert "a directory or a device" in _refused(None, "/dev/zero")


@pytest.mark.parametrize("zip_format", [True, False])
def test_flipped_bits_of_the_structure(tmp_path, zip_format):
    """In the zip directory and in the pickle, where the tensors' checksums do not reach."""
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "model": {"conv1.weight": TENSOR}}, path,
               _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert str(path) in _refused(None, path)


def test_an_archive_that_was_compressed_is_refused(tmp_path, narrow):
    """torch would map the compressed bytes as the weights."""
    torch.save(narrow, tmp_path / "w.pth")
    with (zipfile.ZipFile(tmp_path / "w.pth") as archive,
          zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert "it is compressed" in _refused(None, tmp_path / "c.pth")


def test_training_names_its_own_argument(tmp_path, narrow):
    torch.save(narrow, tmp_path / "w.pth")
    backbone = ResNet("narrow")
    assert "72 tensors" in load_pretrained(backbone, str(tmp_path / "w.pth"), 224)
    assert torch.equal(backbone.conv1.weight, narrow["conv1.weight"])
    for network, path, size in ((ResNet("narrow", True), tmp_path / "w.pth", 32),
                                (backbone, tmp_path / "absent.pth", 224)):
        with pytest.raises(UserError, match="^--pretrained "):
            load_pretrained(network, str(path), size)
