"""Which clips a run trains on, and what every section of a config is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
)

from data.buckets import Size, size_name

# Pixels: H.264, in which samples are written, shares its chroma among two rows and two columns.
PositiveEven = Annotated[int, Field(gt=0, multiple_of=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class Section(BaseModel):
    """Unknown keys are errors, numbers are finite, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Bucket(Section):
    """One size of training batches; all of a step's clips have one."""

    num_frames: PositiveInt  # 1 takes images and single frames of videos; more take videos alone
    height: PositiveEven
    width: PositiveEven
    share: PositiveFloat = 1.0  # of the steps, relative to the other buckets

    @property
    def size(self) -> Size:
        return self.num_frames, self.height, self.width


class DataConfig(Section):
    """Which clips, and how they are cut: num_frames at fps, resized and cropped to the size.

    With buckets, training batches have their sizes instead; num_frames, height and width are then
    those of validation, of samples and of what the exported model makes by default.
    """

    manifest: Path
    validation: Path | None = None  # for figures and samples; else training clips serve
    num_frames: PositiveInt
    height: PositiveEven
    width: PositiveEven
    fps: Annotated[float, Field(gt=0, le=1000)]
    num_workers: NonNegativeInt = 0  # loader processes per rank; 0 is quickest for cached latents
    backend: Literal["auto", "decord", "pyav"] = "auto"  # decoder; auto: decord where it can read
    random_start: bool = True  # draw where in a longer file a clip lies; false: at its start, and
    memory_gb: NonNegativeFloat = 0.5  # then so much of the decoded clips is kept, per process
    max_bad_share: Share = 0.05  # of unreadable files, beyond which the run stops
    buckets: tuple[Bucket, ...] = ()  # sizes of training batches; none: the one size above

    @field_validator("buckets", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("is empty; give at least one bucket, or leave data.buckets out")
        return () if value is None else value

    @field_validator("buckets")
    @classmethod
    def _each_once(cls, buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
        sizes = [bucket.size for bucket in buckets]
        for size in sizes:
            if sizes.count(size) > 1:
                raise ValueError(f"{size_name(size)} is there twice; add the shares up in one")
        return buckets

    @field_serializer("buckets")
    def _none_if_empty(self, buckets: tuple[Bucket, ...]) -> list[dict[str, Any]] | None:
        return [bucket.model_dump() for bucket in buckets] or None

    @property
    def sizes(self) -> list[Size]:
        """(num_frames, height, width) of training batches: of each bucket, or the only one."""
        return [b.size for b in self.buckets] or [(self.num_frames, self.height, self.width)]

    @property
    def shares(self) -> dict[Size, float]:
        """Of each bucket, by size, relative to each other; empty without buckets."""
        return {bucket.size: bucket.share for bucket in self.buckets}
