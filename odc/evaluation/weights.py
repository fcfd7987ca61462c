"""Backbone weights from anywhere: our own files and those of other self-supervised methods.

One rule covers all: find the prefix under which a ResNet lies in torchvision's names, and take it
only if every parameter is there with its shape. To read a file runs nothing that it names.
"""

import pickle
import re
import warnings
from collections import OrderedDict, deque

import torch
import torchvision
from torch.serialization import safe_globals

from odc.errors import UserError
from odc.model import ARCHS, ResNet, use_small_stem
from odc.runtime import checkpoint

# Where a file keeps the network to evaluate, best first; other dicts come after these.
CONTAINERS = ("backbone", "", "state_dict", "model", "teacher")
# A moving average beside the trained network (MoCo's key encoder, BYOL's target) comes second.
COPY = re.compile(r"encoder_k|momentum|target|(?<![a-z])ema(?![a-z])")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of a ResNet's trunk: one of these that our ResNet lacks means another network.
TRUNK = re.compile(r"(conv|bn|layer|norm|stem)\d*\.")
# (blocks of each stage, expansion of the blocks, width of the stem) -> name
STRUCTURES = {(blocks, block.expansion, width): name
              for name, (block, blocks, width) in ARCHS.items()}


def load_backbone(weights, arch=None, image_size=224, seed=0, option="--weights"):
    """The backbone of a weights file, of a name, or for "random" with seeded random convolutions.

    A name, such as resnet50, stands for torchvision's file, which it downloads if need be.
    arch: a key of ARCHS; by default the file's, or resnet50. image_size: decides the stem of a
    random network. Returns (ResNet in eval mode on the CPU, what was matched in one line). Raises
    UserError, naming the option, for a file that is not wholly a ResNet of `arch`.
    """
    if weights == "random" and option == "--weights":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = ResNet(arch or "resnet50", use_small_stem(image_size))
        return backbone.eval(), f"{_describe(backbone)}, random weights from seed {seed}"
    try:
        if weights in ARCHS:
            file = torchvision.models.get_model_weights(weights)["IMAGENET1K_V1"]
            return _find_backbone(file.url, arch, file.get_state_dict(check_hash=True), [])
        return _find_backbone(weights, arch, *_read(weights))
    except UserError as error:
        raise UserError(f"{option} {weights}: {error}") from None
    except Exception as error:  # whatever a damaged or foreign file makes zipfile or torch raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"reading it would run {refused[1]}, which is refused"
        raise UserError(f"{option} {weights}: cannot be read ({reason}); it is missing, truncated, "
                        "damaged, or not a weights file: give a network's state_dict().") from None


def _find_backbone(path, arch, content, passed_over):
    """What `load_backbone` returns, from what `_read` does. Raises UserError without the path."""
    dicts = sorted(_dicts(content), key=lambda item: (
        [*CONTAINERS, item[0]].index(item[0]), _is_copy(item[0])))
    states = [(where, _torchvision_names({key: value for key, value in found.items()
                                          if isinstance(key, str) and torch.is_tensor(value)}))
              for where, found in dicts]
    places = [(where, state, *network) for where, state in states for network in _networks(state)]
    if not places:
        keys = [key for _, state in states for key in state]
        objects = f" but objects of {_some(passed_over)}" if passed_over else ""
        found = f"keys {_some(keys)}" if keys else f"no state dict{objects}"
        raise UserError(f"it holds {found}, and no ResNet in torchvision's names, conv1.weight, "
                        "layer1.0, ...; give a file with a ResNet's state_dict().")
    # The first place of this architecture decides, even if it is damaged and a copy is not.
    wanted = [structure for structure, name in STRUCTURES.items() if arch in (None, name)]
    where, state, prefix, structure = next((p for p in places if p[-1] in wanted), places[0])
    arch = arch or STRUCTURES.get(structure)
    if arch is None:
        blocks, _, width = structure
        raise UserError(f"its blocks {blocks} and its stem of {width} channels are none of "
                        f"{', '.join(ARCHS)}; give another file.")
    own = {key.removeprefix(prefix): value for key, value in state.items()
           if key.startswith(prefix)}
    backbone = ResNet(arch, small_stem=own["conv1.weight"].shape[2:] == (3, 3))
    matched, problems = _match(own, backbone.state_dict())
    place = f"{len(matched)} tensors matched under '{f'{where}/{prefix}'.strip('/')}'"
    if problems:
        raise UserError(f"its weights are not a whole {arch}: {_some(problems)} ({place}); give "
                        "the right file or --arch.")
    backbone.load_state_dict(matched, strict=False)
    left_over = [key for key in state
                 if not key.startswith(prefix) or key.removeprefix(prefix) not in matched]
    text = f"{_describe(backbone)} from {path}: {place}, 0 missing, {len(left_over)} left over"
    text += f" ({_some(left_over)})" if left_over else ""
    text += f"; passed over: objects of {_some(passed_over)}" if passed_over else ""
    return backbone.eval(), text


def _describe(backbone):
    return backbone.arch + (" with the small stem" if backbone.small_stem else "")


def _some(names):
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


# A stand-in for a class or function that a file names takes any arguments and does nothing: what
# makes one, and what torch's unpickler says of a name that needs it.
STAND_INS = (
    (lambda cls, *arguments: object.__new__(cls),
     re.compile(r"Unsupported global: GLOBAL (\S+) was not")),
    (lambda cls, *arguments: OrderedDict(),
     re.compile(r"Can only SETITEMS? for .*, but got .*\.<(.+)>'>")),
    (lambda cls, *arguments: [],
     re.compile(r"Can only (?:app|ext)end (?:to )?lists, but got .*\.<(.+)>'>")),
)


def _read(path):
    """The content of a file, and the names of objects passed over."""
    makers = {}
    while True:  # each refused name gets a stand-in, and the file is read again
        stand_ins = [(type(f"<{name}>", (), {"__new__": make, "__setstate__": lambda *_: None}),
                      name) for name, make in makers.items()]
        try:
            with safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return checkpoint.load(path, zip_only=False), list(makers)
        except pickle.UnpicklingError as error:
            make, name = next(((make, match[1]) for make, refusal in STAND_INS
                               if (match := refusal.search(str(error)))), (None, ""))
            name = name if "." in name else f"builtins.{name}"
            if make is None or makers.get(name) is make:
                raise
            makers[name] = make


def _dicts(content):
    """(name, dict) of all nested dicts, what is nearest to the top first, and each one once."""
    queue, seen = deque([("", content)]), set()
    while queue:
        where, found = queue.popleft()
        if isinstance(found, dict) and id(found) not in seen:
            seen.add(id(found))
            yield where, found
            queue.extend((f"{where}/{key}".strip("/"), value) for key, value in found.items())


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
    """A state dict with Hugging Face's names, and an nn.Sequential's numbers, in torchvision's."""
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


def _networks(state):
    """(prefix, key of STRUCTURES or its like) of each ResNet, copies and students last."""
    for prefix in sorted((key.removesuffix("conv1.weight") for key, value in state.items()
                          if key.endswith("conv1.weight") and value.dim() == 4), key=_is_copy):
        if f"{prefix}layer1.0.conv1.weight" in state:
            stages = [{key.removeprefix(prefix).split(".")[1] for key in state
                       if key.startswith(f"{prefix}layer{stage}.")} for stage in (1, 2, 3, 4)]
            expansion = 4 if f"{prefix}layer1.0.conv3.weight" in state else 1
            width = len(state[f"{prefix}conv1.weight"])
            yield prefix, (tuple(map(len, stages)), expansion, width)


def _is_copy(name):
    """A key for sorting: a trained network or a teacher, moving averages, students."""
    return "student" in name, bool(COPY.search(name))


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
        elif ((own[key].dtype not in FLOATS and not counter) or own[key].is_meta
              or own[key].layout != torch.strided or not own[key].isfinite().all()
              or (key.endswith("_var") and own[key].min() < 0)):
            problems.append(f"{key} holds no plain floats, or is negative or not finite")
        else:
            matched[key] = own[key]
    problems += [f"{key} is left over" for key in own if key not in wanted and TRUNK.match(key)]
    return matched, problems
