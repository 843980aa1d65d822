"""What a run is made of: the pydantic models behind a training config.

`train.config_file` reads them from YAML with overrides from the command line, and words the errors.
"""

from __future__ import annotations

import hashlib
import json
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
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dit.objective import DDPM, FlowMatching
from dit.text import TextConfig
from dit.transformer import DiTConfig
from dit.vae import VAEConfig

# Pixels: H.264, in which samples are written, shares its chroma among two rows and two columns.
PositiveEven = Annotated[int, Field(gt=0, multiple_of=2)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Unknown keys are errors, numbers are finite, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which clips, and how they are cut: num_frames at fps, resized and cropped to the size."""

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


class VAERecipeConfig(Section):
    """Reconstruction and KL losses; both in units per pixel value."""

    kind: Literal["vae"] = "vae"
    vae: VAEConfig
    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = 0.0
    kl_weight: NonNegativeFloat = 1e-6
    num_statistics_clips: PositiveInt = 256  # training clips that latent mean and std come from


class DiTSection(DiTConfig):
    """A DiTConfig without what follows from the VAE and the text encoder."""

    in_channels: PositiveInt = Field(default=1, exclude=True, repr=False)
    context_dim: PositiveInt = Field(default=1, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, value: Any) -> Any:
        for name, source in (("in_channels", "VAE"), ("context_dim", "text encoder")):
            if isinstance(value, dict) and name in value:
                raise ValueError(f"{name} follows from the {source}; leave it out")
        return value

    def resolve(self, in_channels: int, context_dim: int) -> DiTConfig:
        """The whole config of the network."""
        return DiTConfig(in_channels=in_channels, context_dim=context_dim, **self.model_dump())


class TextSection(TextConfig):
    """A TextConfig, and the checkpoint of a pretrained one."""

    checkpoint: Path | None = None  # a CLIP model from open_clip: .safetensors, .pt or .bin

    @model_validator(mode="after")
    def _frozen_is_pretrained(self) -> TextSection:
        if not self.trainable and self.checkpoint is None:
            raise ValueError(
                "a frozen text encoder needs a pretrained checkpoint; give one, or trainable: true"
            )
        return self

    def resolve(self) -> TextConfig:
        """The config of the network alone."""
        return TextConfig(**self.model_dump(exclude={"checkpoint"}))


class LoRAConfig(Section):
    """Low-rank updates of linear layers, W + alpha / rank * B A (Hu et al. 2021, section 4.1)."""

    rank: PositiveInt
    alpha: PositiveFloat | None = None  # None: as the rank, so that the factor is 1
    # In every block: the linear layers of both attentions, and those of the MLP.
    targets: Annotated[tuple[Literal["q", "k", "v", "out", "mlp"], ...], Field(min_length=1)] = (
        "q",
        "k",
        "v",
        "out",
    )


class DiTRecipeConfig(Section):
    """A diffusion transformer on the latents of a trained VAE.

    From nothing it needs vae, dit, text and objective; with `init` it starts from the model there,
    and an objective only replaces the model's own.
    """

    kind: Literal["dit"] = "dit"
    init: Path | None = None  # a model folder to fine-tune, such as one from `zoetrope import`
    expert: Literal["high", "low"] | None = None  # of a model with two, which one trains
    lora: LoRAConfig | None = None  # train these adapters and nothing else
    vae: Path | None = Field(None, validate_default=True)  # a model folder
    dit: DiTSection | None = Field(None, validate_default=True)
    text: TextSection | None = Field(None, validate_default=True)
    objective: FlowMatching | DDPM | None = Field(None, discriminator="kind", validate_default=True)
    caption_dropout: Share = 0.1  # of samples that train on the empty caption, for guidance
    latent_cache: Path | None = None  # made when missing; else the VAE encodes every batch. Needs
    # data.random_start=false, as it holds each row's start only
    cache_dtype: Literal["float16", "float32"] = "float16"

    @field_validator("expert", "lora")
    @classmethod
    def _starts_from_a_model(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("init", ...) is None:
            raise ValueError(
                "this is for a run that starts from a trained model; set recipe.init too"
            )
        return value

    @field_validator("vae", "dit", "text", "objective")
    @classmethod
    def _given_once(cls, value: Any, info: ValidationInfo) -> Any:
        init = info.data.get("init", ...)  # ... where init itself is wrong
        if init is None and value is None:
            raise PydanticCustomError("missing", "Field required")
        if isinstance(init, Path) and value is not None and info.field_name != "objective":
            raise ValueError(f"comes with recipe.init={init}; leave it out")
        return value


class AdamWConfig(Section):
    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.99,
    )
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01  # on matrices and kernels; never on biases and gains


class MuonConfig(AdamWConfig):
    """Muon for the matrices of the recipe's blocks; AdamW, as set here, for the rest."""

    kind: Literal["muon"] = "muon"  # type: ignore[assignment]
    muon_lr: PositiveFloat = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleConfig(Section):
    """Linear warm-up, a plateau, and a decay to zero over the last share of the steps."""

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 100
    decay_fraction: Share = 0.3


class EMAConfig(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # 0 is the weights themselves
    warmup: bool = True  # min(decay, (1 + n) / (10 + n)) after n steps


class TrainConfig(Section):
    steps: PositiveInt
    batch_size: PositiveInt  # global: over all ranks and accumulated micro-batches
    grad_accum: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of autocast; weights stay float32
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig = EMAConfig()
    grad_clip: PositiveFloat = 1.0  # global norm
    checkpoint_interval: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    compile: bool | Literal["auto"] = False  # torch.compile by block; auto: where it works
    threads: PositiveInt | Literal["auto"] = "auto"  # per process; auto is cores / local processes


class LoggingConfig(Section):
    """Intervals are in steps. Nothing here changes the training itself."""

    interval: PositiveInt = 20
    val_interval: PositiveInt = 500
    num_val_clips: PositiveInt = 64
    sample_interval: PositiveInt = 1000
    num_samples: NonNegativeInt = 4
    sample_steps: PositiveInt = 20
    guidance: NonNegativeFloat = 2.0
    prompts: tuple[str, ...] = ()  # else the first captions of the validation clips
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if logged in
    project: str = "zoetrope"


RecipeConfig = Annotated[VAERecipeConfig | DiTRecipeConfig, Field(discriminator="kind")]


class RunConfig(Section):
    """One run, start to end; `out` is its folder."""

    out: Path
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    recipe: RecipeConfig
    train: TrainConfig
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        if self.train.batch_size % self.train.grad_accum:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide into "
                f"train.grad_accum={self.train.grad_accum} micro-batches"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_the_recipe(self) -> RunConfig:
        recipe = self.recipe
        if isinstance(recipe, VAERecipeConfig):
            if self.train.optimizer.kind == "muon":
                raise ValueError(
                    "train.optimizer.kind=muon is for the matrices of a DiT, and the VAE recipe "
                    "has none; use adamw"
                )
            return self
        if recipe.lora is not None and self.train.optimizer.kind == "muon":
            raise ValueError(
                "train.optimizer.kind=muon is for whole matrices, and recipe.lora trains products of "
                "two thin ones; use adamw"
            )
        if recipe.latent_cache is not None and self.data.random_start:
            raise ValueError(
                "recipe.latent_cache holds one clip per row, from its start; set "
                "data.random_start=false or leave recipe.latent_cache out"
            )
        return self

    def hash(self) -> str:
        """Twelve hex digits that name the resolved config."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Keys that may differ between a checkpoint and the run that continues it.
FREE_TO_CHANGE = (
    "out",
    "logging",
    "data.num_workers",
    "data.memory_gb",
    "data.max_bad_share",
    "train.threads",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
)


def differing_key(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str | None:
    """The first dotted key with different values that a resumed run must not change, or None.

    Both are resolved configs as `RunConfig.model_dump(mode="json")` gives them.
    """
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        if name in FREE_TO_CHANGE or (key in before and key in now and before[key] == now[key]):
            continue
        old, new = before.get(key), now.get(key)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return name
        nested = differing_key(old, new, f"{name}.")
        if nested is not None:
            return nested
    return None
