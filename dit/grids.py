"""Where a sampler stops between noise and data: step grids as data, and the shift of t.

A grid is num_steps + 1 falling noise levels that end at 0. `kind` chooses its shape; the objective
(dit/objective.py) fills in its own shift, and turns noise-to-data ratios into its own t.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

# Beyond these nearly all stops lie at one end, in float32 some of them at the same place.
SMALLEST_SHIFT, LARGEST_SHIFT = 1e-3, 1e3
Shift = Annotated[float, Field(ge=SMALLEST_SHIFT, le=LARGEST_SHIFT)]


def checked_shift(shift: float) -> float:
    """A shift that a user gave.

    Raises:
        ValueError: too far from 1.
    """
    if not SMALLEST_SHIFT <= shift <= LARGEST_SHIFT:
        raise ValueError(
            f"shift={shift:g}; use {SMALLEST_SHIFT:g} to {LARGEST_SHIFT:g}, 1 for none"
        )
    return shift


def shift_t(t: Tensor, shift: float | Tensor) -> Tensor:
    """Moves noise levels towards 1 (Esser et al. 2024, eq. 23); shift 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExponentialTokenShift(_Config):
    """exp(mu), mu linear in the number of tokens: Flux's, and diffusers' `calculate_shift`.

    diffusers calls the two mu `base_shift` and `max_shift`; they are logarithms of a shift.
    """

    kind: Literal["exponential"] = "exponential"
    base_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    @model_validator(mode="after")
    def _two_points(self) -> "ExponentialTokenShift":
        if self.base_tokens >= self.max_tokens:
            raise ValueError(
                f"base_tokens={self.base_tokens} is not below max_tokens={self.max_tokens}"
            )
        return self

    def factor(self, num_tokens: Tensor) -> Tensor:
        """The shift for counts of tokens, any shape, float64."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return torch.exp(self.base_mu + slope * (num_tokens.double() - self.base_tokens))


class SqrtTokenShift(_Config):
    """sqrt(tokens / base_tokens): the same uncertainty of the mean at any size (SD3, eq. 23)."""

    kind: Literal["sqrt"] = "sqrt"
    base_tokens: PositiveInt

    def factor(self, num_tokens: Tensor) -> Tensor:
        """The shift for counts of tokens, any shape, float64."""
        return (num_tokens.double() / self.base_tokens).sqrt()


TokenShift = Annotated[ExponentialTokenShift | SqrtTokenShift, Field(discriminator="kind")]


def uniform_stops(num_steps: int, top: float = 1.0) -> Tensor:
    """Evenly spaced from `top` to 0 (num_steps + 1,), float64."""
    return torch.linspace(top, 0, num_steps + 1, dtype=torch.float64)


class UniformGrid(_Config):
    """Evenly spaced, whatever the objective's shift."""

    kind: Literal["uniform"] = "uniform"


class ShiftedGrid(_Config):
    """Evenly spaced, then shifted: by the objective's shift unless it has one of its own.

    The stops of diffusers' flow pipelines that hand their scheduler linspace(1, 1 / n, n): SD3, Flux.
    """

    kind: Literal["shifted"] = "shifted"
    shift: Shift | None = None

    def stops(self, num_steps: int, shift: float) -> Tensor:
        """From 1 to 0 (num_steps + 1,), float64."""
        return shift_t(uniform_stops(num_steps), shift)


class KarrasGrid(_Config):
    """Evenly spaced in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5).

    It starts at sigma_max, a little below pure noise, as samplers on this grid do.
    """

    kind: Literal["karras"] = "karras"
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    @model_validator(mode="after")
    def _falls(self) -> "KarrasGrid":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} is not below sigma_max={self.sigma_max}")
        return self

    def ratios(self, num_steps: int) -> Tensor:
        """Falling sigma / alpha of every stop but the last (num_steps,), float64."""
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + ramp * (low - high)) ** self.rho


class WanGrid(_Config):
    """The stops of diffusers' UniPCMultistepScheduler with use_flow_sigmas, Wan's sampler.

    Equal to its sigmas within one unit in the last place of float32. That unit is spent so that
    floor(t * num_train_steps) is exactly the whole timestep its network is given.
    """

    kind: Literal["wan"] = "wan"
    shift: Shift | None = None
    num_train_steps: Annotated[int, Field(ge=2)] = 1000

    def stops(self, num_steps: int, shift: float) -> Tensor:
        """From 1 - 1e-6 to 0 (num_steps + 1,), float32."""
        # In numpy, whose linspace rounds as the reference does: where t * num_train_steps is a
        # whole number, its last bit decides the timestep.
        exact = np.linspace(1, 1 / self.num_train_steps, num_steps + 1)
        exact = shift * exact / (1 + (shift - 1) * exact)
        if abs(exact[0] - 1) < 1e-6:
            exact[0] -= 1e-6
        exact[-1] = 0
        stops = exact.astype(np.float32)
        whole = np.floor(exact * self.num_train_steps)
        for below, direction in ((True, 2), (False, -1)):
            got = np.floor(stops.astype(np.float64) * self.num_train_steps)
            off = got < whole if below else got > whole
            stops[off] = np.nextafter(stops[off], np.float32(direction))
        return torch.from_numpy(stops)


class FlowMatchEulerGrid(_Config):
    """The stops of diffusers' FlowMatchEulerDiscreteScheduler.set_timesteps(num_steps), and Heun's.

    It spaces from 1 to the shifted smallest training step, and shifts that again.
    """

    kind: Literal["flow_match_euler"] = "flow_match_euler"
    shift: Shift | None = None
    num_train_steps: Annotated[int, Field(ge=2)] = 1000

    def stops(self, num_steps: int, shift: float) -> Tensor:
        """From 1 to 0 (num_steps + 1,), float64."""
        # The reference holds its smallest step in float32.
        smallest = shift_t(torch.tensor(1 / self.num_train_steps, dtype=torch.float32), shift)
        even = torch.linspace(1, smallest.item(), num_steps, dtype=torch.float64)
        return torch.cat([shift_t(even, shift), torch.zeros(1, dtype=torch.float64)])


GridConfig = Annotated[
    UniformGrid | ShiftedGrid | KarrasGrid | WanGrid | FlowMatchEulerGrid,
    Field(discriminator="kind"),
]


def checked_stops(stops: Tensor, num_steps: int) -> Tensor:
    """A user's own stops (num_steps + 1,), in float32 on the CPU.

    Raises:
        ValueError: not that many, not falling from at most 1, or not ending at 0.
    """
    stops = stops.detach().float().cpu()
    if stops.shape != (num_steps + 1,):
        raise ValueError(
            f"a grid of shape {tuple(stops.shape)} for num_steps={num_steps}; it needs one stop more "
            f"than steps, ({num_steps + 1},)"
        )
    if not (stops.diff() < 0).all() or not stops[0] <= 1 or stops[-1] != 0:
        raise ValueError("the grid's stops must fall from at most 1, each below the last, to 0")
    return stops
