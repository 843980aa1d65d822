"""Published video VAEs from diffusers' folders: to a model folder of the VAE alone, or opened as it is.

As in sample/wan_import.py, everything is read and compared before anything is written.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit.diffusers_vae import DiffusersVAE, published_vae
from dit.diffusers_vae_config import (
    CogVideoXVAEConfig,
    DiffusersVAEConfig,
    HunyuanVideoVAEConfig,
    LTXVideoVAEConfig,
    MochiVAEConfig,
    WanVAEConfig,
)
from sample.model import Model, ModelFile, ModelInfo, load_model, write_model_file
from sample.shards import (
    Header,
    Shape,
    compare_part,
    copy_part,
    load_part,
    new_folder,
    part_headers,
)
from sample.wan_config import (
    INFO,
    INFO_TI2V,
    build,
    name_unknown,
    read_json,
    require_class,
    vae_json,
)

CONFIG, DIFFUSERS_STEM = "config.json", "diffusion_pytorch_model"
VAE_PREFIX = "model."  # of diffusers' network in our VAE
# The clips that each family is known for: sizes are the defaults of its pipeline in diffusers, frame
# rates those of its pipeline or of its model card.
_USUAL: dict[type[DiffusersVAEConfig], ModelInfo] = {
    WanVAEConfig: INFO,
    HunyuanVideoVAEConfig: ModelInfo(fps=24, num_frames=129, height=720, width=1280),
    CogVideoXVAEConfig: ModelInfo(fps=8, num_frames=49, height=480, width=720),
    LTXVideoVAEConfig: ModelInfo(fps=25, num_frames=161, height=512, width=704),
    MochiVAEConfig: ModelInfo(fps=30, num_frames=19, height=480, width=848),
}
_CONFIGS = {config.class_name: config for config in _USUAL}


@dataclass(frozen=True)
class SourcePart:
    """The files of one network, and the new name and shape of each tensor in them."""

    headers: list[Header]
    names: dict[str, tuple[str, Shape]]


def read_vae(path: Path) -> DiffusersVAEConfig:
    """The config.json of a video VAE.

    Raises:
        FileNotFoundError, ValueError: no such file, or no VAE that is known here.
    """
    settings = read_json(path)
    kind = _CONFIGS[require_class(path, settings, *_CONFIGS)]
    known = kind.model_fields.keys() - kind.own
    config = build(kind, path, {k: v for k, v in settings.items() if k in known and v is not None})
    name_unknown(path, settings, vae_json(config))
    return config


def empty_vae(path: Path, config: DiffusersVAEConfig) -> DiffusersVAE:
    """The network on the meta device; path is the config's.

    Raises:
        ValueError: there can be no such network, or no diffusers is installed.
    """
    try:
        with torch.device("meta"):
            return published_vae(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vae_shapes(path: Path, config: DiffusersVAEConfig) -> dict[str, Shape]:
    """Of our VAE's tensors, by name; see `empty_vae`."""
    return {k: tuple(v.shape) for k, v in empty_vae(path, config).state_dict().items()}


def read_vae_folder(folder: Path) -> tuple[DiffusersVAE, SourcePart]:
    """A VAE's folder in diffusers' format, read and compared but for the numbers in its tensors.

    Returns:
        The network on the meta device, and its files.
    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, the VAE is not known here, or
            weights and settings contradict each other.
    """
    config = read_vae(folder / CONFIG)
    headers = part_headers(folder, DIFFUSERS_STEM)
    vae = empty_vae(folder / CONFIG, config)
    shapes = {k.removeprefix(VAE_PREFIX): tuple(v.shape) for k, v in vae.state_dict().items()}
    compare_part(folder, CONFIG, headers, shapes)
    try:
        vae.check_sizes()
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return vae, SourcePart(headers, {k: (VAE_PREFIX + k, v) for k, v in shapes.items()})


def is_vae_folder(path: Path) -> bool:
    """Whether it is one network's folder, and no pipeline's."""
    return (path / CONFIG).is_file() and not (path / "model_index.json").is_file()


def has_known_vae(path: Path) -> bool:
    """Whether a pipeline's VAE can be imported alone."""
    try:
        return read_json(path / "vae" / CONFIG).get("_class_name") in _CONFIGS
    except (FileNotFoundError, ValueError):
        return False


def find_vae_folder(path: Path) -> Path:
    """The VAE's folder, which is `path` or `vae` in it.

    Raises:
        FileNotFoundError: there is neither.
    """
    if is_vae_folder(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; expected a downloaded one in diffusers' format"
        )
    if not (path / "vae").is_dir():
        raise FileNotFoundError(
            f"{path}: neither {CONFIG} nor vae/{CONFIG} in it; expected the folder of a VAE or of a "
            "pipeline in diffusers' format"
        )
    return path / "vae"


def vae_info(vae: DiffusersVAE, path: Path, size: dict[str, Any] | None = None) -> ModelInfo:
    """What clips the model is for: the family's usual ones but for what `size` says.

    Raises:
        ValueError: they do not fit the VAE.
    """
    usual = _USUAL[type(vae.config)]
    if isinstance(vae.config, WanVAEConfig) and vae.config.patch_size is not None:  # Wan 2.2's
        usual = INFO_TI2V.model_copy(update={"image_to_video": False})
    values = {**usual.model_dump(), **(size or {}), "provenance": {"imported_from": path.name}}
    info = ModelInfo.model_validate(values)
    vae.latent_shape(info.num_frames, info.height, info.width)
    return info


def import_vae(
    path: Path,
    out: Path,
    size: dict[str, Any] | None = None,
    progress: Callable[[str, Header, int], object] | None = None,
) -> ModelFile:
    """Writes a model folder of a VAE alone; no more than a few MB of it are ever in memory.

    Args:
        path: a VAE's folder in diffusers' format, or a pipeline's with vae/ in it.
        out: must not exist; appears only when complete.
        size: what of fps, num_frames, height and width is to differ from the family's usual ones.
        progress: called with "vae", the file being copied, and the bytes just copied.
    Raises:
        FileExistsError: there is something at `out`.
        FileNotFoundError, ValueError: see `read_vae_folder`, or the size does not fit.
    """
    vae, part = read_vae_folder(find_vae_folder(path))
    file = ModelFile.model_validate({"info": vae_info(vae, path, size), "vae": vae.config})
    with new_folder(out, path) as fresh:
        told = None if progress is None else partial(progress, "vae")
        copy_part(part.headers, fresh, "vae", part.names, told)
        write_model_file(fresh, file)
    return file


def open_vae(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """A video VAE in float32, in eval mode and without gradients; nothing is written.

    Args:
        path: a model folder, a VAE's folder in diffusers' format, or a pipeline's with vae/ in it.
    Returns:
        A model of the VAE alone.
    Raises:
        FileNotFoundError, ValueError: it is no such folder, a file of it is missing or damaged, or the
            VAE is not known here or needs a library that is not installed.
    """
    path = Path(path)
    if (path / "model.yaml").is_file() or not path.is_dir():
        return load_model(path, device, dtype=torch.float32, vae_only=True)
    folder = find_vae_folder(path)
    vae, _ = read_vae_folder(folder)
    load_part(vae.model, folder, DIFFUSERS_STEM, device, lambda name, value: value.float())
    vae.to(device).eval().requires_grad_(False)
    return Model(vae, vae_info(vae, path))
