"""DDPM: variance-preserving diffusion in discrete steps (Ho et al. 2020), on the t axis."""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from dit.convention import Objective
from dit.grids import (
    GridConfig,
    KarrasGrid,
    ShiftedGrid,
    UniformGrid,
    checked_stops,
    uniform_stops,
)


class DDPM(Objective):
    """alpha^2 + sigma^2 = 1; t = k / num_train_steps is the state after k noising steps.

    schedule, over 1000 steps (betas are scaled for other counts):
        linear          beta from 1e-4 to 0.02 (Ho et al. 2020, section 4)
        scaled_linear   sqrt(beta) from sqrt(0.00085) to sqrt(0.012) (Stable Diffusion)
        cosine          Nichol & Dhariwal 2021, eq. 17, beta at most 0.999
    zero_terminal_snr: rescales the schedule so that t = 1 is nothing but noise, as sampling assumes
        (Lin et al. 2023, algorithm 1).
    min_snr_gamma: weights the loss as min(SNR, gamma) weights the error of x_0 (Hang et al. 2023,
        section 3.4); 5 in the paper, None for the plain error of the prediction.
    step_grid: where samplers stop, snapped to the training steps.
    """

    kind: Literal["ddpm"] = "ddpm"
    prediction: Literal["noise", "v", "x_0"] = "v"
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    num_train_steps: PositiveInt = 1000
    zero_terminal_snr: bool = False
    min_snr_gamma: PositiveFloat | None = None
    step_grid: GridConfig = UniformGrid()

    @model_validator(mode="after")
    def _says_something_at_the_end(self) -> "DDPM":
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ValueError(
                "prediction=noise says nothing about the data where there is only noise, which "
                "zero_terminal_snr asks for; use prediction=v or x_0"
            )
        if self.zero_terminal_snr and self.num_train_steps == 1:
            raise ValueError("zero_terminal_snr needs num_train_steps of 2 or more, not 1")
        return self

    def alpha_bar(self) -> Tensor:
        """Share of data variance after 0 .. num_train_steps steps, float64, first entry 1."""
        n = self.num_train_steps
        match self.schedule:
            case "linear":
                beta = torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * (1000 / n)
            case "scaled_linear":
                root = torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64)
                beta = root.square() * (1000 / n)
            case "cosine":
                steps = torch.arange(n + 1, dtype=torch.float64) / n
                curve = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
                beta = 1 - curve[1:] / curve[:-1]
        alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
        if self.zero_terminal_snr:
            alpha = alpha_bar.sqrt()
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
        return torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        step = (t.double() * self.num_train_steps).round().long()
        return self.alpha_bar().to(t.device)[step]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar, dtype = self._alpha_bar_at(t), torch.promote_types(t.dtype, torch.float32)
        return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)

    def sample_t(self, uniform: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
        """Every training step equally often; num_tokens changes nothing, as there is no shift."""
        n = self.num_train_steps
        return (((uniform.double() * n).floor() + 1).clamp(max=n) / n).float()

    def loss_weight(self, t: Tensor) -> Tensor:
        """1, or min-SNR's weight in terms of the prediction's own error."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha_bar = self._alpha_bar_at(t)
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=self.min_snr_gamma)
        match self.prediction:
            case "noise":
                weight = weight / snr
            case "v":
                weight = weight / (snr + 1)
        return weight.float()

    def grid(
        self,
        num_steps: int,
        shift: float | None = None,
        *,
        num_tokens: int | None = None,
        grid: GridConfig | Tensor | None = None,
    ) -> Tensor:
        """See `Objective.grid`; by default evenly spaced steps ("trailing", Lin et al. 2023).

        Noise prediction starts at the last step with alpha >= 0.005: nearer to pure noise it says
        nothing about the data, and dividing by alpha would blow its errors up.

        Raises:
            ValueError: more steps than training has, a shift, which DDPM does not have, a grid of
                flow matching, or stops that do not fall from step to step.
        """
        n = self.num_train_steps
        if shift not in (None, 1.0):
            raise ValueError(f"shift={shift}: DDPM has no shift; leave it out")
        first = n
        if self.prediction == "noise":
            first = max(int((self.alpha_bar().sqrt() >= 0.005).sum()) - 1, 1)
        if num_steps > first:
            raise ValueError(
                f"num_steps={num_steps} but this DDPM has {first} steps to stop at; use {first} or "
                "fewer"
            )
        shape = self.step_grid if grid is None else grid
        if isinstance(shape, Tensor):
            steps = (checked_stops(shape, num_steps).double() * n).round()
            if not (steps.diff() < 0).all():
                raise ValueError(f"the grid's stops must be at least 1/{n} apart, a training step")
            return (steps / n).float()
        if isinstance(shape, UniformGrid):
            steps = uniform_stops(num_steps, first)
        elif isinstance(shape, ShiftedGrid) and shape.shift is not None:
            steps = first * shape.stops(num_steps, shape.shift)
        elif isinstance(shape, ShiftedGrid):
            raise ValueError("DDPM has no shift of its own; give the shifted grid one: shift=3")
        elif isinstance(shape, KarrasGrid):
            steps = self._nearest_steps(shape.ratios(num_steps))
        else:
            raise ValueError(f"grid {shape.kind} is for flow matching; use uniform or karras")
        return (_falling(steps.round().clamp(max=first)) / n).float()

    def _nearest_steps(self, ratios: Tensor) -> Tensor:
        """The training steps whose sigma / alpha is nearest in the logarithm, and a last 0."""
        alpha_bar = self.alpha_bar()[1:].clamp(min=1e-20)
        log_ratio = ((1 - alpha_bar) / alpha_bar).log() / 2
        nearest = (ratios.log()[:, None] - log_ratio).abs().argmin(dim=1) + 1
        return torch.cat([nearest.double(), torch.zeros(1, dtype=torch.float64)])


def _falling(steps: Tensor) -> Tensor:
    """Whole steps, ending at 0, moved apart where two are the same."""
    room = torch.arange(len(steps) - 1, -1, -1, dtype=steps.dtype)  # steps still to come
    steps = torch.maximum(steps, room)
    return torch.cummin(steps - room, dim=0).values + room
