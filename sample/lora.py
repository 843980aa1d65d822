"""LoRA files: low-rank updates of a DiT's linear layers, in the format of diffusers and peft.

    pytorch_lora_weights.safetensors    transformer.blocks.0.attn1.to_q.lora_A.weight, (rank in)
                                        transformer.blocks.0.attn1.to_q.lora_B.weight, (out rank)

under the names of WanTransformer3DModel. Their factor alpha / rank stands in the file's header, as
diffusers writes it (`lora_adapter_metadata`), or beside it in peft's adapter_config.json; a file that
says nothing means 1. Training adds a lora.yaml for its readers: what the update was trained on.
"""

import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit.transformer import DiT
from sample.model import Model, ModelInfo, also_knowing
from sample.shards import read_header, save_tensors
from sample.wan_names import wan_name

_log = logging.getLogger(__name__)

WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"
_PREFIXES = ("transformer.", "base_model.model.")  # diffusers' and peft's own
_FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
KNOWS = ("tasks", "sizes", "references", "given_noise")  # that lora.yaml says under `trained`
LoRA = tuple[Path, float]  # a file or folder, and a scale
GivenLoRA = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
GivenLoRAs = str | os.PathLike[str] | Sequence[GivenLoRA]
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
    save_tensors(named, partial, {"format": "pt", _METADATA: adapter})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / ".lora.yaml.partial"
    partial.write_text(yaml.safe_dump(about, sort_keys=False))
    os.replace(partial, folder / "lora.yaml")


def _about(folder: Path) -> dict[str, Any]:
    """What lora.yaml says; nothing where there is none, or none that can be read."""
    try:
        about = yaml.safe_load((folder / "lora.yaml").read_text())
    except (yaml.YAMLError, OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def lora_step(folder: Path) -> int | None:
    """After how many steps the LoRA in a folder was written; None where nothing says so."""
    provenance = _about(folder).get("provenance")
    step = provenance.get("step") if isinstance(provenance, dict) else None
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


def as_loras(given: GivenLoRAs) -> list[LoRA]:
    """What Python code may give: one or several of "PATH", "PATH:SCALE", and (path, scale)."""
    several = [given] if isinstance(given, str | os.PathLike) else given
    return [
        (Path(each[0]), float(each[1])) if isinstance(each, tuple) else parse_lora(os.fspath(each))
        for each in several
    ]


def weights_of(path: Path) -> Path:
    """The file of weights that a file or a folder stands for."""
    if path.is_file():
        return path
    for name in (WEIGHTS, _PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    what = f"no {WEIGHTS} in it" if path.is_dir() else "no such file or folder"
    raise FileNotFoundError(f"{path}: {what}; expected a LoRA, such as runs/fox/lora")


def _load(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, and peft's settings as the header has them.

    Raises:
        FileNotFoundError, ValueError: no such file, or damaged.
    """
    read_header(path)  # says what is wrong with most damaged files
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(_METADATA)
    except SafetensorError as error:
        raise ValueError(f"{path}: a damaged safetensors file ({error})") from error


def _is_number(value: object) -> bool:
    """bool is not one, nor are NaN, Infinity and integers too large for a float, as JSON has them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _check_settings(config: dict[str, Any]) -> None:
    """Raises a ValueError at the first setting that makes no sense."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern is {patterns!r:.60}, expected numbers by layers' names")
    alphas = {"lora_alpha": alpha} if alpha is not None else {}
    for name, value in {**alphas, **patterns}.items():
        if not _is_number(value):
            raise ValueError(f"{name}: got {value!r:.60}, expected a number")
    for pattern in patterns:
        try:
            _matches(pattern, "")
        except (re.error, OverflowError) as error:
            raise ValueError(
                f"alpha_pattern {pattern!r:.60} is not a regular expression: {error}"
            ) from error
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"use_rslora: got {config['use_rslora']!r:.60}, expected true or false")


def _adapter_config(path: Path, text: str | None) -> dict[str, Any]:
    """peft's settings from the file's header or from the file beside it; empty where there are none.

    Raises:
        ValueError: they cannot be read.
    """
    beside = path.with_name("adapter_config.json")
    where = path
    try:
        if text is None and path.name == _PEFT_WEIGHTS and beside.is_file():
            where = beside
            text = beside.read_text()
        values = {} if text is None else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"got {values!r:.60}, expected names and values")
        config = {key.removeprefix("transformer."): value for key, value in values.items()}
        _check_settings(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its LoRA settings cannot be read ({error})") from error
    return config


def _matches(pattern: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def _alpha(config: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha by peft's rules: its pattern, else the one for all, else the rank."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if _matches(pattern, layer):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return float(rank if alpha is None else alpha)


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by diffusers' name of the layer and what they are, and peft's settings.

    Raises:
        FileNotFoundError, ValueError: no such file, damaged, or not a plain LoRA.
    """
    tensors, settings = _load(path)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
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
    return layers, _adapter_config(path, settings)


def _own_alpha(path: Path, layer: str, tensors: dict[str, Tensor]) -> float | None:
    """A layer's alpha where it stands beside its weights."""
    if "alpha" not in tensors:
        return None
    if tensors["alpha"].numel() != 1 or not _is_number(tensors["alpha"].item()):
        got = tensors["alpha"].flatten().tolist()
        raise ValueError(f"{path}: {layer}'s alpha is {got!s:.60}; expected one number")
    return tensors["alpha"].item()


def _update(
    path: Path, layer: str, tensors: dict[str, Tensor], config: dict[str, Any], linear: nn.Linear
) -> Tensor:
    """What a LoRA adds to a layer's weight, (out in) float32."""
    if not {"lora_A", "lora_B"} <= tensors.keys():
        missing = "lora_A" if "lora_B" in tensors else "lora_B"
        raise ValueError(f"{path}: {layer} has no {missing}; the file is incomplete")
    for name in ("lora_A", "lora_B"):
        value = tensors[name]
        if value.ndim < 2 or value.dtype not in _FLOATS:
            raise ValueError(
                f"{path}: {layer}'s {name} is {value.dtype} {tuple(value.shape)}; expected a matrix "
                "of floating-point numbers"
            )
    # A convolution's kernel is flat in our linear layer, its elements in the same order.
    a, b = (tensors[name].float().flatten(1) for name in ("lora_A", "lora_B"))
    rank = a.shape[0]
    if rank != b.shape[1] or rank == 0:
        raise ValueError(
            f"{path}: {layer}'s lora_A is of rank {rank}, its lora_B of rank {b.shape[1]}; expected "
            "the same, 1 or more"
        )
    got, wanted = (b.shape[0], a.shape[1]), tuple(linear.weight.shape)
    if got != wanted:
        raise ValueError(
            f"{path}: a LoRA of another model: its {layer} is {'x'.join(map(str, got))} of rank "
            f"{rank}, this model's {'x'.join(map(str, wanted))}"
        )
    alpha = _own_alpha(path, layer, tensors)
    if alpha is None:
        alpha = _alpha(config, layer, rank)
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
    path = weights_of(path)
    layers, config = _read(path)
    linears = {wan_name(n): m for n, m in dit.named_modules() if isinstance(m, nn.Linear)}
    unknown = [layer for layer in layers if layer not in linears]
    if unknown:
        raise ValueError(
            f"{path}: a LoRA of another model: this one has no layer {unknown[0]} "
            f"({len(unknown)} of its {len(layers)} layers are unknown)"
        )
    for layer, tensors in layers.items():  # look at all of them before the first is changed
        meta = {n: value if n == "alpha" else value.to("meta") for n, value in tensors.items()}
        _update(path, layer, meta, config, linears[layer])
    for layer, tensors in layers.items():
        weight = linears[layer].weight
        update = _update(path, layer, tensors, config, linears[layer])
        weight.copy_(weight.float() + scale * update.to(weight.device))


def _warn_of_expert(path: Path, flag: str, expert: str) -> None:
    """Says so where a LoRA's lora.yaml names the other expert."""
    weights = weights_of(path)
    other = _about(weights.parent).get("expert") if weights.name == WEIGHTS else None
    if other in ("high", "low") and other != expert:
        _log.warning(
            "%s %s: trained for the %s-noise expert (its lora.yaml), given to the %s-noise one; "
            "%s is the other's",
            flag,
            path,
            other,
            expert,
            "--lora-low" if flag == "--lora" else "--lora",
        )


def _trained(path: Path, info: ModelInfo) -> ModelInfo:
    """What a model's info is with what lora.yaml says that the LoRA was trained on, if it does."""
    weights = weights_of(path)
    about = _about(weights.parent).get("trained") if weights.name == WEIGHTS else None
    try:
        known = {name: about[name] for name in KNOWS}  # type: ignore[index]
        return ModelInfo.model_validate({**info.model_dump(), **known})
    except (TypeError, KeyError, ValidationError):  # of another origin, or not as it was written
        return info


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
            if model.dit_low_noise is not None:
                _warn_of_expert(path, flag, "high" if flag == "--lora" else "low")
            apply_lora(dit, path, scale)
            model.info = also_knowing(model.info, _trained(path, model.info))
