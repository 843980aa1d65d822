"""LoRA files: low-rank updates of a DiT's linear layers, in the format of diffusers and peft.

    pytorch_lora_weights.safetensors    transformer.blocks.0.attn1.to_q.lora_A.weight, (rank in)
                                        transformer.blocks.0.attn1.to_q.lora_B.weight, (out rank)

under the names of WanTransformer3DModel. Their factor alpha / rank stands in the file's header, as
diffusers writes it (`lora_adapter_metadata`), or beside it in peft's adapter_config.json; a file that
says nothing means 1. Training adds a lora.yaml for its readers: what the update was trained on.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit.transformer import DiT
from sample.model import Model
from sample.shards import read_header
from sample.wan_names import wan_name

WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"
_PREFIXES = ("transformer.", "base_model.model.")  # diffusers' and peft's own
LoRA = tuple[Path, float]  # a file or folder, and a scale
_NAME = re.compile(r"(.+)\.(lora_[AB])\.weight|(.+)\.(alpha)")


def save_lora(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], about: dict[str, Any]
) -> None:
    """Writes a LoRA as `WanPipeline.save_lora_weights` does, and lora.yaml, which comes last.

    Args:
        weights: by our layers' names and `lora_A.weight` (rank in) or `lora_B.weight` (out rank).
        config: peft's r, lora_alpha and target_modules, these by diffusers' names.
        about: what lora.yaml says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"transformer.{wan_name(name)}": value.detach().cpu().contiguous()
        for name, value in weights.items()
    }
    adapter = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    partial = folder / f".{WEIGHTS}.partial"
    save_file(named, partial, metadata={"format": "pt", _METADATA: adapter})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / ".lora.yaml.partial"
    partial.write_text(yaml.safe_dump(about, sort_keys=False))
    os.replace(partial, folder / "lora.yaml")


def lora_step(folder: Path) -> int | None:
    """After how many steps the LoRA in a folder was written; None where nothing says so."""
    if not (folder / "lora.yaml").is_file():
        return None
    try:
        step = yaml.safe_load((folder / "lora.yaml").read_text())["provenance"]["step"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE, as --lora takes it.

    Raises:
        ValueError: a scale that is not a finite number.
    """
    path, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon and path else None
    except ValueError:
        scale = None
    if scale is None:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise ValueError(f"--lora {text}: the scale must be a finite number, such as 0.8")
    return Path(path), scale


def _find(path: Path) -> Path:
    """The file of weights that a file or a folder stands for."""
    if path.is_file():
        return path
    for name in (WEIGHTS, _PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    what = f"no {WEIGHTS} in it" if path.is_dir() else "no such file or folder"
    raise FileNotFoundError(f"{path}: {what}; expected a LoRA, such as runs/fox/lora")


def _adapter_config(path: Path) -> dict[str, Any]:
    """peft's settings from the file's header or from the file beside it; empty where there are none.

    Raises:
        ValueError: they cannot be read.
    """
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    beside = path.with_name("adapter_config.json")
    where = path
    try:
        if text is not None:
            values = json.loads(text)
            return {key.removeprefix("transformer."): value for key, value in values.items()}
        if path.name == _PEFT_WEIGHTS and beside.is_file():
            where = beside
            return dict(json.loads(beside.read_text()))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: its LoRA settings cannot be read ({error})") from error
    return {}


def _alpha(config: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha by peft's rules: its pattern, else the one for all, else the rank."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return float(rank if alpha is None else alpha)


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by diffusers' name of the layer and what they are, and peft's settings.

    Raises:
        FileNotFoundError, ValueError: no such file, damaged, or not a plain LoRA.
    """
    read_header(path)  # says what is wrong with a damaged file
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        found = _NAME.fullmatch(name.removeprefix(prefix))
        if found is None:
            raise ValueError(
                f"{path}: not a LoRA as diffusers writes it: it has {name}, expected names such as "
                "transformer.blocks.0.attn1.to_q.lora_A.weight"
            )
        layer, kind = found[1] or found[3], found[2] or found[4]
        layers.setdefault(layer, {})[kind] = value
    if not layers:
        raise ValueError(f"{path}: there is nothing in it; expected the weights of a LoRA")
    return layers, _adapter_config(path)


def _update(
    path: Path, layer: str, tensors: dict[str, Tensor], config: dict[str, Any], linear: nn.Linear
) -> Tensor:
    """What a LoRA adds to a layer's weight, (out in) float32."""
    if not {"lora_A", "lora_B"} <= tensors.keys():
        missing = "lora_A" if "lora_B" in tensors else "lora_B"
        raise ValueError(f"{path}: {layer} has no {missing}; the file is incomplete")
    # A convolution's kernel is flat in our linear layer, its elements in the same order.
    a, b = (tensors[name].float().flatten(1) for name in ("lora_A", "lora_B"))
    got, wanted = (b.shape[0], a.shape[1]), tuple(linear.weight.shape)
    if got != wanted or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{path}: a LoRA of another model: its {layer} is {'x'.join(map(str, got))} of rank "
            f"{a.shape[0]}, this model's {'x'.join(map(str, wanted))}"
        )
    rank = a.shape[0]
    alpha = tensors["alpha"].item() if "alpha" in tensors else _alpha(config, layer, rank)
    factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return factor * (b @ a)


@torch.no_grad()
def apply_lora(dit: DiT, path: Path, scale: float = 1.0) -> None:
    """Adds a LoRA to a DiT's weights for good: W + scale * alpha / rank * B A.

    Args:
        path: the file, or its folder.
        scale: 0 changes nothing, 1 is the LoRA as it was trained.
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another kind or of another model; nothing has changed then.
    """
    path = _find(path)
    layers, config = _read(path)
    linears = {wan_name(n): m for n, m in dit.named_modules() if isinstance(m, nn.Linear)}
    unknown = [layer for layer in layers if layer not in linears]
    if unknown:
        raise ValueError(
            f"{path}: a LoRA of another model: this one has no layer {unknown[0]} "
            f"({len(unknown)} of its {len(layers)} layers are unknown)"
        )
    for layer, tensors in layers.items():  # look at all of them before the first is changed
        meta = {name: value.to("meta") for name, value in tensors.items() if name != "alpha"}
        _update(path, layer, meta, config, linears[layer])
    for layer, tensors in layers.items():
        weight = linears[layer].weight
        update = _update(path, layer, tensors, config, linears[layer])
        weight.copy_(weight.float() + scale * update.to(weight.device))


def add_loras(model: Model, loras: Sequence[LoRA], low: Sequence[LoRA]) -> None:
    """Adds LoRAs to a model's DiT, and others to its low-noise expert, each with its scale.

    Raises:
        FileNotFoundError, ValueError: see `apply_lora`; or the model has no such part.
    """
    for dit, some, flag in ((model.dit, loras, "--lora"), (model.dit_low_noise, low, "--lora-low")):
        if some and dit is None:
            part = "low-noise expert" if model.dit is not None else "DiT"
            raise ValueError(f"{flag} {some[0][0]}: this model has no {part}")
        for path, scale in some:
            assert dit is not None
            apply_lora(dit, path, scale)
