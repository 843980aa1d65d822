"""Weight files from elsewhere, given by a local path: safetensors, or what torch.save wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.perceptual import PerceptualDistance

# lin0.model.1.weight as the LPIPS repository saves them, model.0 where dropout was left out, lins.0
# where its list of the same layers was saved.
_LINEAR_KEY = re.compile(r"(?:^|\.)lins?\.?([0-9]+)\.(?:model\.[0-9]+\.)?weight$")
# What tools wrap a state_dict in, and what wrappers put before every key.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "params")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name; code in it is never run.

    Args:
        path: .safetensors, or a file that torch.load reads with weights_only: a dict of tensors, by
            itself or under `state_dict`, `model`, `model_state_dict` or `params`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no tensors by name.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected a file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle makes its reader raise nearly anything
        raise ValueError(
            f"{path}: not a file of weights ({type(error).__name__}); expected .safetensors, or "
            "tensors alone as torch.save writes them"
        ) from None
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: holds no tensors by name; expected the state_dict of a network")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def load_perceptual(backbone: str, weights: Path, linear: Path | None = None) -> PerceptualDistance:
    """LPIPS from local files; with `linear`, exactly the LPIPS repository's for vgg16.

    Args:
        backbone: timm's name of the network; see `PerceptualDistance`.
        weights: of its classifier, as torchvision or timm save it; the classifier's head is not used.
        linear: LPIPS's weights per channel, `lin0.model.1.weight` and so on; None for the mean.
    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: timm has no such network, a file cannot be read, or does not fit the network.
    """
    with torch.device("meta"):  # every weight is about to be replaced
        distance = PerceptualDistance(backbone, learned=linear is not None)
    if any(buffer.is_meta for buffer in distance.net.buffers()):  # some may not be in the file
        distance = PerceptualDistance(backbone, learned=linear is not None)
    found = _fitting(distance.net, read_weights(weights), weights, backbone)
    distance.net.load_state_dict(found, assign=True)
    if linear is not None:
        for stage, value in enumerate(_linear_weights(distance, linear)):
            distance.linear[stage] = nn.Parameter(value, requires_grad=False)
    return distance.requires_grad_(False)


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key.replace(".", "_")  # timm writes features.0 as features_0 when it cuts off the head


def _fitting(
    net: nn.Module, given: Mapping[str, Tensor], path: Path, backbone: str
) -> dict[str, Tensor]:
    """The given tensors under the network's own names, in float32."""
    by_name = {_plain(key): value for key, value in given.items()}
    wanted = net.state_dict()
    # Not in files older than that counter, and unused in eval mode.
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = [key for key in wanted if _plain(key) not in by_name and key not in counters]
    if missing:
        raise ValueError(
            f"{path}: lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors missing); expected "
            f"the weights of {backbone} as torchvision or timm name them"
        )
    stages = tuple(f"{name}_" for name, child in net.named_children() if child.state_dict())
    known = {_plain(key) for key in wanted}
    deeper = [key for key in given if _plain(key).startswith(stages) and _plain(key) not in known]
    if deeper:
        raise ValueError(
            f"{path}: has {deeper[0]} ({len(deeper)} such tensors), which {backbone} lacks; are these "
            "the weights of a deeper network?"
        )
    found: dict[str, Tensor] = {}
    for key, value in wanted.items():
        tensor = by_name.get(_plain(key), torch.zeros(value.shape))
        if tensor.shape != value.shape:
            raise ValueError(
                f"{path}: {key} is {tuple(tensor.shape)}, expected {tuple(value.shape)}; are these the "
                f"weights of {backbone}?"
            )
        found[key] = tensor.long() if key in counters else tensor.float()
        if not found[key].isfinite().all():
            raise ValueError(f"{path}: {key} has values that are NaN or infinite")
    return found


def _linear_weights(distance: PerceptualDistance, path: Path) -> list[Tensor]:
    """One (c,) per stage."""
    by_stage = {
        int(match[1]): value
        for key, value in read_weights(path).items()
        if (match := _LINEAR_KEY.search(key))
    }
    if sorted(by_stage) != list(range(len(distance.channels))):
        raise ValueError(
            f"{path}: has LPIPS weights for {len(by_stage)} stages, but {distance.backbone} has "
            f"{len(distance.channels)}; expected lin0.model.1.weight and so on, made for that backbone"
        )
    weights = []
    for stage, channels in enumerate(distance.channels):
        value = by_stage[stage].float()
        if value.numel() != channels:
            raise ValueError(
                f"{path}: lin{stage} has {value.numel()} channels, but {distance.backbone} has "
                f"{channels} there; use the LPIPS weights of that backbone"
            )
        if not (value >= 0).all():  # not true of NaN either
            raise ValueError(f"{path}: lin{stage} has negative or NaN weights, expected 0 or more")
        weights.append(value.flatten())
    return weights
