"""Our samplers against diffusers' schedulers: whole trajectories of one fixed toy network."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from dit.objective import DDPM, FlowMatching
from dit.samplers import ddim, euler, heun

STEPS = 12


def network(x, t):
    """Nonlinear in x and t, the same for both sides; t is 0 .. 1."""
    return torch.sin(2 * x) * (0.5 + t.view(-1, 1, 1, 1, 1)) + 0.3 * x


@pytest.fixture
def noise():
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler(noise, shift):
    objective = FlowMatching(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = objective.grid(STEPS)
    sigmas = np.linspace(1, 1 / STEPS, STEPS)  # the scheduler shifts them itself
    scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(scheduler.sigmas[: STEPS + 1], grid[: STEPS + 1], atol=1e-6, rtol=0)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, (t / 1000).expand(2)), t, x).prev_sample
    torch.testing.assert_close(euler(network, noise, grid, objective), x, atol=1e-4, rtol=1e-4)


def test_heun(noise):
    objective, scheduler = FlowMatching(), FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    # Its stops are each listed twice but for the first; it ends at 0.
    stops = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], torch.zeros(1)])
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(network(x, sigma.expand(2)), t, x).prev_sample
    got = heun(network, noise, stops.unique().flip(0), objective)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "theirs"), [("noise", "epsilon"), ("v", "v_prediction"), ("x_0", "sample")]
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim(noise, prediction, theirs, schedule):
    objective = DDPM(prediction=prediction, schedule=schedule)
    scheduler = DDIMScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        prediction_type=theirs,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    alpha_bar = objective.alpha_bar()[1:].float()
    torch.testing.assert_close(scheduler.alphas_cumprod, alpha_bar, atol=1e-5, rtol=1e-3)
    steps = 20  # the scheduler steps by 1000 // steps, and so is exact for divisors only
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:  # its step index k is our t = (k + 1) / 1000
        x = scheduler.step(network(x, ((t + 1) / 1000).expand(2)), t, x).prev_sample
    stops = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    if prediction != "noise":
        assert torch.equal(stops, objective.grid(steps))
    got = ddim(network, noise, stops, objective)
    scale = x.abs().max()
    assert (got - x).abs().max() / scale <= 1e-4
