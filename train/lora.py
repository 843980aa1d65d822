"""LoRA training through peft: thin adapters beside a DiT's frozen linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dit.objective import Objective
from dit.transformer import DiT
from sample.lora import save_lora
from sample.processes import whole
from sample.wan_names import wan_name
from train.config_recipes import LoRAConfig

_ADAPTER = "default"  # peft's name for the only one
_MLP = ("fc1", "fc2")


def _layers(config: LoRAConfig) -> list[str]:
    """The ends of our layers' names."""
    targets = dict.fromkeys(config.targets)
    return [layer for t in targets for layer in (_MLP if t == "mlp" else (t,))]


def _settings(config: LoRAConfig, targets: list[str]) -> dict[str, Any]:
    """peft's settings; alpha is the rank unless given, so that the adapters come in as they are."""
    alpha = config.rank if config.alpha is None else config.alpha
    return {"r": config.rank, "lora_alpha": alpha, "target_modules": targets}


def check_objective(objective: Objective, base: Objective) -> None:
    """A LoRA does not say what its network predicts; whoever samples it asks the base.

    Raises:
        ValueError: it would be trained for another objective than the base's.
    """
    if type(objective) is not type(base) or objective.prediction != base.prediction:
        raise ValueError(
            f"recipe.objective is {type(objective).__name__} with prediction {objective.prediction}; a "
            f"LoRA is sampled as its base, {type(base).__name__} with {base.prediction}: leave "
            "recipe.objective out, or train without recipe.lora"
        )


def add_adapters(dit: DiT, config: LoRAConfig) -> None:
    """Freezes a DiT and puts adapters into its blocks, in place; they are all that is trained.

    Adapters are float32 whatever the base is, and start without effect: B is zero.

    Raises:
        ValueError: peft is not installed; names the extra.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"recipe.lora needs peft: pip install 'zoetrope[lora]' ({error})"
        ) from error
    dit.requires_grad_(False)
    settings = LoraConfig(**_settings(config, _layers(config)))
    inject_adapter_in_model(settings, dit, adapter_name=_ADAPTER)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_weights(dit: DiT) -> dict[str, Tensor]:
    """The adapters of a DiT by its layers' names: blocks.0.self_attention.q.lora_A.weight. They may be
    sharded: all ranks call it."""
    return {
        name.replace(f".{_ADAPTER}.", "."): whole(parameter.detach())
        for name, parameter in dit.named_parameters()
        if parameter.requires_grad
    }


def export_lora(
    folder: Path, dit: DiT, config: LoRAConfig, about: dict[str, Any], *, write: bool = True
) -> None:
    """Writes a DiT's adapters for `zoetrope sample --lora` and `WanPipeline.load_lora_weights`.

    Args:
        write: False on ranks that only take part in gathering what is sharded.
    """
    weights = adapter_weights(dit)
    if not write:
        return
    layers = dict.fromkeys(wan_name(name).rsplit(".", 2)[0] for name in weights)
    # As diffusers' own training scripts put it: the ends of names, the same in every block.
    ends = dict.fromkeys(layer.split(".", 2)[2].removeprefix("attn1.") for layer in layers)
    targets = [end for end in ends if not end.startswith("attn2.")]
    save_lora(
        folder,
        weights,
        _settings(config, targets),
        {"lora": config.model_dump(mode="json"), **about},
    )
