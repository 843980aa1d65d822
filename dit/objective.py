"""The noise convention, stated once: schedules, prediction types, the distribution of t, the loss.

    x_t = alpha(t) * x_0 + sigma(t) * noise,    t = 0 is data, t = 1 is pure noise

Flow matching has alpha = 1 - t and sigma = t (Lipman et al. 2023; Liu et al. 2023). DDPM has
alpha^2 + sigma^2 = 1 (Ho et al. 2020) on the same axis: t = k / num_train_steps is the state after k
noising steps. One objective is used for training and for sampling, and is saved with the model.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

Prediction = Literal["velocity", "v", "noise", "x_0"]


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


class Objective(BaseModel, ABC):
    """What the network predicts, and how noise enters; subclasses give alpha and sigma.

    Every prediction is linear in data and noise, pred = p * x_0 + q * noise, and so is x_t. The two
    equations together give every conversion; `prediction` only chooses p and q:

        velocity   p = -1, q = 1            noise - x_0, flow matching's target
        v          p = -sigma, q = alpha    Salimans & Ho 2022, section 4
        noise      p = 0, q = 1             epsilon, Ho et al. 2020
        x_0        p = 1, q = 0             data
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prediction: Prediction

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of data and noise at t, any shape, in [0, 1]."""

    @abstractmethod
    def sample_t(self, uniform: Tensor) -> Tensor:
        """Training noise levels in (0, 1): a monotone map of uniform draws, any shape."""

    @abstractmethod
    def grid(self, num_steps: int, shift: float | None = None) -> Tensor:
        """num_steps + 1 falling noise levels from (nearly) 1 to 0, the sampler's stops."""

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean latents and standard normal noise (b c f h w), t (b,) or (b f).

        Raises:
            ValueError: shapes differ.
        """
        if x_0.shape != noise.shape:
            raise ValueError(f"x_0 is {tuple(x_0.shape)} but noise is {tuple(noise.shape)}")
        alpha, sigma = self.alpha_sigma(broadcast_t(t, x_0))
        return alpha * x_0 + sigma * noise

    def _weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        match self.prediction:
            case "velocity":
                return -one, one
            case "v":
                return -sigma, alpha
            case "noise":
                return zero, one
            case "x_0":
                return one, zero

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say for x_t."""
        p, q = self._weights(*self.alpha_sigma(broadcast_t(t, x_0)))
        return p * x_0 + q * noise

    def x_0_and_noise(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of the line that a prediction implies; solves the 2x2 system above.

        Where the prediction says nothing about one end (noise at t = 1 about the data, x_0 at t = 0
        about the noise) the weights are kept 1e-6 away from the singular point.
        """
        t = broadcast_t(t, x_t).float()
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "noise":
            alpha = alpha.clamp(min=1e-6)
        if self.prediction == "x_0":
            sigma = sigma.clamp(min=1e-6)
        p, q = self._weights(alpha, sigma)
        determinant = alpha * q - sigma * p
        x_0 = (q * x_t - sigma * pred) / determinant
        noise = (alpha * pred - p * x_t) / determinant
        return x_0, noise

    def velocity(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """noise - x_0, flow matching's velocity dx_t / dt, from any prediction."""
        x_0, noise = self.x_0_and_noise(pred, x_t, t)
        return noise - x_0

    def score(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p(x_t): -noise / sigma (Song et al. 2021). Needs t > 0."""
        _, noise = self.x_0_and_noise(pred, x_t, t)
        _, sigma = self.alpha_sigma(broadcast_t(t, x_t))
        return -noise / sigma

    def loss(self, pred: Tensor, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the prediction, one per latent frame (b f), in float32."""
        error = pred.float() - self.target(x_0, noise, t).float()
        return error.square().mean(dim=(1, 3, 4))


def shift_t(t: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards 1 (Esser et al. 2024, eq. 23); shift 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


class FlowMatching(Objective):
    """Straight paths between data and noise."""

    kind: Literal["flow"] = "flow"
    prediction: Literal["velocity", "x_0"] = "velocity"
    t_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    shift: PositiveFloat = 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def sample_t(self, uniform: Tensor) -> Tensor:
        if self.t_distribution == "logit_normal":
            normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
            uniform = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return shift_t(uniform, self.shift).float()

    def grid(self, num_steps: int, shift: float | None = None) -> Tensor:
        """Evenly spaced, then shifted as in training, or by `shift`.

        Raises:
            ValueError: shift is not above 0.
        """
        if shift is not None and not shift > 0:
            raise ValueError(f"shift={shift}; use a number above 0, 1 for none")
        uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return shift_t(uniform, self.shift if shift is None else shift).float()

    def loss(self, pred: Tensor, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Error of the velocity, also when the network predicts x_0 (then divided by t squared).

        The division is held above t = 0.05, below which x_t shows the data almost exactly.
        """
        loss = super().loss(pred, x_0, noise, t)
        if self.prediction == "x_0":
            loss = loss / t.reshape(len(t), -1).clamp(min=0.05).square()
        return loss


class DDPM(Objective):
    """The variance-preserving diffusion of Ho et al. 2020 in discrete steps, on the t axis."""

    kind: Literal["ddpm"] = "ddpm"
    prediction: Literal["noise", "v", "x_0"] = "v"
    schedule: Literal["cosine", "linear"] = "cosine"
    num_train_steps: PositiveInt = 1000

    def alpha_bar(self) -> Tensor:
        """Share of data variance after 0 .. num_train_steps steps, float64, first entry 1.

        linear: beta from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020, section 4), scaled for other
        counts; cosine: Nichol & Dhariwal 2021, eq. 17, beta at most 0.999.
        """
        n = self.num_train_steps
        if self.schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * (1000 / n)
        else:
            steps = torch.arange(n + 1, dtype=torch.float64) / n
            curve = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
            beta = 1 - curve[1:] / curve[:-1]
        alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
        return torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        step = (t.double() * self.num_train_steps).round().long()
        alpha_bar = self.alpha_bar().to(t.device)[step]
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def sample_t(self, uniform: Tensor) -> Tensor:
        n = self.num_train_steps
        return (((uniform.double() * n).floor() + 1).clamp(max=n) / n).float()

    def grid(self, num_steps: int, shift: float | None = None) -> Tensor:
        """Evenly spaced steps, snapped to the training steps ("trailing", Lin et al. 2023).

        Noise prediction starts at the last step with alpha >= 0.005: nearer to pure noise it says
        nothing about the data, and dividing by alpha would blow its errors up.

        Raises:
            ValueError: more steps than training has, or a shift, which DDPM does not have.
        """
        n = self.num_train_steps
        if num_steps > n:
            raise ValueError(f"num_steps={num_steps} but this DDPM has {n} steps; use {n} or fewer")
        if shift not in (None, 1.0):
            raise ValueError(f"shift={shift}: DDPM has no shift; leave it out")
        first = n
        if self.prediction == "noise":
            first = int((self.alpha_bar().sqrt() >= 0.005).sum()) - 1
        return (torch.linspace(first, 0, num_steps + 1, dtype=torch.float64).round() / n).float()


ObjectiveConfig = Annotated[FlowMatching | DDPM, Field(discriminator="kind")]
