"""From noise to data along t: 1 -> 0. Plain functions over any denoiser.

A denoiser takes x_t (b c f h w) and t (b,) and returns the objective's prediction; guidance is one
(dit/guidance.py). The t it is given is `objective.network_t` of the sampler's.

Every sampler takes the stops `grid` (num_steps + 1,), falling to 0, and calls `progress(step, x)`
after each step when given. That x is a preview: the step's prediction of x_0 (b c f h w), which a VAE
can decode, and after the last step the sample itself.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dit.grids import GridConfig, checked_shift
from dit.objective import DDPM, Objective

Denoiser = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, Tensor], None]
SamplerName = Literal["euler", "heun", "midpoint", "dpmpp_2m", "unipc", "ddim", "ancestral"]
FLOW_SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun", "midpoint", "dpmpp_2m", "unipc")
DDPM_SAMPLERS: tuple[SamplerName, ...] = ("ddim", "ancestral", "dpmpp_2m")


def initial_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (b, *shape), one generator per sample: a sample never depends on its batch."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def starting_noise(
    generators: list[torch.Generator], shape: tuple[int, ...], given: Tensor | None = None
) -> Tensor:
    """What a sampler starts from, (b, *shape), float32: drawn, or as given.

    Raises:
        ValueError: it is given in another shape.
    """
    if given is None:
        return initial_noise(generators, shape)
    if given.shape != (len(generators), *shape):
        raise ValueError(
            f"noise has shape {tuple(given.shape)}; expected {(len(generators), *shape)}"
        )
    return given.to(generators[0].device, torch.float32)


def check_temperature(value: float) -> None:
    """Raises ValueError: it is no standard deviation of noise to start from, above 0 to 1."""
    if not 0 < value <= 1:
        raise ValueError(f"temperature={value:g}; use a number above 0, up to 1")


def _ends(denoise: Denoiser, objective: Objective, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The x_0 and the noise that the network sees in x at one noise level t ()."""
    at, told = (level.to(x.device).expand(len(x)) for level in (t, objective.network_t(t)))
    return objective.x_0_and_noise(denoise(x, told), x, at)


def _tell(progress: Progress | None, step: int, grid: Tensor, x: Tensor, x_0: Tensor) -> None:
    if progress is not None:
        progress(step, x if step == len(grid) - 2 else x_0)


def _levels(objective: Objective, grid: Tensor) -> list[tuple[float, float, float]]:
    """alpha, sigma and lambda = log(alpha / sigma) at every stop, in double precision.

    lambda is -inf where there is only noise and +inf where there is only data.

    Raises:
        ValueError: two stops are the same, and what divides by the step between them would fail.
    """
    if not (grid.diff() < 0).all():
        raise ValueError(
            f"two of the sampler's {len(grid)} stops are the same noise level in float32; use fewer "
            "steps, or a shift nearer to 1"
        )
    alpha, sigma = (w.double() for w in objective.alpha_sigma(grid.double().cpu()))
    return list(zip(alpha.tolist(), sigma.tolist(), (alpha.log() - sigma.log()).tolist()))


def euler(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """First-order steps of dx/dt = velocity."""
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        x_0, noise = _ends(denoise, objective, x, t)
        x = x + (t_next - t) * (noise - x_0)
        _tell(progress, step, grid, x, x_0)
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
        x_0, noise = _ends(denoise, objective, x, t)
        velocity = noise - x_0
        if t_next > 0:
            x_0, noise = _ends(denoise, objective, x + (t_next - t) * velocity, t_next)
            velocity = (velocity + noise - x_0) / 2
        x = x + (t_next - t) * velocity
        _tell(progress, step, grid, x, x_0)
    return x


def midpoint(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """Second-order steps by the velocity halfway, two evaluations each (explicit midpoint rule)."""
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        half = (t_next - t) / 2
        x_0, noise = _ends(denoise, objective, x, t)
        x_0, noise = _ends(denoise, objective, x + half * (noise - x_0), t + half)
        x = x + 2 * half * (noise - x_0)
        _tell(progress, step, grid, x, x_0)
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
    # In double precision: sigma_next^2 - fresh^2 is nearly nothing after the step from pure noise.
    levels = _levels(objective, grid)
    for step, (now, then) in enumerate(zip(levels[:-1], levels[1:])):
        (alpha, sigma, _), (alpha_next, sigma_next, _) = now, then
        x_0, noise = _ends(denoise, objective, x, grid[step])
        fresh = eta * sigma_next / sigma * math.sqrt(max(1 - (alpha / alpha_next) ** 2, 0))
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - fresh**2, 0)) * noise
        if generators is not None and fresh > 0:
            x = x + fresh * initial_noise(generators, tuple(x.shape[1:]))
        _tell(progress, step, grid, x, x_0)
    return x


def _data_step(
    x: Tensor, x_0: Tensor, now: tuple[float, float, float], then: tuple[float, float, float]
) -> Tensor:
    """The exact step where x_0 stays what it is (Lu et al. 2022, DPM-Solver++, eq. 9, k = 1)."""
    (_, sigma, lam), (alpha_next, sigma_next, lam_next) = now, then
    return sigma_next / sigma * x - alpha_next * math.expm1(lam - lam_next) * x_0


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: x_0 is extrapolated from the last two steps.

    One evaluation a step. The first step has nothing to extrapolate from, and the last goes all the
    way to lambda = inf: both take x_0 as it is.
    """
    levels, before, h_before = _levels(objective, grid), None, 0.0
    for step, (now, then) in enumerate(zip(levels[:-1], levels[1:])):
        x_0, _ = _ends(denoise, objective, x, grid[step])
        h, ahead = then[2] - now[2], x_0
        if before is not None and h < math.inf:
            ahead = x_0 + h / (2 * h_before) * (x_0 - before)
        x = _data_step(x, ahead, now, then)
        before, h_before = x_0, h
        _tell(progress, step, grid, x, x_0)
    return x


def _corrector_weights(h: float, r: float) -> tuple[float, float]:
    """UniC-2's rho for B(h) = e^-h - 1 (Zhao et al. 2023, theorem 3.1), r the last step over h."""
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho = (b_1 - b_2) / (1 + r)  # the older difference quotient's; its node is at -r
    return rho, b_1 - rho


def unipc(
    denoise: Denoiser,
    x: Tensor,
    grid: Tensor,
    objective: Objective,
    progress: Progress | None = None,
) -> Tensor:
    """UniPC of order 2 on x_0 with B(h) = e^h - 1, "bh2" (Zhao et al. 2023, algorithms 5 and 6).

    Its predictor is DPM-Solver++(2M)'s step; what the network then says at the new x also corrects
    that x before the next step, at no further evaluation. lambda is held at t = 1 - 1e-6 or below, as
    the corrector divides by steps in lambda.
    """
    least = math.log(1e-6)
    levels = [(a, s, max(lam, least)) for a, s, lam in _levels(objective, grid)]
    history: list[tuple[Tensor, Tensor, float]] = []  # x and x_0 of the last two stops, h from each
    for step, (now, then) in enumerate(zip(levels[:-1], levels[1:])):
        x_0, _ = _ends(denoise, objective, x, grid[step])
        if history:
            x_last, x_0_last, h_last = history[-1]
            guess = x_0_last + (x_0 - x_0_last) / 2
            if len(history) == 2:
                _, x_0_before, h_before = history[0]
                old, new = _corrector_weights(h_last, h_before / h_last)
                slope = (x_0_last - x_0_before) * h_last / h_before
                guess = x_0_last + old * slope + new * (x_0 - x_0_last)
            x = _data_step(x_last, guess, levels[step - 1], now)
        h, ahead = then[2] - now[2], x_0
        if history and h < math.inf:
            ahead = x_0 + h / (2 * history[-1][2]) * (x_0 - history[-1][1])
        history = [*history[-1:], (x, x_0, h)]
        x = _data_step(x, ahead, now, then)
        _tell(progress, step, grid, x, x_0)
    return x


def samplers_for(objective: Objective) -> tuple[SamplerName, ...]:
    """Names of the samplers that suit an objective, its default first."""
    return DDPM_SAMPLERS if isinstance(objective, DDPM) else FLOW_SAMPLERS


def _sampler_name(name: str | None, objective: Objective) -> SamplerName:
    allowed = samplers_for(objective)
    if name is None:
        return allowed[0]
    for known in allowed:
        if name == known:
            return known
    use = f"use {', '.join(allowed[:-1])} or {allowed[-1]}"
    if name in get_args(SamplerName):
        raise ValueError(f"sampler={name} does not suit this model's objective; {use}")
    raise ValueError(f"unknown sampler {name}; {use}")


def run_sampler(
    name: SamplerName | None,
    denoise: Denoiser,
    generators: list[torch.Generator],
    shape: tuple[int, ...],
    num_steps: int,
    objective: Objective,
    *,
    shift: float | None = None,
    grid: GridConfig | Tensor | None = None,
    num_tokens: int | None = None,
    noise: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draws noise and runs the named sampler over a grid of stops.

    Args:
        name: a sampler, or None for the objective's default.
        generators: one per sample, on the device to work on.
        shape: of one sample's latents (c f h w).
        shift: of the grid, instead of the objective's own.
        grid: shape of the grid, or its num_steps + 1 stops; None for the objective's own.
        num_tokens: of one sample, for objectives whose shift depends on it.
        noise: to start from (b c f h w), instead of drawing it from the generators.
        progress: called with the step and a preview, see the module.
    Returns:
        x_0 (b c f h w), float32.
    Raises:
        ValueError: the sampler does not suit the objective, num_steps < 1, noise of another shape,
            a shift far from 1, stops that are the same, or what `objective.grid` refuses.
    """
    name = _sampler_name(name, objective)
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}; use 1 or more")
    x = starting_noise(generators, shape, noise)
    stops = objective.grid(num_steps, shift, num_tokens=num_tokens, grid=grid)
    if shift is not None:
        checked_shift(shift)
    match name:
        case "euler":
            return euler(denoise, x, stops, objective, progress)
        case "heun":
            return heun(denoise, x, stops, objective, progress)
        case "midpoint":
            return midpoint(denoise, x, stops, objective, progress)
        case "dpmpp_2m":
            return dpmpp_2m(denoise, x, stops, objective, progress)
        case "unipc":
            return unipc(denoise, x, stops, objective, progress)
        case "ddim":
            return ddim(denoise, x, stops, objective, progress)
        case "ancestral":
            return ddim(denoise, x, stops, objective, progress, eta=1.0, generators=generators)
