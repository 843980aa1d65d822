"""Which clips a run trains on, and what every section of a config is."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from data.buckets import Size, size_name
from data.manifest import PlaceField
from data.native import native_sizes, usual_lengths

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
    batch_size: PositiveInt | None = None  # of its steps; None: train.batch_size

    @property
    def size(self) -> Size:
        return self.num_frames, self.height, self.width


def _aspect(value: Any) -> str:
    """Such as 16/9, width first."""
    try:
        aspect = Fraction(str(value).replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected width/height, such as 16/9, got {value!r}") from None
    if not Fraction(1, 20) <= aspect <= 20:
        raise ValueError(
            f"expected width/height from 1/20 to 20, got {value!r}; write 16/9, as YAML takes 16:9 "
            "without quotes for minutes and seconds"
        )
    return str(value).replace(":", "/")


Aspect = Annotated[str, BeforeValidator(_aspect)]


class NativeSizes(Section):
    """Sizes after the clips' own, of about data.height x data.width pixels: each clip has the one that
    it has room for and whose aspect is nearest to its own. A step has one size, and so many clips that
    it carries about as many tokens as train.batch_size clips of data's own size do.
    """

    # None: data.num_frames, half of it and so on while they are 8 k + 1, and 1, which images need.
    num_frames: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    # Width / height; that of data.width and data.height is always among them.
    aspects: tuple[Aspect, ...] = ("9/16", "3/4", "1/1", "4/3", "16/9")
    multiple: PositiveEven = 32  # of heights and widths, in pixels: the VAE's factor x patch size
    batch_multiple: PositiveInt = 1  # of a step's clips: processes x grad_accum must divide it


class Packing(Section):
    """Rows of tokens that clips of several sizes share, in place of batches of one size. A step has
    train.batch_size rows."""

    tokens: PositiveInt  # of a row, at most


class DataConfig(Section):
    """Which clips, and how they are cut: num_frames at fps, resized and cropped to the size.

    With buckets or native sizes, training batches have those instead; num_frames, height and width are
    then those of validation, of samples and of what the exported model makes by default.
    """

    manifest: PlaceField  # a path, or a URL that fsspec opens
    validation: PlaceField | None = None  # for figures and samples; else training clips serve
    num_frames: PositiveInt
    height: PositiveEven
    width: PositiveEven
    fps: Annotated[float, Field(gt=0, le=1000)]
    num_workers: NonNegativeInt = 0  # loader processes per rank; 0 is quickest for cached latents
    prefetch: PositiveInt = 2  # micro-batches that they read ahead
    # Of workers: how long one may take for a file before it is given up, with the file; and by how
    # much one may grow before a fresh one replaces it.
    file_seconds: PositiveFloat = 180.0
    worker_memory_gb: PositiveFloat = 4.0
    backend: Literal["auto", "decord", "pyav"] = "auto"  # decoder; auto: decord where it can read
    random_start: bool = True  # draw where in a longer file a clip lies; false: at its start, and
    memory_gb: NonNegativeFloat = 0.5  # then so much of the decoded clips is kept, per process
    max_bad_share: Share = 0.05  # of unreadable files, beyond which the run stops
    buckets: tuple[Bucket, ...] = ()  # sizes of training batches; none: the one size above
    native: NativeSizes | None = None  # or sizes after the clips' own; true: with what is usual
    packing: Packing | None = None  # clips of native sizes in rows of tokens; for a DiT

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

    @field_validator("native", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> DataConfig:
        if self.buckets and self.native is not None:
            raise ValueError(
                "data.buckets and data.native are two ways to choose sizes; leave one of them out"
            )
        if self.packing is not None and self.native is None:
            raise ValueError("data.packing packs clips of data.native's sizes; set data.native too")
        if self.native is not None and self.native.multiple > min(self.height, self.width):
            raise ValueError(
                f"data.native.multiple={self.native.multiple} is more than the smaller side of "
                f"data.height={self.height} x data.width={self.width}; use what heights and widths "
                "must be a multiple of: the VAE's factor x the DiT's patch size"
            )
        return self

    @field_serializer("buckets")
    def _none_if_empty(self, buckets: tuple[Bucket, ...]) -> list[dict[str, Any]] | None:
        return [bucket.model_dump() for bucket in buckets] or None

    @property
    def base_size(self) -> Size:
        """(num_frames, height, width) of validation and samples, and of training without buckets."""
        return self.num_frames, self.height, self.width

    @property
    def sizes(self) -> list[Size]:
        """(num_frames, height, width) of training batches: of each bucket, or the only one."""
        if self.native is not None:
            return native_sizes(
                self.native.num_frames or usual_lengths(self.num_frames),
                *(self.height, self.width, map(Fraction, self.native.aspects)),
                self.native.multiple,
            )
        return [b.size for b in self.buckets] or [self.base_size]

    @property
    def shares(self) -> dict[Size, float]:
        """Of each bucket, by size, relative to each other; empty without buckets."""
        return {bucket.size: bucket.share for bucket in self.buckets}
