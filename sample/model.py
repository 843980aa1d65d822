"""The model folder: everything that sampling needs, and nothing that only training needs.

    model.yaml            format version, configs of every part, fps, trained size, provenance
    vae.safetensors       and, in a text-to-video model, dit.safetensors and text.safetensors

Weights are safetensors; no pickle is ever read from a model folder. A VAE alone is a model folder
too, without dit, text and objective.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dit.objective import Objective, ObjectiveConfig
from dit.text import TextConfig, TextEncoder
from dit.transformer import DiT, DiTConfig
from dit.vae import VAEConfig, VideoVAE

FORMAT_VERSION = 1
PARTS = ("vae", "dit", "text")


class ModelInfo(BaseModel):
    """What the model was trained on: clips of num_frames at fps, height x width pixels."""

    model_config = ConfigDict(extra="forbid")

    fps: PositiveFloat
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    # Where the weights came from: git commit, config hash, step, data fingerprint.
    provenance: dict[str, str | int | float | None] = {}


class ModelFile(BaseModel):
    """The contents of model.yaml."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    info: ModelInfo
    vae: VAEConfig
    dit: DiTConfig | None = None
    text: TextConfig | None = None
    objective: Annotated[ObjectiveConfig | None, Field()] = None


@dataclass
class Model:
    """The parts of a model folder in memory; dit, text and objective are there together or not."""

    vae: VideoVAE
    info: ModelInfo
    dit: DiT | None = None
    text: TextEncoder | None = None
    objective: Objective | None = None

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their file."""
        every = {"vae": self.vae, "dit": self.dit, "text": self.text}
        return {name: part for name, part in every.items() if part is not None}


def _set_aside(folder: Path) -> Path:
    """Where the old folder stands while the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def save_model(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a model folder beside the old one, then takes its place."""
    folder = Path(folder)
    fresh, old = folder.with_name(f".{folder.name}.new"), _set_aside(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, part in model.parts().items():
        weights = {k: v.detach().cpu().contiguous() for k, v in part.state_dict().items()}
        save_file(weights, fresh / f"{name}.safetensors")
    configs = {name: part.config for name, part in model.parts().items()}
    contents = ModelFile(info=model.info, objective=model.objective, **configs)  # type: ignore[arg-type]
    text = yaml.safe_dump(contents.model_dump(mode="json", exclude_none=True), sort_keys=False)
    (fresh / "model.yaml").write_text(text)
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
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text; expected the YAML that training wrote") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{path}: {where}: {problem['msg']}") from error


def _load_weights(part: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the model folder is incomplete")
    try:
        missing, unexpected = part.load_state_dict(load_file(path), strict=False)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: does not fit model.yaml: {reason}") from error
    for problem, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise ValueError(
                f"{path}: does not fit model.yaml: {problem} {names[0]} ({len(names)} in all)"
            )


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """Reads a model folder, in eval mode, without gradients.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, of another version, or does not fit the others.
    """
    folder = Path(folder)
    if not folder.exists() and _set_aside(folder).exists():  # a kill in the middle of a save
        folder = _set_aside(folder)
    contents = read_model_file(folder)
    model = Model(VideoVAE(contents.vae), contents.info, objective=contents.objective)
    if contents.dit is not None and contents.text is not None and contents.objective is not None:
        model.dit, model.text = DiT(contents.dit), TextEncoder(contents.text)
    elif contents.dit is not None or contents.text is not None or contents.objective is not None:
        raise ValueError(
            f"{folder / 'model.yaml'}: needs dit, text and objective together, or none"
        )
    for name, part in model.parts().items():
        _load_weights(part, folder / f"{name}.safetensors")
        part.to(device).eval().requires_grad_(False)
    return model
