"""Flow matching: straight paths between data and noise (Lipman et al. 2023; Liu et al. 2023)."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from dit.convention import Objective
from dit.grids import (
    FlowMatchEulerGrid,
    GridConfig,
    KarrasGrid,
    ShiftedGrid,
    TokenShift,
    UniformGrid,
    WanGrid,
    checked_stops,
    shift_t,
    uniform_stops,
)

# Below this noise level x_t shows the data almost exactly, and weights of 1 / t^2 stop growing.
SMALLEST_T = 0.05


class FlowMatching(Objective):
    """alpha = 1 - t, sigma = t.

    Training draws t from `t_distribution` and then shifts it by `shift`, times what `token_shift`
    says for the clip's number of tokens: longer and larger clips need more noise to lose as much of
    their content (Esser et al. 2024, section 5.3.2).

    t_distribution (Esser et al. 2024, section 3.1):
        uniform
        logit_normal   sigmoid of a normal with logit_mean and logit_std (eq. 19)
        mode           heavy at the middle for mode_scale > 0, at the ends below 0 (eq. 20)
    weighting, of the velocity's squared error:
        uniform        1
        logit_normal   density of the logit-normal at t: what drawing t from it does in expectation
        cosmap         2 / (pi - 2 pi t + 2 pi t^2) (eq. 21)
        sigma_sqrt     1 / t^2, held below t = 0.05 (the name is diffusers')
    network_steps: the network was trained on t in whole steps of 1 / network_steps, and samplers tell
        it the step at or below theirs (Wan under UniPC).
    step_grid: where samplers stop.
    """

    kind: Literal["flow"] = "flow"
    prediction: Literal["velocity", "x_0"] = "velocity"
    t_distribution: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    # Outside this range eq. 20 folds back and is not a distribution's quantile function.
    mode_scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29
    shift: PositiveFloat = 1.0
    token_shift: TokenShift | None = None
    weighting: Literal["uniform", "logit_normal", "cosmap", "sigma_sqrt"] = "uniform"
    network_steps: PositiveInt | None = None
    step_grid: GridConfig = ShiftedGrid()

    @model_validator(mode="after")
    def _weighs_once(self) -> "FlowMatching":
        if self.weighting == self.t_distribution == "logit_normal":
            raise ValueError(
                "weighting=logit_normal on t_distribution=logit_normal counts it twice; "
                "use t_distribution=uniform, or leave the weighting out"
            )
        return self

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def network_t(self, t: Tensor) -> Tensor:
        if self.network_steps is None:
            return t
        return ((t.double() * self.network_steps).floor() / self.network_steps).to(t.dtype)

    def total_shift(self, num_tokens: int | Tensor | None = None) -> Tensor:
        """`shift` times what the token count asks for, float64, shaped like num_tokens.

        Raises:
            ValueError: token_shift is set and there is no count, or one below 1.
        """
        shift = torch.tensor(self.shift, dtype=torch.float64)
        if self.token_shift is None:
            return shift
        if num_tokens is None:
            raise ValueError(
                "this objective's token_shift needs a number of tokens; pass num_tokens, or a shift"
            )
        count = torch.as_tensor(num_tokens)
        if (count < 1).any():
            raise ValueError(f"num_tokens={num_tokens}; a clip has 1 or more")
        return shift * self.token_shift.factor(count)

    def sample_t(self, uniform: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
        """See `Objective.sample_t`.

        Raises:
            ValueError: see `total_shift`; or num_tokens is neither one number nor one per row.
        """
        shift = self.total_shift(num_tokens)
        if shift.ndim and shift.shape != uniform.shape[:1]:
            raise ValueError(
                f"num_tokens has shape {tuple(shift.shape)} for {len(uniform)} clips; "
                "give one number, or one per clip"
            )
        u = uniform.double().clamp(1e-7, 1 - 1e-7)
        match self.t_distribution:
            case "uniform":
                t = u
            case "logit_normal":
                t = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
            case "mode":
                # eq. 20 falls from 1 to 0; this is it at 1 - u, so that it rises.
                t = u - self.mode_scale * (torch.sin(math.pi * u / 2).square() - u)
        shift = shift.to(t.device)
        return shift_t(t, shift.view(-1, *[1] * (t.ndim - 1)) if shift.ndim else shift).float()

    def loss_weight(self, t: Tensor) -> Tensor:
        """`weighting` at t; for x_0 also 1 / t^2, which makes its error the velocity's."""
        t = t.float()
        match self.weighting:
            case "uniform":
                weight = torch.ones_like(t)
            case "logit_normal":
                inside = t.double().clamp(1e-6, 1 - 1e-6)
                z = (torch.logit(inside) - self.logit_mean) / self.logit_std
                scale = self.logit_std * math.sqrt(2 * math.pi) * inside * (1 - inside)
                weight = (torch.exp(-z.square() / 2) / scale).float()
            case "cosmap":
                weight = 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
            case "sigma_sqrt":
                weight = t.clamp(min=SMALLEST_T) ** -2
        if self.prediction == "x_0":
            weight = weight / t.clamp(min=SMALLEST_T).square()
        return weight

    def grid(
        self,
        num_steps: int,
        shift: float | None = None,
        *,
        num_tokens: int | None = None,
        grid: GridConfig | Tensor | None = None,
    ) -> Tensor:
        """See `Objective.grid`; by default evenly spaced, then shifted as in training.

        Raises:
            ValueError: a shift that is not above 0, or for a grid that takes none; stops that do not
                fall to 0; no num_tokens for a shift that needs it.
        """
        if shift is not None and not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}; use a number above 0, 1 for none")
        shape = self.step_grid if grid is None else grid
        if isinstance(shape, Tensor | UniformGrid | KarrasGrid):
            if shift is not None:
                name = "given" if isinstance(shape, Tensor) else shape.kind
                raise ValueError(f"shift={shift}: the {name} grid has no shift; leave one out")
            if isinstance(shape, Tensor):
                return checked_stops(shape, num_steps)
            if isinstance(shape, UniformGrid):
                return uniform_stops(num_steps).float()
            ratios = shape.ratios(num_steps)
            return torch.cat([ratios / (1 + ratios), torch.zeros(1)]).float()
        assert isinstance(shape, ShiftedGrid | WanGrid | FlowMatchEulerGrid)
        if grid is not None and shape.shift is not None and shift is not None:
            raise ValueError(f"shift={shift} and a grid with shift={shape.shift}; leave one out")
        if shift is None:
            shift = shape.shift
        if shift is None:
            shift = self.total_shift(num_tokens).item()
        return shape.stops(num_steps, shift).float()
