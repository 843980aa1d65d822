"""The config of `zoetrope data ingest`: every setting and threshold, read from YAML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Seconds = float | None
Share = float | None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Scenes(_Section):
    """Where a file is cut.

    Attributes:
        detector: of PySceneDetect: "content" (colour differences between frames), "adaptive" (these
            against their rolling mean, for moving cameras); "none" keeps files whole.
        threshold: of the detector; None is its own default, 27 for content, 3 for adaptive.
        min_seconds: a cut sooner than this after the last one is no cut.
        max_seconds: longer scenes are cut into equal pieces of at most this length; None: not cut.
        height: frames are made this high for the detector, in pixels.
    """

    detector: Literal["content", "adaptive", "none"] = "content"
    threshold: float | None = Field(default=None, gt=0)
    min_seconds: float = Field(default=0.2, ge=0)
    max_seconds: Seconds = Field(default=None, gt=0)
    height: int = Field(default=144, ge=16)


class Letterbox(_Section):
    """Bars at the edges. `enabled` false leaves them; `num_frames` are looked at per clip."""

    enabled: bool = True
    num_frames: int = Field(default=12, ge=1)


class Measures(_Section):
    """How much of a clip the measures look at: `num_windows` pieces, spread over it, of
    `window_frames` neighbouring frames each."""

    num_windows: int = Field(default=4, ge=1)
    window_frames: int = Field(default=8, ge=3)


class Filters(_Section):
    """What a clip must be to be kept; None switches a filter off. See docs/ingest.md for units."""

    min_seconds: Seconds = 1.0
    max_seconds: Seconds = None
    min_width: int | None = 128
    min_height: int | None = 128
    min_fps: float | None = 5.0
    max_fps: float | None = None
    min_motion: float | None = 0.002
    max_motion: float | None = 2.0
    max_jerk: float | None = 0.5
    min_sharpness: float | None = 3.0
    max_black: Share = 0.5
    max_frozen: Share = 0.9
    max_text: Share = 0.1
    max_logo: Share = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Filters:
        limits: dict[str, float | None] = self.model_dump()
        for key, limit in limits.items():
            if limit is not None and limit < 0:
                raise ValueError(f"{key}={limit:g} is negative; expected 0 or more, or null")
            most_key = key.replace("min_", "max_")
            most = limits.get(most_key)
            if limit is not None and most is not None and limit > most:
                raise ValueError(
                    f"{key}={limit:g} is more than {most_key}={most:g}: no clip would be kept"
                )
        return self


class Clip(_Section):
    """An open_clip image tower.

    Attributes:
        model: its name in open_clip, such as ViT-B-32.
        weights: a local file.
        min_cosine: clips whose embeddings have at least this cosine are duplicates.
    """

    model: str
    weights: Path
    min_cosine: float = Field(default=0.95, gt=0, le=1)


class Duplicates(_Section):
    """Which clips show the same.

    Attributes:
        max_distance: bits of 64 in which the perceptual hashes of two clips may differ, the mean
            over four frames; None: not compared.
        clip: embeddings to compare as well.
    """

    max_distance: float | None = Field(default=8.0, ge=0, lt=32)
    clip: Clip | None = None


class Prompt(_Section):
    """What to ask a captioner, and how many tokens it may answer with."""

    prompt: str = "Describe this video."
    max_new_tokens: int = Field(default=128, ge=1)


class Captioner(_Section):
    """A local transformers model.

    Attributes:
        model: its folder.
        prompts: each gives a caption of the clip.
        num_frames: shown to it, spread over the clip.
        frames_as: "video" and "images" where the model takes them; "auto": as a video if it can.
        height: frames are made at most this high before they are handed over, in pixels.
        batch_size: clips at once.
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """

    model: Path
    prompts: list[Prompt] = Field(
        default=[
            Prompt(prompt="Describe this video in one short sentence.", max_new_tokens=32),
            Prompt(prompt="Describe this video in two or three sentences.", max_new_tokens=96),
            Prompt(
                prompt="Describe this video in detail: the subjects, what they do, the setting, "
                "the light, the camera and the style.",
                max_new_tokens=256,
            ),
        ],
        min_length=1,
    )
    num_frames: int = Field(default=8, ge=1)
    frames_as: Literal["auto", "images", "video"] = "auto"
    height: int = Field(default=480, ge=16)
    batch_size: int = Field(default=4, ge=1)
    device: str = "auto"


class Captions(_Section):
    """Where captions come from, besides sidecar files and the source manifest.

    Attributes:
        default: the caption of clips that have none; None: they are dropped.
        captioner: writes those of clips that have none.
        recaption: it writes those of the others too, which are then added to what they had.
    """

    default: str | None = None
    captioner: Captioner | None = None
    recaption: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Captions:
        if self.recaption and self.captioner is None:
            raise ValueError("recaption is true, but there is no captioner to do it")
        if self.default is not None and not self.default.strip():
            raise ValueError("default is an empty caption; leave it out, or give a text")
        return self


class IngestConfig(_Section):
    """All of it.

    Attributes:
        time_limit: seconds that one file or clip may take in one step; None: without limit.
        report_clips: shown per section of the report.
    """

    time_limit: float | None = Field(default=900.0, gt=0)
    report_clips: int = Field(default=200, ge=0)
    scenes: Scenes = Scenes()
    letterbox: Letterbox = Letterbox()
    measures: Measures = Measures()
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    captions: Captions = Captions()

    @model_validator(mode="after")
    def _consistent(self) -> IngestConfig:
        least, most = self.filters.min_seconds, self.scenes.max_seconds
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"filters.min_seconds={least:g} is more than scenes.max_seconds={most:g}: no clip "
                "would be kept"
            )
        return self


@dataclass(frozen=True)
class Bound:
    """One threshold: `key` of Filters bounds `column` of a record from below or above.

    `low` says so, `words` are what is wrong with a clip beyond it, `videos` that images have it not.
    """

    key: str
    column: str
    low: bool
    words: str
    videos: bool = True


BOUNDS = (
    Bound("min_seconds", "seconds", True, "too short"),
    Bound("max_seconds", "seconds", False, "too long"),
    Bound("min_width", "shown_width", True, "too narrow", videos=False),
    Bound("min_height", "shown_height", True, "too low", videos=False),
    Bound("min_fps", "fps", True, "too few frames a second"),
    Bound("max_fps", "fps", False, "too many frames a second"),
    Bound("min_motion", "motion", True, "too little motion"),
    Bound("max_motion", "motion", False, "too much motion"),
    Bound("max_jerk", "jerk", False, "too jerky"),
    Bound("min_sharpness", "sharpness", True, "too blurred", videos=False),
    Bound("max_black", "black", False, "too much black", videos=False),
    Bound("max_frozen", "frozen", False, "too many frozen frames"),
    Bound("max_text", "text", False, "too much text", videos=False),
    Bound("max_logo", "logo", False, "too much of a logo"),
)


def load_ingest_config(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> IngestConfig:
    """The validated config.

    Args:
        path: a YAML file; None for the defaults.
        overrides: `section.key=value` each; values are parsed as YAML.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key or an unusable value; one line per problem.
    """
    values: Any = {}
    where = "ingest config"
    if path is not None:
        where = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"config {path} does not exist; expected a YAML file")
        values = _parse(Path(path).read_bytes(), where) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return IngestConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {_describe(e)}" for e in error.errors())) from None


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ValueError(f"{where}: not valid YAML: {problem}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.key=value")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:  # a section may be there and empty
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    section[last] = _parse(text, f"override {override!r}")


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key; docs/ingest.md lists them all"
    if problem["type"] == "missing":
        return f"{name}: missing; it has no default"
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}: got {problem['input']!r}, expected {message.removeprefix('Input should be ')}"
