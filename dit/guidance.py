"""Guidance, outside the model: predictions for a text moved away from those for a negative one.

    cfg       classifier-free guidance (Ho & Salimans 2022, eq. 6), in the form of Saharia et al. 2022
    cfg_zero  CFG-Zero* (Fan et al. 2025): the negative prediction scaled to fit the positive one best,
              and no movement at all at the first noise levels; for models that predict velocity
    apg       adaptive projected guidance (Sadat et al. 2024): the part of the guidance that is parallel
              to the prediction held back, its size bounded, and a momentum across steps

All of them can be rescaled (Lin et al. 2023, eq. 15-16) and kept to an interval of noise levels
(Kynkäänniemi et al. 2024). With pictures of subjects beside the clip there is guidance towards these
too: away from a prediction that has neither them nor the text (InstructPix2Pix, Brooks et al. 2023,
eq. 3).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    model_validator,
)
from torch import Tensor

from dit.conditions import BesideFrames
from dit.objective import Objective, broadcast_t
from dit.reuse import FeatureReuse
from dit.transformer import DiT, PreparedContext

Text = tuple[
    Tensor, Tensor | None
]  # context (b m d), context_mask (b m) or None: all of it is text
Share = Annotated[float, Field(ge=0, le=1)]

# What each kind has of its own, with its default.
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "cfg_zero": {"zero_steps": 1},
    "apg": {"momentum": -0.5, "parallel": 0.0, "max_norm": None},
}


class GuidanceConfig(BaseModel):
    """How predictions with and without the text are put together; a scale of 1 is no guidance."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["cfg", "cfg_zero", "apg"] = "cfg"
    scale: NonNegativeFloat = 2.0
    rescale: Share = 0.0  # share of the rescaled result in the mixture; Lin et al. use 0.7
    interval: tuple[Share, Share] = (0.0, 1.0)  # noise levels t, lowest and highest, with guidance
    sequential: bool = False  # one text after the other: half the memory, the same result
    references: NonNegativeFloat | None = None  # scale of pictures of subjects; None, 1 for none
    zero_steps: NonNegativeInt | None = None  # cfg_zero: noise levels without movement (default 1)
    momentum: Annotated[float, Field(gt=-1, lt=1)] | None = None  # apg: of the guidance (-0.5)
    parallel: Share | None = None  # apg: share of the parallel part that stays, the paper's eta (0)
    max_norm: PositiveFloat | None = None  # apg: of a whole sample's guidance, the paper's r (none)

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "cfg")
        for owner, options in OWN_OPTIONS.items():
            for name, default in options.items():
                if owner == kind and values.get(name) is None:
                    values = {**values, name: default}
                elif owner != kind and values.get(name) is not None:
                    raise ValueError(f"{name} is an option of kind={owner}, and kind is {kind}")
        return values

    @model_validator(mode="after")
    def _interval_is_one(self) -> GuidanceConfig:
        low, high = self.interval
        if low > high:
            raise ValueError(f"interval={low:g} to {high:g}: give the lower noise level first")
        return self

    @classmethod
    def checked(cls, **values: Any) -> GuidanceConfig:
        """From values that a user gave.

        Raises:
            ValueError: in one line, the first value that cannot be used.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] != "value_error":
                name = str(problem["loc"][0])
                expected = message.removeprefix("Input should be ")
                if problem["type"] in ("missing", "too_long"):
                    expected = "two noise levels"  # the only field of several values
                message = f"{name}={values.get(name)}; expected {expected}"
            raise ValueError(f"guidance: {message}") from None

    @property
    def is_none(self) -> bool:
        """Whether there is no guidance at any noise level."""
        return self.scale == 1 and self.references in (None, 1)

    def active(self, t: Tensor) -> bool:
        """Whether there is guidance at noise levels t; the noisiest one decides."""
        if self.is_none:
            return False
        # Compared as float32, in which t comes, so that 0.3 lies in an interval up to 0.3.
        low, high = torch.tensor(self.interval).tolist()
        return (low, high) == (0, 1) or low <= t.float().max().item() <= high


def combine(
    positive: Tensor, negative: Tensor, scale: float, *, optimal_negative: bool = False
) -> Tensor:
    """negative + scale * (positive - negative), of predictions (b c f h w).

    Args:
        optimal_negative: first scale the negative to lie as near to the positive as it can, by
            <positive, negative> / |negative|^2 (CFG-Zero*).
    """
    if optimal_negative:
        dims = tuple(range(1, negative.ndim))
        square = negative.square().sum(dims, keepdim=True)
        negative = (positive * negative).sum(dims, keepdim=True) / (square + 1e-8) * negative
    return negative + scale * (positive - negative)


class ProjectedGuidance:
    """APG; of one sampling run, as the momentum goes from step to step."""

    def __init__(self, momentum: float, parallel: float, max_norm: float | None) -> None:
        self.momentum, self.parallel, self.max_norm = momentum, parallel, max_norm
        self._average: Tensor | None = None

    def __call__(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """positive + (scale - 1) * what is left of (positive - negative), all (b c f h w)."""
        dims = tuple(range(1, positive.ndim))
        update = positive - negative
        if self._average is not None:
            update = update + self.momentum * self._average
        self._average = update
        if self.max_norm is not None:
            norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
            update = update * (self.max_norm / norm.clamp(min=1e-12)).clamp(max=1)
        along = positive / torch.linalg.vector_norm(positive, dim=dims, keepdim=True).clamp(
            min=1e-12
        )
        parallel = (update * along).sum(dims, keepdim=True) * along
        return positive + (scale - 1) * (update - (1 - self.parallel) * parallel)


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """`guided` brought towards the standard deviation of `positive` (Lin et al. 2023, eq. 15-16)."""
    dims = tuple(range(1, guided.ndim))
    ratio = positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * ratio + (1 - share))


class GuidedDenoiser:
    """The denoiser of one sampling run, from `guided_denoiser`; its counts are of single clips."""

    def __init__(
        self,
        model: DiT,
        text: Text,
        negative: Text,
        guidance: GuidanceConfig,
        reuse_threshold: float | None,
        objective: Objective | None,
        beside: BesideFrames | None = None,
    ) -> None:
        self.without = None if beside is None else beside.without_references()
        if beside is None or beside is self.without:
            guidance = guidance.model_copy(update={"references": None})
        self.model, self.guidance, self.objective = model, guidance, objective
        self.beside = beside
        self.num_evaluations = 0  # clips that the model was asked about
        self._levels: list[float] = []  # noise levels met so far
        self._projected = None
        if guidance.kind == "apg":
            momentum, parallel = guidance.momentum, guidance.parallel
            assert momentum is not None
            assert parallel is not None
            self._projected = ProjectedGuidance(momentum, parallel, guidance.max_norm)
        # Positive texts come first: outside the interval they alone are asked about.
        texts, count = [text] if guidance.is_none else [text, negative], len(text[0])
        if not guidance.is_none and not guidance.sequential:
            texts = [_joined(text, negative)]
        self._prepared = [model.prepare_context(*each) for each in texts]
        self._positive = self._prepared[0].rows(slice(count))
        self._negative = self._prepared[-1].rows(slice(-count, None))
        self.reuse: list[FeatureReuse] = []  # one for each part evaluated together
        if reuse_threshold is not None:
            self.reuse = [FeatureReuse(reuse_threshold) for _ in (*texts, None)]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction for x (b c f h w) at noise levels t, (b,) or (b f), in float32."""
        guidance = self.guidance
        stands_still = self._stands_still(t)
        if not guidance.active(t):
            return self._predict(x, t, self._positive, 0, self.beside)
        if stands_still:
            return torch.zeros_like(x, dtype=torch.float32)
        if guidance.sequential:
            positive, negative = (
                self._predict(x, t, text, n, self.beside) for n, text in enumerate(self._prepared)
            )
        else:
            twice = torch.cat([x, x]), torch.cat([t, t])
            both = self._predict(*twice, self._prepared[0], 0, self.beside)
            positive, negative = both.chunk(2)
        if self._projected is not None:
            guided = self._project(positive, negative, x, t)
        else:
            best = guidance.kind == "cfg_zero"
            guided = combine(positive, negative, guidance.scale, optimal_negative=best)
        if guidance.references not in (None, 1):
            # Of the paper's three terms the two with the text are `guided`.
            neither = self._predict(x, t, self._negative, len(self._prepared), self.without)
            guided = guided + (guidance.references - 1) * (negative - neither)
        return rescaled(guided, positive, guidance.rescale) if guidance.rescale else guided

    def _predict(
        self, x: Tensor, t: Tensor, text: PreparedContext, number: int, beside: BesideFrames | None
    ) -> Tensor:
        """Args: number: of the part, for what it reuses."""
        self.num_evaluations += len(x)
        reuse = self.reuse[number] if self.reuse else None
        if beside is not None:
            beside = beside.repeated(len(x) // len(beside.latents))
        return self.model(x, t, text, beside=beside, reuse=reuse).float()

    def _stands_still(self, t: Tensor) -> bool:
        """Whether this is one of the first noise levels, at which CFG-Zero* does not move."""
        if not self.guidance.zero_steps:
            return False
        level = t.float().max().item()
        if level not in self._levels:
            self._levels.append(level)
        return self._levels.index(level) < self.guidance.zero_steps

    def _project(self, positive: Tensor, negative: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """APG on the implied data, as in its paper, where the objective is known."""
        assert self._projected is not None
        scale, objective = self.guidance.scale, self.objective
        if objective is None:
            return self._projected(positive, negative, scale)
        x_0, negative_x_0 = (objective.x_0_and_noise(p, x, t)[0] for p in (positive, negative))
        change = self._projected(x_0, negative_x_0, scale) - x_0
        # x_t stays, so the noise changes against the data; predictions are linear in both.
        alpha, sigma = objective.alpha_sigma(broadcast_t(t, x))
        return positive + objective.target(change, -alpha / sigma.clamp(min=1e-6) * change, t)


def _joined(text: Text, negative: Text) -> Text:
    """Two texts as one batch; the shorter one is filled up with states that its mask hides."""
    longest = max(text[0].shape[1], negative[0].shape[1])
    contexts, masks = [], []
    for context, mask in (text, negative):
        mask = context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask
        missing = longest - context.shape[1]
        contexts.append(F.pad(context, (0, 0, 0, missing)))
        masks.append(F.pad(mask, (0, missing)))
    return torch.cat(contexts), torch.cat(masks)


def guided_denoiser(
    model: DiT,
    text: Text,
    negative: Text,
    guidance: GuidanceConfig | float,
    *,
    reuse_threshold: float | None = None,
    objective: Objective | None = None,
    beside: BesideFrames | None = None,
) -> GuidedDenoiser:
    """The denoiser of one sampling run: make a new one for every run, as it remembers steps.

    Keys and values of the texts are computed here, once. Scales of 1, and noise levels outside the
    interval, take one evaluation per clip instead of two; guidance towards references takes three.

    Args:
        text: context (b m d) and context_mask (b m) or None, of the clips to sample.
        negative: the same of what to move away from.
        guidance: a config, or a scale of plain classifier-free guidance.
        reuse_threshold: leave out blocks at steps where little changes, see `FeatureReuse`.
        objective: the model's. With it APG works on the data that predictions imply, as its paper
            has it; without on the predictions, as diffusers has it. The other kinds don't need it.
        beside: frames that the clips are seen with, whatever the text.
    Raises:
        ValueError: the scale or threshold is not a finite number of at least 0, or cfg_zero is asked
            of a model that does not predict velocity.
    """
    if not isinstance(guidance, GuidanceConfig):
        guidance = GuidanceConfig.checked(scale=guidance)
    if guidance.kind == "cfg_zero" and objective is not None and objective.prediction != "velocity":
        raise ValueError(
            f"guidance kind=cfg_zero is for models that predict velocity, and this one predicts "
            f"{objective.prediction}; use cfg or apg"
        )
    return GuidedDenoiser(model, text, negative, guidance, reuse_threshold, objective, beside)
