"""Backbone weights from anywhere: our own files and the layouts that other self-supervised methods leave.

One rule covers them all: among the state dicts inside a file, find the prefix under which the parameters of a
torchvision-style ResNet lie, and take the backbone only if every one of them is there, with its shape.
"""

import pickle
import re
import warnings
import zipfile

import torch
from torch.serialization import safe_globals

from odc.errors import UserError
from odc.model import ARCHS, ResNet, use_small_stem

# Where a file keeps the network to evaluate, best first: ours, then what the field uses (teacher before student as DINO
# evaluates its teacher). Any other dict is looked at too, after these.
CONTAINERS = ("backbone", "", "state_dict", "model", "teacher", "student")
# A moving-average copy beside the trained network (MoCo's key encoder, BYOL's target) comes second.
COPY = re.compile(r"encoder_k|momentum|target|ema")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names that belong to a ResNet's trunk; one of these that our ResNet lacks means another network.
TRUNK = re.compile(r"(conv|bn|layer|norm|stem)\d*\.")


def load_backbone(weights, arch=None, image_size=224, seed=0):
    """The backbone of a weights file, or with weights="random" one with seeded Kaiming-normal (fan_in) convolutions.

    arch: a key of ARCHS; None recognises it from the file, and is resnet50 for "random".
    image_size: decides the stem of a random network; a file's stem is recognised from its first convolution.
    Returns (ResNet in eval mode on the CPU, one line that says what was matched and what was left over).
    Raises UserError for a file that is missing, damaged, wants to run code, or is not wholly a ResNet of `arch`.
    No collectives: call it within `distributed.together` once the process group stands.
    """
    if arch is not None and arch not in ARCHS:
        raise UserError(f"--arch {arch}: choose one of {', '.join(ARCHS)}.")
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = ResNet(arch or "resnet50", use_small_stem(image_size))
        return backbone.eval(), f"{_describe(backbone)}, random weights from seed {seed}"
    states = _state_dicts(_read(weights))
    candidates = [_match(where, state, prefix, arch) for where, state in states for prefix in _prefixes(state)]
    if not candidates:
        raise UserError(_no_resnet(weights, states))
    # The first fit place decides, not the one that fits best: a damaged network must not be taken for its copy.
    fit = [candidate for candidate in candidates if candidate["recognised"] in (ARCHS if arch is None else [arch])]
    best = (fit or candidates)[0]
    if best["problems"]:
        raise UserError(
            f"{weights}: its weights are not a whole {best['arch']}: {_some(best['problems'], '; ')} "
            f"({len(best['matched'])} tensors matched under '{best['place']}'); give the right file or --arch."
        )
    backbone = ResNet(best["arch"], best["small_stem"])
    backbone.load_state_dict(best["matched"], strict=False)
    left_over = best["left_over"]
    text = f"{_describe(backbone)} from {weights}: {len(best['matched'])} tensors matched under '{best['place']}', " \
           f"0 missing, {len(left_over)} left over" + (f" ({_some(left_over)})" if left_over else "")
    return backbone.eval(), text


def load_pretrained(backbone, weights, image_size):
    """Load a weights file into a backbone, as a start for training; returns one line about it.

    Raises UserError as `load_backbone`, and if the file's stem is for images of another size.
    """
    loaded, description = load_backbone(weights, backbone.arch, image_size)
    if loaded.small_stem != backbone.small_stem:
        side = "up to" if loaded.small_stem else "more than"
        raise UserError(f"--weights {weights}: its stem is for images of {side} 64 pixels and "
                        f"--image-size is {image_size}; change it, or take other weights.")
    backbone.load_state_dict(loaded.state_dict())
    return description


def _describe(backbone):
    return backbone.arch + (" with the small stem" if backbone.small_stem else "")


def _some(names, separator=", ", limit=3):
    more = len(names) - limit
    return separator.join(names[:limit]) + (f"{separator}and {more} more" if more > 0 else "")


# --- reading ---------------------------------------------------------------------------------------------------------


class _Ignored:
    """Stands in for what some training scripts store beside their tensors; it is read, does nothing, and is dropped."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


# DINO keeps its arguments, MMEngine its log and NumPy numbers. None of these is needed, none is ever imported.
IGNORED = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace", "pathlib.PosixPath", "_codecs.encode", "numpy.dtype", "numpy.ndarray",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "mmengine.logging.history_buffer.HistoryBuffer",
    )
]


def _read(path):
    """A file's content, tensors on the CPU and memory-mapped where its format allows; it can run no code."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"--weights {path}: {error.strerror}; give a weights file or the word random.") from error
    damaged = UserError(f"{path} is truncated or damaged; copy or download it again.")
    is_zip = start == b"PK\x03\x04"
    if not start or (is_zip and not _zip_is_whole(path)):
        raise damaged
    try:
        with safe_globals(IGNORED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|function <[\w-]+ (?:\w+ )?([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: reading it would run {refused[1] or refused[2]}, and weights need no code; "
                "save the network's state_dict() alone."
            ) from error
        raise UserError(f"{path} is not a weights file that torch.save wrote, or it is damaged.") from error
    except Exception as error:  # torch.load has no error class of its own for a file that is not what it expects
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program, which is refused; save its state_dict().") from error
        raise UserError(f"{path} is not a weights file that torch.save wrote, or it is damaged.") from error


def _zip_is_whole(path):
    """True if every part of torch.save's archive is there with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return False


# --- finding the backbone --------------------------------------------------------------------------------------------


def _state_dicts(content, where="", depth=0):
    """(name, {key: tensor}) of every dict of tensors inside a file, in the order of CONTAINERS."""
    found = []
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
        if tensors:
            found.append((where, tensors))
        if depth < 4:
            for key, value in content.items():
                found += _state_dicts(value, f"{where}/{key}" if where else str(key), depth + 1)
    if depth == 0:
        found.sort(key=lambda item: CONTAINERS.index(item[0]) if item[0] in CONTAINERS else len(CONTAINERS))
    return found


def _prefixes(state):
    """The prefixes under which a ResNet's first convolution and first block lie, moving-average copies last."""
    prefixes = [key.removesuffix("conv1.weight") for key in state if key.endswith("conv1.weight")]
    prefixes = [p for p in prefixes if f"{p}layer1.0.conv1.weight" in state and state[f"{p}conv1.weight"].dim() == 4]
    return sorted(prefixes, key=lambda prefix: bool(COPY.search(prefix)))


def _match(where, state, prefix, arch):
    """Compare what lies under a prefix with the backbone it should be."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    place = f"{where}: {prefix}" if where and prefix else where or prefix or "top level"
    small_stem = own["conv1.weight"].shape[2:] == (3, 3)
    recognised = _recognise(own)
    arch = arch or recognised
    if arch is None:
        blocks, kind, width = _structure(own)
        text = f"{kind} blocks {blocks} and a stem of {width} channels are none of {', '.join(ARCHS)}"
        return dict(arch="known ResNet", recognised=None, place=place, problems=[text], matched={})
    with torch.device("meta"):
        wanted = ResNet(arch, small_stem).state_dict()
    matched, problems = {}, []
    for key, value in wanted.items():
        if key not in own:
            if not key.endswith("num_batches_tracked"):  # files from before PyTorch 0.4.1 have no such counters
                problems.append(f"{key} is missing")
        elif own[key].shape != value.shape:
            problems.append(f"{key} has shape {tuple(own[key].shape)}, not {tuple(value.shape)}")
        elif own[key].dtype not in FLOATS and not key.endswith("num_batches_tracked"):
            problems.append(f"{key} has type {str(own[key].dtype).removeprefix('torch.')}, not a float of 16 to 64 bits")
        elif own[key].layout != torch.strided or own[key].is_meta:
            problems.append(f"{key} holds no plain numbers")
        elif own[key].is_floating_point() and not own[key].isfinite().all():
            problems.append(f"{key} is not finite")
        else:
            matched[key] = own[key]
    problems += [f"{key} is left over" for key in own if key not in wanted and TRUNK.match(key)]
    left_over = [key for key in state if not key.startswith(prefix) or key.removeprefix(prefix) not in wanted]
    return dict(arch=arch, recognised=recognised, small_stem=small_stem, place=place, matched=matched, problems=problems,
                left_over=left_over)


def _structure(own):
    """Blocks of each stage, kind of block and width of the stem, as the keys tell."""
    stages = [{key.split(".")[1] for key in own if key.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    kind = "bottleneck" if "layer1.0.conv3.weight" in own else "basic"
    return tuple(len(stage) for stage in stages), kind, len(own["conv1.weight"])


def _recognise(own):
    for arch, (block, blocks, width) in ARCHS.items():
        if _structure(own) == (tuple(blocks), "bottleneck" if block.expansion == 4 else "basic", width):
            return arch
    return None


def _no_resnet(path, states):
    keys = [key for _, state in states for key in state]
    if not keys:
        return f"{path} holds no state dict (a dict of named tensors); save the network's state_dict()."
    if any(re.search(r"patch_embed|pos_embed|cls_token|class_token|conv_proj", key) for key in keys):
        return f"{path} holds a Vision Transformer ({_some(keys)}); only ResNets can be evaluated: {', '.join(ARCHS)}."
    return (f"{path} holds no ResNet in torchvision's names, conv1.weight, layer1.0.conv1.weight, ... with any prefix; "
            f"its keys are {_some(keys)}.")
