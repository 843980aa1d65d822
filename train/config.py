"""What a run is made of: the pydantic models behind a training config.

`train.config_file` reads them from YAML with overrides from the command line, and words the errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from train.config_data import Betas, DataConfig, Section, Share
from train.config_recipes import FAMILIES, DiTRecipeConfig, VAERecipeConfig


class AdamWConfig(Section):
    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    betas: Betas = (0.9, 0.99)
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
    offload: bool = False  # keep the averages in the CPU's memory: less on the GPU, a slower step


class ParallelConfig(Section):
    """How the processes that torchrun starts share the work: replicas x shard x context of them.

    Weights, gradients, optimizer and EMA are spread over shard x context neighbouring processes;
    `context` of those share one batch, each with a part of every clip's tokens.
    """

    shard: PositiveInt | Literal["auto"] = 1  # auto: all processes, one replica
    context: PositiveInt = 1
    context_method: Literal["auto", "ulysses", "gather"] = "auto"  # auto: ulysses if heads divide
    # Of sharded weights, gradients are whole on every rank until the last micro-batch of a step, which
    # exchanges least; or sharded after each, which needs least memory.
    accumulate: Literal["whole", "sharded"] = "whole"


class SpikeConfig(Section):
    """Steps to leave out: those whose gradient norm is `factor` times the median of the last `window`
    steps', once there are so many."""

    factor: Annotated[float, Field(gt=1)]
    window: Annotated[int, Field(ge=2)] = 100
    max_skips: PositiveInt = 20  # in a row, after which the run stops


class TrainConfig(Section):
    steps: PositiveInt
    batch_size: PositiveInt  # global: over all ranks and accumulated micro-batches
    grad_accum: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of autocast; weights stay float32
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig = EMAConfig()
    grad_clip: PositiveFloat = 1.0  # global norm
    skip_spikes: SpikeConfig | None = None
    checkpoint_interval: PositiveInt = 1000
    async_checkpoints: bool = True  # write while training goes on
    keep_checkpoints: PositiveInt = 2  # the last so many
    keep_every: PositiveInt | None = None  # and those of every so many steps
    stall_timeout: PositiveFloat = 1800.0  # seconds without a step, then the slow rank is named
    compile: bool | Literal["auto"] = False  # torch.compile by block; auto: where it works
    # What a backward pass computes anew, for less memory: blocks, or in them all but products.
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    parallel: ParallelConfig = ParallelConfig()
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
    # Of one process in matrix products, for the log's MFU; by default that of the GPU, if known.
    peak_tflops: PositiveFloat | None = None


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
        if self.data.packing is not None:
            self._check_packing()
        if isinstance(recipe, VAERecipeConfig):
            late = recipe.adversarial
            if late is not None and late.start_step >= self.train.steps:
                raise ValueError(
                    f"recipe.adversarial.start_step={late.start_step} is after the last of "
                    f"train.steps={self.train.steps}; start earlier, or leave recipe.adversarial out"
                )
            if self.train.parallel.context > 1:
                raise ValueError(
                    f"train.parallel.context={self.train.parallel.context} is for the tokens of a DiT, "
                    "and the VAE recipe has none; use 1, and train.parallel.shard for its weights"
                )
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
        if recipe.latent_cache is not None and len(self.data.buckets) > 1:
            raise ValueError(
                "recipe.latent_cache holds one size per row, and data.buckets may draw a row in "
                "several; use data.native, where each row has one, or leave recipe.latent_cache out"
            )
        if recipe.latent_cache is not None and self.data.random_start:
            raise ValueError(
                "recipe.latent_cache holds one clip per row, from its start; set "
                "data.random_start=false or leave recipe.latent_cache out"
            )
        return self

    @property
    def gives_references(self) -> bool:
        """Whether the pictures of the clips' subjects are given in training."""
        return isinstance(self.recipe, DiTRecipeConfig) and self.recipe.tasks.references > 0

    def _check_packing(self) -> None:
        reason = ""
        if isinstance(self.recipe, VAERecipeConfig):
            reason = "is for the tokens of a DiT, and the VAE recipe has none"
        elif self.train.parallel.context > 1:
            reason = f"does not go with train.parallel.context={self.train.parallel.context}"
        elif self.recipe.tasks.weights.keys() - set(FAMILIES["clip"]):
            *others, last = (t for name, tasks in FAMILIES.items() if name != "clip" for t in tasks)
            reason = f"does not go with the tasks {', '.join(others)} and {last}"
        elif self.gives_references:
            reason = "does not go with recipe.tasks.references, pictures beside the clips"
        elif self.train.compile:
            reason = "does not go with train.compile, which compiles anew for each length of a row"
        if reason:
            raise ValueError(f"data.packing {reason}; leave it out, and data.native makes batches")

    def hash(self) -> str:
        """Twelve hex digits that name the resolved config."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Keys that may differ between a checkpoint and the run that continues it.
FREE_TO_CHANGE = (
    "out",
    "logging",
    "data.num_workers",
    "data.prefetch",
    "data.file_seconds",
    "data.worker_memory_gb",
    "data.memory_gb",
    "data.max_bad_share",
    "train.threads",
    "train.grad_accum",
    "train.compile",
    "train.checkpoint_interval",
    "train.async_checkpoints",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.stall_timeout",
    "train.activation_checkpointing",
    "train.parallel",
    "train.ema.offload",
)


def differing_key(
    before: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = (), prefix: str = ""
) -> str | None:
    """The first dotted key with different values that a resumed run must not change, or None.

    Both are resolved configs as `RunConfig.model_dump(mode="json")` gives them.

    Args:
        allowed: keys, or sections, that may differ beside FREE_TO_CHANGE.
    """
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        if (
            name in FREE_TO_CHANGE
            or name in allowed
            or (key in before and key in now and before[key] == now[key])
        ):
            continue
        old, new = before.get(key), now.get(key)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return name
        nested = differing_key(old, new, allowed, f"{name}.")
        if nested is not None:
            return nested
    return None
