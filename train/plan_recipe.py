"""A run's networks for counting, from nothing but its config: no clips, no weights.

Model folders that are not there yet, and files of weights, are stood in for by files of the same
shapes: a safetensors header, and behind it a hole that takes no room on the disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.manifest import Manifest, Rows
from dit.diffusers_vae import published_vae
from dit.diffusers_vae_config import WanVAEConfig
from dit.perceptual import PerceptualDistance
from sample.model import ModelFile, ModelInfo, write_model_file
from sample.processes import Ranks
from train.config import RunConfig
from train.config_recipes import BESIDE, FAMILIES, DiTRecipeConfig, TasksConfig, VAERecipeConfig
from train.recipe import Recipe, TrainData
from train.recipe_dit import DiTRecipe
from train.recipe_vae import VAERecipe

# Of the VAEs in Wan-AI's Wan2.1-T2V-1.3B-Diffusers and Wan2.2-TI2V-5B-Diffusers on Hugging Face; their
# latent statistics change no shape.
_WAN_2_1: dict[str, Any] = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}
_WAN_2_2: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "latents_mean": (0.0,) * 48,
    "latents_std": (1.0,) * 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
STAND_INS = {
    "wan2.1": ("Wan 2.1's, 4x8x8 pixels a latent of 16 channels", _WAN_2_1),
    "wan2.2": ("Wan 2.2's, 4x16x16 pixels a latent of 48 channels", _WAN_2_2),
}


def recipe_on_meta(config: RunConfig, vae: str = "wan2.1") -> tuple[Recipe, list[str]]:
    """The run's recipe on the meta device, and a line for each thing that had to be assumed.

    Args:
        vae: one of `STAND_INS`, for a DiT whose recipe.vae is not there.
    Raises:
        ValueError: vae is none of them, or what training itself would raise about the networks.
        FileNotFoundError: recipe.init is not there, and nothing says what would be in it.
    """
    if vae not in STAND_INS:
        raise ValueError(f"--vae={vae} is not known; there are {', '.join(STAND_INS)}")
    notes: list[str] = []
    clips = Manifest(config.data.manifest, Rows(), [])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        if isinstance(config.recipe, VAERecipeConfig):
            stood_in = _with_perceptual(config.recipe, Path(folder))
            kind: type[Recipe] = VAERecipe
        else:
            stood_in = _with_vae(config, config.recipe, Path(folder), vae, notes)
            kind = DiTRecipe
            if _beside(config.recipe.tasks):
                notes.append(_BESIDE)
        config = config.model_copy(update={"recipe": stood_in})
        recipe = kind(config, TrainData(clips, clips), ranks, torch.device("meta")).to("meta")
    return recipe, [*said.getvalue().splitlines(), *notes]


# A step's FLOPs and memory are those of a clip alone.
_BESIDE = (
    "not counted: the pictures that tasks put beside clips, each one more latent frame in the steps "
    "that show it"
)


def _beside(tasks: TasksConfig) -> bool:
    """Whether any task puts a picture beside a clip."""
    shown = [task for family in BESIDE for task in FAMILIES[family]]
    return tasks.references > 0 or any(tasks.weights.get(task) for task in shown)


def _with_vae(
    config: RunConfig, recipe: DiTRecipeConfig, folder: Path, name: str, notes: list[str]
) -> DiTRecipeConfig:
    """The section with a VAE that is there, and without weights of the text encoder to be read."""
    if recipe.text is not None:
        text = recipe.text.model_copy(update={"checkpoint": None})
        recipe = recipe.model_copy(update={"text": text})
    if recipe.vae is None or recipe.vae.exists():
        return recipe
    if recipe.init is not None:  # whose VAE has the same shapes
        return recipe.model_copy(update={"vae": None})
    what, settings = STAND_INS[name]
    others = ", ".join(f"--vae {other}" for other in STAND_INS if other != name)
    notes.append(f"recipe.vae={recipe.vae} is not there: assumed is {what} ({others})")
    clip = config.data
    info = ModelInfo(fps=clip.fps, num_frames=clip.num_frames, height=clip.height, width=clip.width)
    wan = WanVAEConfig(**settings)
    with torch.device("meta"):
        network = published_vae(wan)
    write_model_file(folder, ModelFile(info=info, vae=wan))
    write_shapes(folder / "vae.safetensors", network.state_dict())
    return recipe.model_copy(update={"vae": folder})


def _with_perceptual(recipe: VAERecipeConfig, folder: Path) -> VAERecipeConfig:
    """The section with files of weights that are there, where it names any."""
    options = recipe.perceptual
    if options is None or options.weights is None or options.weights.exists():
        return recipe
    with torch.device("meta"):
        network = PerceptualDistance(options.backbone).net
    write_shapes(folder / "perceptual.safetensors", network.state_dict())
    here = options.model_copy(update={"weights": folder / "perceptual.safetensors", "linear": None})
    return recipe.model_copy(update={"perceptual": here})


_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_shapes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file (huggingface/safetensors, "Format") of these shapes, all zeros."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.shape), _DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
