"""A model folder to a diffusers folder, which WanPipeline loads: sample/wan_import.py the other way."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dit.diffusers_vae_config import DiffusersVAEConfig, WanVAEConfig
from dit.umt5 import UMT5Config
from sample.model import ModelFile, load_tokenizer, read_model_file
from sample.shards import (
    DTYPES,
    Header,
    Shape,
    compare_part,
    copy_files,
    copy_part,
    new_folder,
    part_headers,
)
from sample.vae_import import DIFFUSERS_STEM, VAE_PREFIX, vae_shapes
from sample.wan_config import (
    read_json,
    scheduler_json,
    text_json,
    transformer_json,
    vae_json,
)
from sample.wan_import import SHARED_EMBEDDING, TOKEN_EMBEDDING, TRANSFORMERS_STEM, text_shapes
from sample.wan_names import wan_tensors

_FOLDERS = {
    "dit": "transformer",
    "dit_low_noise": "transformer_2",
    "vae": "vae",
    "text": "text_encoder",
}

Names = dict[str, tuple[str, Shape]]


def _check(folder: Path, file: ModelFile, transformer_only: bool) -> None:
    """Refuses what no WanPipeline can hold, in one line."""
    if file.dit is None:
        raise ValueError(f"{folder}: holds a VAE alone; there is no transformer to export")
    foreign = []
    if not isinstance(file.vae, WanVAEConfig):
        published = isinstance(file.vae, DiffusersVAEConfig)
        foreign.append(f"VAE is {file.vae.kind}'s" if published else "VAE is zoetrope's own")
    if not isinstance(file.text, UMT5Config):
        foreign.append("text encoder is open_clip's")
    if foreign and not transformer_only:
        raise ValueError(
            f"{folder}: its {' and its '.join(foreign)}, which WanPipeline cannot hold; "
            "--transformer-only exports the transformer and the scheduler alone"
        )


def _configs(folder: Path, file: ModelFile) -> dict[str, dict[str, Any]]:
    """The settings of the transformers and the scheduler, by where they go.

    Raises:
        ValueError: diffusers has no such model.
    """
    assert file.dit is not None
    try:
        configs = {"transformer/config.json": transformer_json(file.dit)}
        if file.dit_low_noise is not None:
            configs["transformer_2/config.json"] = transformer_json(file.dit_low_noise)
        configs["scheduler/scheduler_config.json"] = scheduler_json(file.objective)
    except ValueError as error:
        raise ValueError(f"{folder}: cannot be exported to diffusers: {error}") from error
    return configs


def _names(folder: Path, file: ModelFile, part: str, headers: list[Header]) -> Names:
    """diffusers' name and shape of each of our tensors.

    Raises:
        ValueError: the files do not fit model.yaml.
    """
    if part == "vae":
        assert isinstance(file.vae, WanVAEConfig)
        shapes = vae_shapes(folder / "model.yaml", file.vae)
        names = {name: (name.removeprefix(VAE_PREFIX), shape) for name, shape in shapes.items()}
    elif part == "text":
        assert isinstance(file.text, UMT5Config)
        shapes = text_shapes(folder / "model.yaml", file.text, headers)
        # transformers keeps the token embedding under its shared name.
        alone = SHARED_EMBEDDING not in shapes
        names = {
            name: (SHARED_EMBEDDING if alone and name == TOKEN_EMBEDDING else name, shape)
            for name, shape in shapes.items()
        }
    else:
        config = file.dit if part == "dit" else file.dit_low_noise
        assert config is not None
        tensors = wan_tensors(config)
        shapes = {t.ours: t.shape for t in tensors}
        names = {t.ours: (t.theirs, t.their_shape) for t in tensors}
    compare_part(folder / f"{part}.safetensors", "model.yaml", headers, shapes)
    return names


def _model_index(file: ModelFile, tokenizer: Path, scheduler: str) -> dict[str, Any]:
    """What WanPipeline.from_pretrained reads first."""
    name = "tokenizer_config.json"
    known = read_json(tokenizer / name) if (tokenizer / name).is_file() else {}
    low_noise = file.dit_low_noise is not None
    transformer = ["diffusers", "WanTransformer3DModel"]
    return {
        "_class_name": "WanPipeline",
        "boundary_ratio": file.expert_boundary,
        "expand_timesteps": file.info.image_to_video,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", known.get("tokenizer_class", "T5TokenizerFast")],
        "transformer": transformer,
        "transformer_2": transformer if low_noise else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def export_diffusers(
    folder: Path,
    out: Path,
    *,
    transformer_only: bool = False,
    progress: Callable[[str, Header, int], object] | None = None,
) -> None:
    """Writes a diffusers folder from a model folder, every tensor bit for bit.

    Args:
        folder: imported, or trained here where its parts are Wan's.
        out: must not exist; appears only when complete.
        transformer_only: transformer(s) and scheduler, without the rest of the pipeline.
        progress: called with the part, the file being copied, and the bytes just copied.
    Raises:
        FileExistsError: there is something at `out`.
        FileNotFoundError, ValueError: not a whole model folder, or diffusers has no such model.
    """
    file = read_model_file(folder)
    _check(folder, file, transformer_only)
    configs = _configs(folder, file)
    parts = [
        part
        for part, present in (
            ("dit", True),
            ("dit_low_noise", file.dit_low_noise is not None),
            ("vae", not transformer_only),
            ("text", not transformer_only),
        )
        if present
    ]
    headers = {part: part_headers(folder, part) for part in parts}
    names = {part: _names(folder, file, part, headers[part]) for part in parts}
    if not transformer_only:
        load_tokenizer(folder / "tokenizer")
        assert isinstance(file.vae, WanVAEConfig)
        assert isinstance(file.text, UMT5Config)
        dtype = next(iter(headers["text"][0].tensors.values()))["dtype"]
        configs["vae/config.json"] = vae_json(file.vae)
        configs["text_encoder/config.json"] = text_json(file.text, DTYPES[dtype])
        scheduler = configs["scheduler/scheduler_config.json"]["_class_name"]
        configs["model_index.json"] = _model_index(file, folder / "tokenizer", scheduler)
    with new_folder(out, folder) as fresh:
        if not transformer_only:
            copy_files(folder / "tokenizer", fresh / "tokenizer")
        for part in parts:
            target = fresh / _FOLDERS[part]
            target.mkdir()
            stem = TRANSFORMERS_STEM if part == "text" else DIFFUSERS_STEM
            told = None if progress is None else partial(progress, part)
            copy_part(headers[part], target, stem, names[part], told)
        for name, contents in configs.items():
            path = fresh / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(contents, indent=2) + "\n")
