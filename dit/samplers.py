"""From noise to data along t: 1 -> 0. Plain functions over any denoiser.

A denoiser takes x_t (b c f h w) and t (b,) and returns the objective's prediction; guidance is one
(dit/guidance.py). Every sampler calls `progress(step, x)` after each step when given.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dit.objective import Objective

Denoiser = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, Tensor], None]
SamplerName = Literal["euler", "heun", "ddim", "ancestral"]
FLOW_SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun")
DDPM_SAMPLERS: tuple[SamplerName, ...] = ("ddim", "ancestral")


def initial_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (b, *shape), one generator per sample: a sample never depends on its batch."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def _at(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.device).expand(len(x))


def euler(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """First-order steps of dx/dt = velocity."""
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        velocity = objective.velocity(denoise(x, _at(t, x)), x, _at(t, x))
        x = x + (t_next - t) * velocity
        if progress is not None:
            progress(step, x)
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """Second-order steps (Karras et al. 2022, algorithm 1), two evaluations each, one in the last."""
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        velocity = objective.velocity(denoise(x, _at(t, x)), x, _at(t, x))
        ahead = x + (t_next - t) * velocity
        if t_next > 0:
            velocity_ahead = objective.velocity(
                denoise(ahead, _at(t_next, x)), ahead, _at(t_next, x)
            )
            ahead = x + (t_next - t) * (velocity + velocity_ahead) / 2
        x = ahead
        if progress is not None:
            progress(step, x)
    return x


def ddim(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
    *,
    eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16: eta = 0 is deterministic, eta = 1 is ancestral DDPM.

    Raises:
        ValueError: eta > 0 without one generator per sample.
    """
    if eta > 0 and (generators is None or len(generators) != len(x)):
        raise ValueError(f"eta={eta} adds noise: give one generator per sample ({len(x)})")
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        x_0, noise = objective.x_0_and_noise(denoise(x, _at(t, x)), x, _at(t, x))
        alpha, sigma = objective.alpha_sigma(t)
        alpha_next, sigma_next = objective.alpha_sigma(t_next)
        variance = (sigma_next / sigma).square() * (1 - (alpha / alpha_next).square())
        fresh = eta * variance.clamp(min=0).sqrt()
        x = alpha_next * x_0 + (sigma_next.square() - fresh.square()).clamp(min=0).sqrt() * noise
        if generators is not None and fresh > 0:
            x = x + fresh * initial_noise(generators, tuple(x.shape[1:]))
        if progress is not None:
            progress(step, x)
    return x


def samplers_for(objective: Objective) -> tuple[SamplerName, ...]:
    """Names of the samplers that suit an objective, its default first."""
    return DDPM_SAMPLERS if getattr(objective, "kind", None) == "ddpm" else FLOW_SAMPLERS


def run_sampler(
    name: SamplerName | None,
    denoise: Denoiser,
    generators: list[torch.Generator],
    shape: tuple[int, ...],
    num_steps: int,
    objective: Objective,
    *,
    shift: float | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draws noise and runs the named sampler over the objective's grid.

    Args:
        name: a sampler, or None for the objective's default.
        generators: one per sample, on the device to work on.
        shape: of one sample's latents (c f h w).
    Returns:
        x_0 (b c f h w), float32.
    Raises:
        ValueError: the sampler does not suit the objective, or num_steps < 1.
    """
    allowed = samplers_for(objective)
    name = allowed[0] if name is None else name
    if name not in allowed:
        known = " or ".join(allowed)
        raise ValueError(
            f"sampler={name} does not suit this model's objective; use {known}"
            if name in get_args(SamplerName)
            else f"unknown sampler {name}; use {known}"
        )
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}; use 1 or more")
    x, grid = initial_noise(generators, shape), objective.grid(num_steps, shift)
    match name:
        case "euler":
            return euler(denoise, x, grid, objective, progress)
        case "heun":
            return heun(denoise, x, grid, objective, progress)
        case "ddim":
            return ddim(denoise, x, grid, objective, progress)
        case "ancestral":
            return ddim(denoise, x, grid, objective, progress, eta=1.0, generators=generators)
