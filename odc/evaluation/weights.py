"""Backbone weights from anywhere: our own files and those of other self-supervised methods.

One rule covers all: among the dicts of tensors in a file, find the prefix under which a ResNet lies
in torchvision's names, and take it only if every parameter is there with its shape. Files are read
by torch's restricted unpickler. It calls nothing that a file names, but for what rebuilds tensors.
"""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import torch
from torch.serialization import safe_globals

from odc.errors import UserError
from odc.model import ARCHS, ResNet, use_small_stem

# Where a file keeps the network to evaluate, best first (the teacher, as DINO evaluates it). Other
# dicts come after these.
CONTAINERS = ("backbone", "", "state_dict", "model", "teacher", "student")
# A moving average beside the trained network (MoCo's key encoder, BYOL's target) comes second.
COPY = re.compile(r"encoder_k|momentum|target|(?<![a-z])ema(?![a-z])")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of a ResNet's trunk: one of these that our ResNet lacks means another network.
TRUNK = re.compile(r"(conv|bn|layer|norm|stem)\d*\.")
# timm's names of networks with all tensors of a ResNet and other pooling, which has no tensors.
OTHER_POOLING = re.compile(r"resnet(?:aa|blur)\d+")
# (blocks of each stage, expansion of the blocks, width of the stem) -> name
STRUCTURES = {(blocks, block.expansion, width): name
              for name, (block, blocks, width) in ARCHS.items()}


def load_backbone(weights, arch=None, image_size=224, seed=0):
    """The backbone of a weights file, or for "random" one with seeded random convolutions.

    arch: a key of ARCHS; by default as recognised in the file, or resnet50 for "random".
    image_size: decides the stem of a random network. A file's stem is recognised.
    Returns (ResNet in eval mode on the CPU, one line about what was matched and what was not).
    Raises UserError for a file that is missing, damaged, wants to run code, or is not wholly a
    ResNet of `arch`.
    """
    if arch is not None and arch not in ARCHS:
        raise UserError(f"--arch {arch}: choose one of {', '.join(ARCHS)}.")
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = ResNet(arch or "resnet50", use_small_stem(image_size))
        return backbone.eval(), f"{_describe(backbone)}, random weights from seed {seed}"
    content, passed_over = _read(weights)
    states = sorted(_state_dicts(content), key=lambda item: (
        [*CONTAINERS, item[0]].index(item[0]), _is_copy(item[0])))
    states = [(where, _torchvision_names(state)) for where, state in states]
    places = [(where, state, prefix, _structure(state, prefix))
              for where, state in states for prefix in _prefixes(state)]
    if not places:
        raise UserError(_no_resnet(weights, states, passed_over))
    # The first place of this architecture decides, even if it is damaged and a copy is not.
    wanted = [structure for structure, name in STRUCTURES.items() if arch in (None, name)]
    where, state, prefix, structure = next((p for p in places if p[-1] in wanted), places[0])
    place = f"{where}: {prefix}" if where and prefix else where or prefix or "top level"
    own = {key.removeprefix(prefix): value for key, value in state.items()
           if key.startswith(prefix)}
    channels, *kernel = own["conv1.weight"].shape[1:]
    if channels != 3:
        raise UserError(f"{weights}: its first convolution takes {channels} channels"
                        f"{' (of a Sobel filter, perhaps)' if channels == 2 else ''}, and "
                        "images here have 3; this network cannot be evaluated.")
    arch = arch or STRUCTURES.get(structure)
    if arch is None:
        blocks, expansion, width = structure
        matched, problems = {}, [f"{'bottleneck' if expansion == 4 else 'basic'} blocks {blocks} "
                                 f"and a stem of {width} channels are none of {', '.join(ARCHS)}"]
    else:
        backbone = ResNet(arch, small_stem=kernel == [3, 3])
        matched, problems = _match(own, backbone.state_dict())
    if problems:
        raise UserError(
            f"{weights}: its weights are not a whole {arch or 'known ResNet'}: "
            f"{_some(problems, '; ')} ({len(matched)} tensors matched under '{place}'); give the "
            "right file or --arch.")
    backbone.load_state_dict(matched, strict=False)
    left_over = [key for key in state
                 if not key.startswith(prefix) or key.removeprefix(prefix) not in matched]
    text = (f"{_describe(backbone)} from {weights}: {len(matched)} tensors matched under "
            f"'{place}', 0 missing, {len(left_over)} left over")
    text += f" ({_some(left_over)})" if left_over else ""
    text += f"; passed over: objects of {_some(passed_over)}" if passed_over else ""
    if named := next(filter(None, map(OTHER_POOLING.search, [weights, *_strings(content)])), None):
        text += f"; it names {named[0]}, whose pooling this backbone lacks: features will differ"
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


# --- reading -------------------------------------------------------------------------------------


class _Object:
    """Stands in for a class or function that a file names: takes any arguments, does nothing."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.state = state


class _Dict(_Object):  # a kind of dict
    def __new__(cls, *arguments):
        return OrderedDict()


class _List(_Object):  # a kind of list
    def __new__(cls, *arguments):
        return []


# What torch's unpickler says of a name that it does not know, or of a stand-in of the wrong kind.
REFUSALS = (
    (_Object, re.compile(r"Unsupported global: GLOBAL (\S+) was not")),
    (_Dict, re.compile(r"Can only SETITEMS? for .*, but got .*\.<(.+)>'>")),
    (_List, re.compile(r"Can only (?:app|ext)end (?:to )?lists, but got .*\.<(.+)>'>")),
)


def _load(path, is_zip):
    """The content of a file, and the names that it has objects of, which are passed over.

    Unknown names are found one by one. Each gets a stand-in, and the file is read again.
    """
    kinds = {}
    while True:
        stand_ins = [(type(f"<{name}>", (kind,), {}), name) for name, kind in kinds.items()]
        try:
            with safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True,
                                     mmap=is_zip and str(path).isascii())
            return content, list(kinds)
        except pickle.UnpicklingError as error:
            kind, name = next(((kind, match[1]) for kind, refusal in REFUSALS
                               if (match := refusal.search(str(error)))), (None, ""))
            name = name if "." in name else f"builtins.{name}"
            if kind is None or kinds.get(name) is kind:
                raise
            kinds[name] = kind


def _read(path):
    """As `_load`, with tensors memory-mapped where the format allows it. Raises UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"--weights {path}: {error.strerror}; give a weights file or the word "
                        "random.") from error
    is_zip = start == b"PK\x03\x04"
    try:  # every part of torch.save's archive must be there with its checksum
        whole = start and (not is_zip or zipfile.ZipFile(path).testzip() is None)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path} is truncated or damaged; copy or download it again.")
    try:
        return _load(path, is_zip)
    except Exception as error:  # torch.load has no error class of its own
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path} is refused: reading it would run {refused[1]}, and weights "
                            "need no code; save the network's state_dict() alone.") from error
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program, which is refused; save its "
                            "state_dict().") from error
        raise UserError(f"{path} is not a weights file that torch.save wrote, or it is "
                        "damaged.") from error


# --- finding the backbone ------------------------------------------------------------------------


def _state_dicts(content, where="", depth=0):
    """(name, {key: tensor}) of every dict of tensors in a file."""
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items()
                   if isinstance(key, str) and torch.is_tensor(value)}
        if tensors:
            yield where, tensors
        for key, value in content.items() if depth < 4 else ():
            yield from _state_dicts(value, f"{where}/{key}" if where else str(key), depth + 1)


def _strings(content, depth=0):
    """All strings in a file, as far as they are not keys."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, _Object):
        yield from _strings(vars(content).get("state"), depth)
    elif depth < 4 and isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _strings(value, depth + 1)


# Hugging Face's names of a ResNet's parts, and CIFAR ResNets' of the shortcut, in torchvision's.
NAMES = (
    (r"\bembedder\.embedder\.convolution\.", "conv1."),
    (r"\bembedder\.embedder\.normalization\.", "bn1."),
    (r"\bencoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.(0|convolution)\.", ".downsample.0."),
    (r"\.shortcut\.(1|normalization)\.", ".downsample.1."),
)
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # in torchvision's order


def _torchvision_names(state):
    """A state dict with the parts of a ResNet under torchvision's names.

    The parts may have Hugging Face's names, or be the numbered children of an nn.Sequential.
    """
    for pattern, name in NAMES:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    blocks = [re.fullmatch(r"((?:.*\.)?)\d+\.0\.conv1\.weight", key) for key in state]
    for prefix in {block[1] for block in blocks if block}:
        child = re.compile(re.escape(prefix) + r"(\d+)\.")
        numbers = sorted({int(m[1]) for m in map(child.match, state) if m})  # those with tensors
        names = dict(zip(map(str, numbers), CHILDREN))
        state = {child.sub(lambda m: f"{prefix}{names.get(m[1], m[1])}.", key, count=1)
                 if child.match(key) else key: value for key, value in state.items()}
    return state


def _prefixes(state):
    """The prefixes of a first convolution with a first block, copies and students last."""
    prefixes = [key.removesuffix("conv1.weight") for key, value in state.items()
                if key.endswith("conv1.weight") and value.dim() == 4]
    return sorted((prefix for prefix in prefixes if f"{prefix}layer1.0.conv1.weight" in state),
                  key=_is_copy)


def _is_copy(name):
    """A key for sorting: a trained network or a teacher, moving averages, students."""
    return "student" in name, bool(COPY.search(name))


def _structure(state, prefix):
    """A key of STRUCTURES, or its like, of the network under a prefix."""
    stages = [{key.removeprefix(prefix).split(".")[1] for key in state
               if key.startswith(f"{prefix}layer{stage}.")} for stage in (1, 2, 3, 4)]
    expansion = 4 if f"{prefix}layer1.0.conv3.weight" in state else 1
    return tuple(map(len, stages)), expansion, len(state[f"{prefix}conv1.weight"])


def _match(own, wanted):
    """The tensors of a state dict that fit the wanted one, and what is wrong with the others."""
    matched, problems = {}, []
    for key, value in wanted.items():
        counter = key.endswith("num_batches_tracked")  # not in files from before PyTorch 0.4.1
        if counter and (key not in own or own[key].shape != value.shape):
            continue  # nothing here uses it
        if key not in own:
            problems.append(f"{key} is missing")
        elif own[key].shape != value.shape:
            problems.append(f"{key} has shape {tuple(own[key].shape)}, not {tuple(value.shape)}")
        elif own[key].dtype not in FLOATS and not counter:
            problems.append(f"{key} has type {str(own[key].dtype).removeprefix('torch.')}, not a "
                            "float of 16 to 64 bits")
        elif own[key].layout != torch.strided or own[key].is_meta:
            problems.append(f"{key} holds no plain numbers")
        elif own[key].is_floating_point() and not own[key].isfinite().all():
            problems.append(f"{key} is not finite")
        elif key.endswith("running_var") and (own[key] < 0).any():
            problems.append(f"{key} is negative")
        else:
            matched[key] = own[key]
    problems += [f"{key} is left over" for key in own if key not in wanted and TRUNK.match(key)]
    return matched, problems


def _no_resnet(path, states, passed_over):
    """What a file without a ResNet holds, in one sentence."""
    keys = [key for _, state in states for key in state]
    if not keys:
        objects = f", but objects of {_some(passed_over)}" if passed_over else ""
        return (f"{path} holds no state dict (a dict of named tensors){objects}; save the "
                "network's state_dict().")
    for kind, names in (
            ("Vision Transformer", r"patch_embed|cls_token|class_token|class_embedding|conv_proj"),
            ("network with attention", r"attn|pos_embed")):
        if named := [key for key in keys if re.search(names, key)]:
            return (f"{path} holds a {kind} ({_some(named)}); only ResNets can be evaluated: "
                    f"{', '.join(ARCHS)}.")
    return (f"{path} holds no ResNet in torchvision's names, conv1.weight, layer1.0.conv1.weight, "
            f"... with any prefix; its keys are {_some(keys)}.")
