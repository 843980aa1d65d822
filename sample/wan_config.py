"""The settings of a diffusers folder of Wan 2.1 or 2.2, read and written.

What changes the computation and is not supported is refused. Settings that the networks' classes in
diffusers don't know either are named and left aside, as diffusers does.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dit.diffusers_vae_config import DiffusersVAEConfig
from dit.flow import FlowMatching
from dit.grids import FlowMatchEulerGrid, WanGrid
from dit.objective import ObjectiveConfig
from dit.transformer import DiTConfig
from dit.umt5 import UMT5Config
from sample.model import ModelInfo, SamplingDefaults

_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=BaseModel)

NUM_TRAIN_TIMESTEPS = 1000  # dit.transformer.timestep_embedding has the same number
# WanPipeline.__call__'s own, and the sizes that Wan's model cards give.
SAMPLING = SamplingDefaults(sampler="unipc", steps=50, guidance=5.0)
INFO = ModelInfo(fps=16, num_frames=81, height=480, width=832)
INFO_TI2V = ModelInfo(fps=24, num_frames=121, height=704, width=1280, image_to_video=True)

# Settings with one supported value each.
_TRANSFORMER = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_UNIPC = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "solver_p": None,
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
}
_UNIPC_DEFAULTS = {**_UNIPC, "use_flow_sigmas": False, "prediction_type": "epsilon"}
_EULER = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_TEXT = {  # ours: transformers'
    "vocab_size": "vocab_size",
    "width": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
    "activation": "feed_forward_proj",
    "pad_token": "pad_token_id",
    "eos_token": "eos_token_id",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, ValueError: no such file, or something else in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder is incomplete")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return contents


def require_class(path: Path, settings: dict[str, Any], *names: str) -> str:
    """The `_class_name` of a config.json.

    Raises:
        ValueError: it is none of these.
    """
    name = settings.get("_class_name")
    if name not in names:
        raise ValueError(f"{path}: _class_name is {name}; expected {' or '.join(names)}")
    return name


def _require(path: Path, settings: dict[str, Any], wanted: dict[str, Any], absent: Any) -> None:
    for name, value in wanted.items():
        got = settings.get(name, absent.get(name))
        if got != value:
            raise ValueError(f"{path}: {name} is {got}; only {value} is supported")


def name_unknown(path: Path, settings: dict[str, Any], known: Iterable[str]) -> None:
    """Warns of settings that are left aside."""
    for name in sorted(settings.keys() - set(known)):
        if not name.startswith("_"):
            value = settings[name]
            _log.warning("%s: %s=%s is no setting known here; left aside", path, name, value)


def build(kind: type[Config], path: Path, values: dict[str, Any]) -> Config:
    """A config of ours from what a file says.

    Raises:
        ValueError: in one line, the first value that cannot be used.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{path}: {where}{': ' if where else ''}{problem['msg']}") from error


def read_transformer(path: Path) -> DiTConfig:
    """Our DiT for the config.json of a WanTransformer3DModel.

    Raises:
        FileNotFoundError, ValueError: no such file, or an architecture that is not Wan's text-to-video
            one; image-to-video models that see a picture through CLIP or extra channels are not.
    """
    settings = read_json(path)
    require_class(path, settings, "WanTransformer3DModel")
    channels, out = settings.get("in_channels", 16), settings.get("out_channels")
    if settings.get("image_dim") is not None or out not in (None, channels):
        raise ValueError(
            f"{path}: this transformer takes a picture through CLIP or extra channels (image_dim="
            f"{settings.get('image_dim')}, in_channels={channels}, out_channels={out}), which is not "
            "supported; use a T2V model, or TI2V-5B for a given first frame"
        )
    _require(path, settings, _TRANSFORMER, _TRANSFORMER)
    heads = settings.get("num_attention_heads", 40)
    head_dim = settings.get("attention_head_dim", 128)
    config = build(
        DiTConfig,
        path,
        {
            "in_channels": channels,
            "context_dim": settings.get("text_dim", 4096),
            "dim": heads * head_dim
            if isinstance(heads, int) and isinstance(head_dim, int)
            else None,
            "num_blocks": settings.get("num_layers", 40),
            "num_heads": heads,
            "mlp_dim": settings.get("ffn_dim", 13824),
            "patch_size": settings.get("patch_size", (1, 2, 2)),
            "freq_dim": settings.get("freq_dim", 256),
            "eps": settings.get("eps", 1e-6),
        },
    )
    name_unknown(path, settings, transformer_json(config))
    return config


def transformer_json(config: DiTConfig) -> dict[str, Any]:
    """config.json of the WanTransformer3DModel that computes what our DiT does.

    Raises:
        ValueError: Wan has no such setting.
    """
    if config.rope_theta != 10_000.0:
        raise ValueError(f"rope_theta={config.rope_theta:g}: Wan's transformer has 10000")
    return {
        "_class_name": "WanTransformer3DModel",
        **_TRANSFORMER,
        "attention_head_dim": config.dim // config.num_heads,
        "eps": config.eps,
        "ffn_dim": config.mlp_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_blocks,
        "out_channels": config.in_channels,
        "patch_size": list(config.patch_size),
        "rope_max_seq_len": 1024,
        "text_dim": config.context_dim,
    }


def vae_json(config: DiffusersVAEConfig) -> dict[str, Any]:
    """config.json of a VAE."""
    return {"_class_name": config.class_name, **config.settings()}


def read_text(path: Path) -> UMT5Config:
    """The config.json of a UMT5EncoderModel.

    Raises:
        FileNotFoundError, ValueError: no such file, or not such an encoder.
    """
    settings = read_json(path)
    if settings.get("model_type") != "umt5":
        raise ValueError(f"{path}: model_type is {settings.get('model_type')}; expected umt5")
    values = {ours: settings[theirs] for ours, theirs in _TEXT.items() if theirs in settings}
    return build(UMT5Config, path, values)


def text_json(config: UMT5Config, dtype: str) -> dict[str, Any]:
    """config.json of the UMT5EncoderModel; dtype as torch names it."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "torch_dtype": dtype,
        **{theirs: getattr(config, ours) for ours, theirs in _TEXT.items()},
    }


def read_scheduler(path: Path) -> tuple[FlowMatching, SamplingDefaults]:
    """What scheduler_config.json says about the noise, and about sampling.

    Raises:
        FileNotFoundError, ValueError: no such file, or a scheduler that Wan does not use.
    """
    settings = read_json(path)
    unipc, euler = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
    name = require_class(path, settings, unipc, euler)
    times = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}
    _require(path, settings, times, times)
    if name == unipc:
        _require(path, settings, _UNIPC, _UNIPC_DEFAULTS)
        values = {"shift": settings.get("flow_shift", 1.0), "network_steps": NUM_TRAIN_TIMESTEPS}
        return build(FlowMatching, path, {**values, "step_grid": WanGrid()}), SAMPLING
    _require(path, settings, _EULER, _EULER)
    values = {"shift": settings.get("shift", 1.0), "step_grid": FlowMatchEulerGrid()}
    return build(FlowMatching, path, values), SAMPLING.model_copy(update={"sampler": "euler"})


def scheduler_json(objective: ObjectiveConfig | None) -> dict[str, Any]:
    """scheduler_config.json for a model: UniPC as Wan has it, or Euler where that was imported.

    Raises:
        ValueError: the objective is not flow matching of the velocity.
    """
    if objective is None:
        raise ValueError("it has no objective")
    if not isinstance(objective, FlowMatching) or objective.prediction != "velocity":
        raise ValueError(
            f"its network predicts {objective.prediction} (objective {objective.kind}); WanPipeline "
            "samples the velocity of flow matching"
        )
    if objective.token_shift is not None:
        raise ValueError("its shift depends on the size of the clip; WanPipeline's is fixed")
    times = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}
    if isinstance(objective.step_grid, FlowMatchEulerGrid):
        name = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        return {**name, **times, "shift": objective.shift, **_EULER}
    name = {"_class_name": "UniPCMultistepScheduler"}
    return {**name, **times, "flow_shift": objective.shift, **_UNIPC}
