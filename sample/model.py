"""The model folder: everything that sampling needs, and nothing that only training needs.

    model.yaml            format version, configs of every part, fps, trained size, provenance
    vae.safetensors       and, in a text-to-video model, dit.safetensors and text.safetensors
    dit_low_noise...      of a model with two experts (Wan 2.2 A14B), the one for t below a boundary
    tokenizer/            of a text encoder from transformers

Large weights come in several files, see sample/shards.py. Weights are safetensors; no pickle is ever
read from a model folder. A VAE alone is a model folder too, without dit, text and objective.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from dit.diffusers_vae import published_vae
from dit.diffusers_vae_config import (
    CogVideoXVAEConfig,
    DiffusersVAEConfig,
    HunyuanVideoVAEConfig,
    LTXVideoVAEConfig,
    MochiVAEConfig,
    WanVAEConfig,
)
from dit.objective import Objective, ObjectiveConfig
from dit.samplers import SamplerName
from dit.text import TextConfig, TextEncoder
from dit.transformer import DiT, DiTConfig
from dit.umt5 import UMT5Config, UMT5Encoder
from dit.vae import VAE, VAEConfig, VideoVAE
from sample.shards import load_part, save_part

FORMAT_VERSION = 1


class ModelInfo(BaseModel):
    """What the model was trained on: clips of num_frames at fps, height x width pixels."""

    model_config = ConfigDict(extra="forbid")

    fps: PositiveFloat
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    image_to_video: bool = False  # knows clean first frames, t = 0, from training
    tasks: tuple[str, ...] = ()  # what else was given in training, by name in recipe.tasks
    references: NonNegativeInt = 0  # pictures of subjects, at most
    given_noise: NonNegativeFloat | None = None  # t of what was given, at most; None: not known
    sizes: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = ()  # (frames, height, width)
    # Where the weights came from: git commit, config hash, step, data fingerprint.
    provenance: dict[str, str | int | float | None] = {}


def also_knowing(before: ModelInfo, more: ModelInfo) -> ModelInfo:
    """`more`, and what was known before: tasks, references, sizes, noise of what is given.

    A model that does not say which sizes it was trained on, as imported ones, still does not.
    """
    noises = [n for n in (before.given_noise, more.given_noise) if n is not None]
    known = {
        "tasks": tuple(dict.fromkeys((*before.tasks, *more.tasks))),
        "sizes": tuple(dict.fromkeys((*before.sizes, *more.sizes))) if before.sizes else (),
        "references": max(before.references, more.references),
        "given_noise": max(noises, default=None),
        "image_to_video": before.image_to_video or more.image_to_video,
    }
    return more.model_copy(update=known)


class SamplingDefaults(BaseModel):
    """How the model is sampled unless told otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampler: SamplerName | None = None  # None: the objective's first
    steps: PositiveInt = 20
    guidance: NonNegativeFloat = 2.0
    guidance_references: NonNegativeFloat = 2.0  # of pictures of subjects, where they are given


VAEPart = Annotated[
    VAEConfig
    | WanVAEConfig
    | HunyuanVideoVAEConfig
    | CogVideoXVAEConfig
    | LTXVideoVAEConfig
    | MochiVAEConfig,
    Field(discriminator="kind"),
]
TextPart = Annotated[TextConfig | UMT5Config, Field(discriminator="kind")]


class ModelFile(BaseModel):
    """The contents of model.yaml."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    info: ModelInfo
    vae: VAEPart
    dit: DiTConfig | None = None
    dit_low_noise: DiTConfig | None = None
    expert_boundary: Annotated[float, Field(gt=0, lt=1)] | None = None
    text: TextPart | None = None
    objective: Annotated[ObjectiveConfig | None, Field()] = None
    sampling: SamplingDefaults = SamplingDefaults()

    @model_validator(mode="after")
    def _whole(self) -> "ModelFile":
        if len({part is None for part in (self.dit, self.text, self.objective)}) > 1:
            raise ValueError("needs dit, text and objective together, or none")
        if (self.dit_low_noise is None) != (self.expert_boundary is None):
            raise ValueError("needs dit_low_noise and expert_boundary together, or none")
        if self.dit_low_noise is not None and self.dit is None:
            raise ValueError("has dit_low_noise but no dit")
        return self


@dataclass
class Model:
    """The parts of a model folder in memory; dit, text and objective are there together or not.

    With two experts, `dit` works from t = 1 down to expert_boundary and `dit_low_noise` below.
    """

    vae: VAE
    info: ModelInfo
    dit: DiT | None = None
    text: TextEncoder | UMT5Encoder | None = None
    objective: Objective | None = None
    dit_low_noise: DiT | None = None
    expert_boundary: float | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their file."""
        every = {
            "vae": self.vae,
            "dit": self.dit,
            "dit_low_noise": self.dit_low_noise,
            "text": self.text,
        }
        return {name: part for name, part in every.items() if part is not None}

    def file(self) -> ModelFile:
        """What model.yaml says about it."""
        values: dict[str, Any] = {name: part.config for name, part in self.parts().items()}
        return ModelFile(
            info=self.info,
            objective=self.objective,  # type: ignore[arg-type]
            expert_boundary=self.expert_boundary,
            sampling=self.sampling,
            **values,
        )


def _set_aside(folder: Path) -> Path:
    """Where the old folder stands while the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def write_model_file(folder: Path, contents: ModelFile) -> None:
    """Writes model.yaml; what says nothing, and default ways to sample, are left out."""
    values = contents.model_dump(mode="json", exclude_none=True)
    if contents.sampling == SamplingDefaults():
        del values["sampling"]
    (folder / "model.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def save_model(folder: str | os.PathLike[str], model: Model, *, write: bool = True) -> None:
    """Writes a model folder beside the old one, then takes its place.

    Args:
        write: False on all ranks but one, where weights are spread over several: they take part in
            gathering them.
    """
    folder = Path(folder)
    fresh, old = folder.with_name(f".{folder.name}.new"), _set_aside(folder)
    if write:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    for name, part in model.parts().items():
        save_part(part, fresh if write else None, name)
    if not write:
        return
    if isinstance(model.text, UMT5Encoder):
        model.text.tokenizer.save_pretrained(fresh / "tokenizer")
    write_model_file(fresh, model.file())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_model_file(folder: Path) -> ModelFile:
    """model.yaml, checked.

    Raises:
        FileNotFoundError: there is no such folder or no model.yaml in it.
        ValueError: it is not a model.yaml of this version.
    """
    path = folder / "model.yaml"
    if not path.is_file():
        what = "no model.yaml in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: {what}; expected a model folder, such as runs/demo/model"
        )
    try:
        contents = yaml.safe_load(path.read_text())
        version = contents.get("format_version") if isinstance(contents, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version}; this version reads {FORMAT_VERSION}"
            )
        return ModelFile.model_validate(contents)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text; expected the YAML that training wrote") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, problem["loc"]))] if part)
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {where}{message}") from error


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer from its files.

    Raises:
        FileNotFoundError, ValueError: there are none, they cannot be read, or there is no
            transformers.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(
            f"{folder}: no tokenizer in it; expected tokenizer.json or spiece.model"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"the tokenizer needs transformers: pip install 'zoetrope[wan]' ({error})"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: not a tokenizer ({reason})") from error
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: names no pad_token; is tokenizer_config.json missing?")
    return tokenizer


def _empty(contents: ModelFile, folder: Path) -> Model:
    """The networks without weights; large ones on the meta device, so that nothing is initialised."""
    with torch.device("meta"):
        dits = [
            None if config is None else DiT(config)
            for config in (contents.dit, contents.dit_low_noise)
        ]
        vae: VAE | None = None
        if isinstance(contents.vae, DiffusersVAEConfig):
            try:
                vae = published_vae(contents.vae)
            except ValueError as error:
                raise ValueError(f"{folder / 'model.yaml'}: vae: {error}") from error
    text: TextEncoder | UMT5Encoder | None = None
    if isinstance(contents.text, UMT5Config):
        tokenizer = load_tokenizer(folder / "tokenizer")
        with torch.device("meta"):
            text = UMT5Encoder(contents.text, tokenizer)
    elif contents.text is not None:
        text = TextEncoder(contents.text)
    if isinstance(contents.vae, VAEConfig):
        vae = VideoVAE(contents.vae)
    assert vae is not None
    return Model(
        vae,
        contents.info,
        dit=dits[0],
        text=text,
        objective=contents.objective,
        dit_low_noise=dits[1],
        expert_boundary=contents.expert_boundary,
        sampling=contents.sampling,
    )


def _cast(part: nn.Module, dtype: torch.dtype | None) -> Callable[[str, Tensor], Tensor] | None:
    """What `load_model` does to the tensors of a part."""
    if dtype is None:
        return None
    if dtype is torch.float32:
        return lambda name, value: value.float()
    names = set()
    if isinstance(part, DiT | UMT5Encoder):
        inner, prefix = (part.blocks, "blocks.") if isinstance(part, DiT) else (part, "")
        linear = [name for name, m in inner.named_modules() if isinstance(m, nn.Linear)]
        names = {f"{prefix}{name}.{what}" for name in linear for what in ("weight", "bias")}
    return lambda name, value: value.to(dtype) if name in names else value


def load_model(
    folder: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    vae_only: bool = False,
) -> Model:
    """Reads a model folder, in eval mode, without gradients.

    Args:
        device: meta for shapes and dtypes alone, which reads no weights.
        dtype: None for the weights as stored; float32 for all of them; a smaller one for those that
            autocast to it would convert at every call, the matrices in the blocks of the DiT and
            of a umT5: the same results in half the memory.
        vae_only: leave the other parts out, unread.
    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, of another version, or does not fit the others; or a part
            needs a library that is not installed.
    """
    folder = Path(folder)
    if not folder.exists() and _set_aside(folder).exists():  # a kill in the middle of a save
        folder = _set_aside(folder)
    contents = read_model_file(folder)
    if vae_only:
        contents = ModelFile(info=contents.info, vae=contents.vae)
    model = _empty(contents, folder)
    for name, part in model.parts().items():
        load_part(part, folder, name, device, _cast(part, dtype))
        part.to(device).eval().requires_grad_(False)
    return model
