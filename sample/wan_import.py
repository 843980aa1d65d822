"""A diffusers folder of Wan 2.1 or 2.2 to a model folder.

Everything is read and compared before anything is written; the weights are then copied file by file
under our names, see `sample.shards.copy_part`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit.diffusers_vae import DiffusersVAE
from dit.diffusers_vae_config import WanVAEConfig
from dit.transformer import DiTConfig
from dit.umt5 import UMT5Config, UMT5Encoder
from sample.model import ModelFile, ModelInfo, load_tokenizer, write_model_file
from sample.pipeline import latent_shape
from sample.shards import (
    Header,
    Shape,
    compare_part,
    copy_files,
    copy_part,
    new_folder,
    part_headers,
)
from sample.vae_import import (
    CONFIG,
    DIFFUSERS_STEM,
    SourcePart,
    has_known_vae,
    read_vae_folder,
)
from sample.wan_config import (
    INFO,
    INFO_TI2V,
    build,
    read_json,
    read_scheduler,
    read_text,
    read_transformer,
    require_class,
)
from sample.wan_names import wan_tensors

TRANSFORMERS_STEM = "model"
TOKEN_EMBEDDING, SHARED_EMBEDDING = "encoder.embed_tokens.weight", "shared.weight"
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


@dataclass(frozen=True)
class Source:
    """A diffusers folder that can be imported."""

    file: ModelFile
    parts: dict[str, SourcePart]
    tokenizer: Path


def text_shapes(path: Path, config: UMT5Config, headers: list[Header]) -> dict[str, Shape]:
    """Of a umT5's tensors, under the names that the files use for its token embedding: either of two,
    or both; our encoder reads all three.

    Raises:
        ValueError: there can be no such network.
    """
    try:
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in UMT5Encoder(config, None).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no text encoder can have these sizes ({reason})") from error
    present = {name for header in headers for name in header.tensors}
    if SHARED_EMBEDDING in present:
        shapes[SHARED_EMBEDDING] = shapes[TOKEN_EMBEDDING]
        if TOKEN_EMBEDDING not in present:
            del shapes[TOKEN_EMBEDDING]
    return shapes


def _transformer(folder: Path) -> tuple[DiTConfig, SourcePart]:
    config = read_transformer(folder / CONFIG)
    headers = part_headers(folder, DIFFUSERS_STEM)
    tensors = wan_tensors(config)
    compare_part(folder, CONFIG, headers, {t.theirs: t.their_shape for t in tensors})
    return config, SourcePart(headers, {t.theirs: (t.ours, t.shape) for t in tensors})


def _vae(folder: Path) -> tuple[DiffusersVAE, SourcePart]:
    require_class(folder / CONFIG, read_json(folder / CONFIG), WanVAEConfig.class_name)
    return read_vae_folder(folder)


def _text(folder: Path) -> tuple[UMT5Config, SourcePart]:
    config = read_text(folder / CONFIG)
    headers = part_headers(folder, TRANSFORMERS_STEM)
    shapes = text_shapes(folder / CONFIG, config, headers)
    compare_part(folder, CONFIG, headers, shapes)
    return config, SourcePart(headers, {name: (name, shape) for name, shape in shapes.items()})


def _has(index: dict[str, Any], part: str) -> bool:
    """Whether a pipeline has a part: [library, class] where it does, [null, null] where not."""
    entry = index.get(part)
    return isinstance(entry, list) and any(name is not None for name in entry)


def _model_index(path: Path) -> dict[str, Any]:
    """model_index.json, checked.

    Raises:
        FileNotFoundError, ValueError: no such folder, no pipeline in it, or not one of Wan's.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; expected a downloaded one in diffusers' format, such as "
            "Wan2.1-T2V-1.3B-Diffusers"
        )
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{path}: no model_index.json in it; expected a folder in diffusers' format, such as "
            "Wan2.1-T2V-1.3B-Diffusers"
        )
    index = read_json(path / "model_index.json")
    if index.get("_class_name") not in _PIPELINES:
        alone = "; --vae-only imports its VAE alone" if has_known_vae(path) else ""
        raise ValueError(
            f"{path / 'model_index.json'}: _class_name is {index.get('_class_name')}; expected "
            f"{' or '.join(_PIPELINES)}{alone}"
        )
    if _has(index, "image_encoder"):
        raise ValueError(
            f"{path}: has an image_encoder; image-to-video models that see a picture through CLIP are "
            "not supported; use a T2V model, or TI2V-5B for a given first frame"
        )
    return index


def read_source(path: Path, size: dict[str, Any] | None = None) -> Source:
    """A diffusers folder, read and compared but for the numbers in its tensors.

    Args:
        size: what of fps, num_frames, height and width is to differ from the usual one of the kind.
    Raises:
        FileNotFoundError, ValueError: something is missing, damaged, not Wan's text-to-video, or does
            not fit the rest; says what.
    """
    index = _model_index(path)
    dit, dit_part = _transformer(path / "transformer")
    parts = {"dit": dit_part}
    boundary, low_noise = index.get("boundary_ratio"), None
    if (boundary is not None) != _has(index, "transformer_2"):
        raise ValueError(
            f"{path / 'model_index.json'}: needs transformer_2 and boundary_ratio together, or neither"
        )
    if boundary is not None:
        low_noise, parts["dit_low_noise"] = _transformer(path / "transformer_2")
    vae, parts["vae"] = _vae(path / "vae")
    text, parts["text"] = _text(path / "text_encoder")
    for name, got, expected in (
        ("in_channels", dit.in_channels, vae.latent_channels),
        ("text_dim", dit.context_dim, text.width),
    ):
        if got != expected:
            raise ValueError(
                f"{path}: the transformer's {name} is {got}, but the "
                f"{'VAE' if name == 'in_channels' else 'text encoder'} gives {expected}"
            )
    load_tokenizer(path / "tokenizer")
    objective, sampling = read_scheduler(path / "scheduler" / "scheduler_config.json")
    usual = INFO_TI2V if index.get("expand_timesteps") else INFO
    values = {**usual.model_dump(), **(size or {}), "provenance": {"imported_from": path.name}}
    info = ModelInfo.model_validate(values)
    latent_shape(vae, dit, info.num_frames, info.height, info.width)
    contents = {
        "info": info,
        "vae": vae.config,
        "dit": dit,
        "dit_low_noise": low_noise,
        "expert_boundary": boundary,
        "text": text,
        "objective": objective,
        "sampling": sampling,
    }
    file = build(ModelFile, path / "model_index.json", contents)
    return Source(file, parts, path / "tokenizer")


def import_wan(
    path: Path,
    out: Path,
    size: dict[str, Any] | None = None,
    progress: Callable[[str, Header, int], object] | None = None,
) -> ModelFile:
    """Writes a model folder from a diffusers folder; no more than a few MB of it are ever in memory.

    Args:
        path: with model_index.json; see `read_source` for `size` and what may be wrong.
        out: must not exist; appears only when complete.
        progress: called with the part, the file being copied, and the bytes just copied.
    Raises:
        FileExistsError: there is something at `out`.
        FileNotFoundError, ValueError: see `read_source`.
    """
    source = read_source(path, size)
    with new_folder(out, path) as fresh:
        copy_files(source.tokenizer, fresh / "tokenizer")
        for name, part in source.parts.items():
            copy_part(
                part.headers,
                fresh,
                name,
                part.names,
                None if progress is None else partial(progress, name),
            )
        write_model_file(fresh, source.file)
    return source.file
