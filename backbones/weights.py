"""Read our, timm's and mmpretrain's weights; write ours: safetensors with a JSON header that says what they are."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.errors import InputError
from backbones.files import write_aside
from backbones.published import RELEASES

if TYPE_CHECKING:
    from backbones.cspnet import CSPNet

HUB = "https://huggingface.co/{repository}/resolve/main/model.safetensors"
METADATA_KEY = "cspnet"

# mmpretrain's parameter names, in its CSPNet's spelling, and ours.
MMPRETRAIN = (
    (r"^backbone\.stem\.0\.", "stem.conv1."),
    (r"^backbone\.stem\.(conv|bn)\.", r"stem.conv1.\1."),
    (r"^backbone\.stages\.", "stages."),
    (r"\.downsample_conv\.", ".conv_down."),
    (r"\.expand_conv\.", ".conv_exp."),
    (r"\.atfer_blocks_conv\.", ".conv_transition_b."),
    (r"\.final_conv\.", ".conv_transition."),
    (r"(\.blocks\.\d+)\.conv(\d)\.(weight|bias)$", r"\1.conv\2.conv.\3"),  # ResNe(X)t's blocks alone
    (r"(\.blocks\.\d+)\.bn(\d)\.", r"\1.conv\2.bn."),
    (r"^head\.fc\.", "head.fc."),
)


def load_weights(model: "CSPNet", source: str | Path, *, ignore_head: bool = False) -> dict[str, Any]:
    """Load weights into `model`, recognised by their content, and return their metadata ({} if not ours).

    Args:
        source: a path or URL of our safetensors, timm's state dict (safetensors or .pth) or mmpretrain's
            checkpoint; or `timm`, for the published weights of this variant.
        ignore_head: leave the classifier as it is, whatever its size in `source`.

    Raises:
        InputError: nothing there, an unsafe pickle, or weights of another architecture or head size.
    """
    state, metadata = read_weights(resolve(source, model.name))
    said = metadata.get("model", model.name)
    if said != model.name:
        raise InputError(f"{source} holds weights of {said}, not of {model.name}: set model={said}")
    if ignore_head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    elif model.num_classes == 0:
        built = tuple(f"stages.{i}." for i in range(len(model.stages)))
        state = {key: state[key] for key in state if key.startswith(("stem.", *built))}
    load_state(model, state, source, model.name)
    return metadata


def resolve(source: str | Path, model: str | None = None) -> Path:
    """The local file of `source`; what is remote is downloaded once, to torch.hub's cache.

    Args:
        model: the network whose published weights `timm` stands for.

    Raises:
        InputError: nothing there.
    """
    if source == "timm":
        if model not in RELEASES:
            raise InputError(
                f"timm has no published weights of {model or 'a network without a name'}: give a path or a URL"
            )
        source = HUB.format(repository=RELEASES[model].hub)
    if re.match(r"https?://", str(source)):
        return _download(str(source))
    if not Path(source).is_file():
        raise InputError(f"no weights at {source}: give a file, a URL, or 'timm' for the published ones")
    return Path(source)


def _download(url: str) -> Path:
    # The whole URL names the file: every hub repository calls its file model.safetensors.
    path = Path(torch.hub.get_dir()) / "checkpoints" / "cspnet" / quote(url, safe="")[-200:]
    if not path.is_file():
        with write_aside(path) as aside:
            try:
                torch.hub.download_url_to_file(url, str(aside))
            except (URLError, OSError) as error:
                raise InputError(f"cannot download {url} ({error}): fetch it elsewhere and give its path") from None
            read_weights(aside)  # half a file must not stay
    return path


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict under our names, on the CPU, and the metadata (empty where the file has none of ours).

    Raises:
        InputError: neither safetensors nor a checkpoint that torch reads with `weights_only=True`.
    """
    if _is_safetensors(path):
        return _read_safetensors(path)
    return _canonical(_unwrap(_read_pickle(path), path)), {}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What our safetensors say about themselves, without reading the weights; {} of any other file."""
    return _read_safetensors(path, keys=())[1] if _is_safetensors(path) else {}


def _is_safetensors(path: str | Path) -> bool:
    """By content: eight bytes of length, then the JSON header."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:9] == b"{"
    except OSError as error:
        raise InputError(f"cannot read weights {path}: {error.strerror}") from None


def _read_safetensors(path: str | Path, keys: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is a broken safetensors file ({error}): fetch it again") from None
    return _canonical(state), metadata


def _read_pickle(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} is no weights file that can be read safely ({first}): "
            "give safetensors, or a checkpoint of plain tensors"
        ) from None


def _unwrap(checkpoint: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under the keys that trainers commonly use."""
    for key in ("ema", "state_dict_ema", "state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise InputError(f"{path} holds no state dict: give weights, not a whole model or a training log")
    tensors = {str(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # torch's AveragedModel counts
    return tensors


def _canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameter names: without `module.` of data parallelism, and translated from mmpretrain's."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if not any(key.startswith("backbone.stages.") and ".expand_conv." in key for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, ours in MMPRETRAIN:
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    return renamed


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: object, name: str) -> None:
    """Load a state dict whose names and shapes must all fit; BatchNorm's batch counts may be missing.

    Raises:
        InputError: the first names or shapes that differ, and what to do.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    # A frozen BatchNorm does not count.
    state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
    foreign = [key for key in state if key not in own]
    if missing or foreign:
        lacks = f"lacks {missing[0]} and {len(missing) - 1} more" if missing else ""
        extra = f"has an unknown {foreign[0]} and {len(foreign) - 1} more" if foreign else ""
        problem = " and ".join(filter(None, (lacks, extra)))
        raise InputError(f"{source} does not hold weights of {name}: it {problem}")
    wrong = [key for key in state if state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        problem = f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
        head = all(key.startswith("head.") for key in wrong)
        remedy = "; give num_classes to match, or ignore_head=true to leave the head out" if head else ""
        raise InputError(f"{source} does not fit {name}: {problem}{remedy}")
    module.load_state_dict(dict(state), strict=False)


def save_weights(path: str | Path, module: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a module's weights as safetensors with `metadata` as JSON in the header, whole or not at all."""
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    with write_aside(path) as aside:
        save_file(state, aside, metadata={METADATA_KEY: json.dumps(metadata)})
