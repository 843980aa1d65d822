"""Names of our DiT's tensors in diffusers' WanTransformer3DModel; the two compute the same.

The same tables serve weights, in both directions, and LoRA weights, whose names extend a layer's.
"""

from dataclasses import dataclass

import torch

from dit.transformer import DiT, DiTConfig
from sample.shards import Shape

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK = {
    **{f"self_attention.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attention.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm_2": "norm2",
    "mlp.fc1": "ffn.net.0.proj",
    "mlp.fc2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head_modulation": "scale_shift_table",
    "head": "proj_out",
}


def wan_name(name: str) -> str:
    """diffusers' name of our layer or tensor; what follows a layer's name is kept.

    Raises:
        KeyError: no such layer in a DiT.
    """
    table, prefix, inner = _TOP, "", name
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        table, prefix = _BLOCK, f"blocks.{number}."
    for ours, theirs in table.items():
        if inner == ours or inner.startswith(f"{ours}."):
            return prefix + theirs + inner.removeprefix(ours)
    raise KeyError(name)


@dataclass(frozen=True)
class Tensors:
    """One tensor under both names; the elements are the same, in the same order."""

    ours: str
    shape: Shape
    theirs: str
    their_shape: Shape


def wan_tensors(config: DiTConfig) -> list[Tensors]:
    """Every tensor of our DiT and its counterpart in WanTransformer3DModel.

    Shapes differ in two: their patch embedding is a convolution whose kernel is its stride, and their
    modulation tables have a leading 1.
    """
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in DiT(config).state_dict().items()}
    tensors = []
    for name, shape in shapes.items():
        theirs = shape
        if name == "patch_embedding.weight":
            theirs = (config.dim, config.in_channels, *config.patch_size)
        elif name.endswith("modulation"):
            theirs = (1, *shape)
        tensors.append(Tensors(name, shape, wan_name(name), theirs))
    return tensors
