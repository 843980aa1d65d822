"""The noise convention, stated once: what is mixed, what is predicted, how one gives the other.

    x_t = alpha(t) * x_0 + sigma(t) * noise,    t = 0 is data, t = 1 is pure noise

Flow matching (dit/flow.py) has alpha = 1 - t and sigma = t. DDPM (dit/ddpm.py) has
alpha^2 + sigma^2 = 1 on the same axis. One objective is used for training and for sampling, and is
saved with the model.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dit.grids import GridConfig

Prediction = Literal["velocity", "v", "noise", "x_0"]
Quantity = Literal["velocity", "v", "noise", "x_0", "score"]


def broadcast_t(t: Tensor, like: Tensor) -> Tensor:
    """t (b,) or (b f) shaped to multiply a (b c f h w) tensor.

    Raises:
        ValueError: t has neither shape.
    """
    b, _, f = like.shape[:3]
    if t.shape == (b,):
        return t.view(b, 1, 1, 1, 1)
    if t.shape == (b, f):
        return t.view(b, 1, f, 1, 1)
    raise ValueError(f"t has shape {tuple(t.shape)}; expected ({b},) or ({b}, {f})")


def weights(quantity: Quantity, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of quantity = p * x_0 + q * noise, shaped like alpha and sigma.

    velocity   p = -1, q = 1            noise - x_0, flow matching's target
    v          p = -sigma, q = alpha    Salimans & Ho 2022, section 4
    noise      p = 0, q = 1             epsilon, Ho et al. 2020
    x_0        p = 1, q = 0             data
    score      p = 0, q = -1 / sigma    gradient of log p(x_t) when averaged, Song et al. 2021
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    match quantity:
        case "velocity":
            return -one, one
        case "v":
            return -sigma, alpha
        case "noise":
            return zero, one
        case "x_0":
            return one, zero
        case "score":
            return zero, -1 / sigma


class Objective(BaseModel, ABC):
    """What the network predicts, and how noise enters; subclasses give alpha and sigma.

    Every quantity of `weights` is linear in data and noise, and so is x_t. The two equations together
    give every conversion; `prediction` only chooses which one the network says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prediction: Prediction

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of data and noise at t, any shape, in [0, 1]."""

    @abstractmethod
    def sample_t(self, uniform: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
        """Training noise levels in (0, 1): a monotone map of uniform draws (b,) or (b f).

        Args:
            num_tokens: of a clip, or of each (b,); for objectives whose shift depends on it.
        """

    @abstractmethod
    def loss_weight(self, t: Tensor) -> Tensor:
        """What the squared error of the prediction is multiplied with at t, any shape, float32."""

    @abstractmethod
    def grid(
        self,
        num_steps: int,
        shift: float | None = None,
        *,
        num_tokens: int | None = None,
        grid: GridConfig | Tensor | None = None,
    ) -> Tensor:
        """num_steps + 1 falling noise levels from (nearly) 1 to 0, the sampler's stops, float32.

        Args:
            shift: instead of the objective's own.
            num_tokens: of a clip, for objectives whose shift depends on it.
            grid: the shape of the grid, or the stops themselves; None for the objective's own.
        """

    def network_t(self, t: Tensor) -> Tensor:
        """The t that samplers tell the network for a state at t: t itself, unless it was trained
        on coarser ones."""
        return t

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean latents and standard normal noise (b c f h w), t (b,) or (b f).

        Raises:
            ValueError: shapes differ.
        """
        if x_0.shape != noise.shape:
            raise ValueError(f"x_0 is {tuple(x_0.shape)} but noise is {tuple(noise.shape)}")
        alpha, sigma = self.alpha_sigma(broadcast_t(t, x_0))
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say for x_t."""
        p, q = weights(self.prediction, *self.alpha_sigma(broadcast_t(t, x_0)))
        return p * x_0 + q * noise

    def _ends(
        self, value: Tensor, x_t: Tensor, t: Tensor, source: Quantity
    ) -> tuple[Tensor, Tensor]:
        t = broadcast_t(t, x_t)
        alpha, sigma = self.alpha_sigma(t.to(torch.promote_types(t.dtype, torch.float32)))
        if source in ("noise", "score"):
            alpha = alpha.clamp(min=1e-6)
        if source in ("x_0", "score"):
            sigma = sigma.clamp(min=1e-6)
        p, q = weights(source, alpha, sigma)
        determinant = alpha * q - sigma * p
        x_0 = (q * x_t - sigma * value) / determinant
        noise = (alpha * value - p * x_t) / determinant
        return x_0, noise

    def x_0_and_noise(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of the line that a prediction implies; solves the 2x2 system above.

        Where the prediction says nothing about one end (noise at t = 1 about the data, x_0 at t = 0
        about the noise) the weights are kept 1e-6 away from the singular point.
        """
        return self._ends(pred, x_t, t, self.prediction)

    def convert(
        self, value: Tensor, x_t: Tensor, t: Tensor, to: Quantity, source: Quantity | None = None
    ) -> Tensor:
        """One quantity from another at x_t, all (b c f h w); t (b,) or (b f).

        Args:
            to: what to give. The score needs t > 0.
            source: what `value` is; None for the objective's own prediction.
        """
        x_0, noise = self._ends(value, x_t, t, self.prediction if source is None else source)
        p, q = weights(to, *self.alpha_sigma(broadcast_t(t, x_t)))
        return p * x_0 + q * noise

    def velocity(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """noise - x_0, flow matching's velocity dx_t / dt, from a prediction."""
        return self.convert(pred, x_t, t, "velocity")

    def score(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p(x_t): -noise / sigma (Song et al. 2021). Needs t > 0."""
        return self.convert(pred, x_t, t, "score")

    def loss(self, pred: Tensor, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error of the prediction, one per latent frame (b f), in float32."""
        error = pred.float() - self.target(x_0, noise, t).float()
        return error.square().mean(dim=(1, 3, 4)) * self.loss_weight(t).reshape(len(t), -1)
