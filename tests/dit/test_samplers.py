"""What every sampler shares: independence of the batch, progress, the t its network sees, mistakes.

Their mathematics is tested in test_closed_form.py, their equality with diffusers in tests/parity.
"""

from typing import get_args

import pytest
import torch

from dit.grids import KarrasGrid, ShiftedGrid, SqrtTokenShift, UniformGrid, WanGrid
from dit.objective import DDPM, FlowMatching, weights
from dit.samplers import SamplerName, ddim, initial_noise, run_sampler, samplers_for

MEAN, STD = 1.5, 0.5
EVERY = [(name, o) for o in (FlowMatching(), DDPM()) for name in samplers_for(o)]
IDS = [f"{objective.kind}-{name}" for name, objective in EVERY]
SHAPE = (2, 1, 2, 2)


def best_denoiser(objective):
    """The optimal prediction for data N(MEAN, STD^2): E[x_0 | x_t] in closed form."""

    def denoise(x, t):
        alpha, sigma = (w.view(-1, 1, 1, 1, 1) for w in objective.alpha_sigma(t))
        variance = (alpha * STD).square() + sigma.square()
        x_0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        p, q = weights(objective.prediction, alpha, sigma)
        return p * x_0 + q * noise

    return denoise


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def run(name, objective, num_steps=5, count=1, seed=0, **options):
    denoise = options.pop("denoise", best_denoiser(objective))
    return run_sampler(
        name, denoise, generators(count, seed), SHAPE, num_steps, objective, **options
    )


def test_every_name_belongs_to_an_objective():
    assert {name for name, _ in EVERY} == set(get_args(SamplerName))
    assert samplers_for(FlowMatching())[0] == "euler"
    assert samplers_for(DDPM())[0] == "ddim"


@pytest.mark.parametrize(("name", "objective"), EVERY, ids=IDS)
def test_a_sample_does_not_depend_on_its_batch(name, objective):
    together = run(name, objective, count=3)
    assert torch.equal(together[2:], run(name, objective, seed=2))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("name", "objective"), EVERY, ids=IDS)
def test_progress_previews_x_0_and_ends_at_the_sample(name, objective):
    """Every preview is at the scale of data, closer to the end each time, unlike x_t itself."""
    seen = []
    end = run(name, objective, 8, 2, progress=lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == list(range(8))
    assert torch.equal(seen[-1][1], end)
    first, late = ((x - end).abs().mean() for _, x in (seen[0], seen[-2]))
    assert late < first
    assert abs(seen[0][1].mean() - MEAN) < 0.5


@pytest.mark.parametrize(("name", "objective"), EVERY, ids=IDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_finite(name, objective, num_steps):
    """The multistep solvers meet infinite lambda at both ends."""
    x = run(name, objective, num_steps, 4)
    assert x.isfinite().all()
    assert abs(x.mean() - MEAN) < 1


@pytest.mark.parametrize("name", samplers_for(FlowMatching()))
def test_the_network_sees_whole_steps(name):
    """network_steps changes what the network is told, and nothing else the sampler does."""
    told = {True: [], False: []}
    for whole in (True, False):
        objective = FlowMatching(network_steps=10 if whole else None)

        def denoise(x, t, whole=whole):
            assert t.shape == (1,)
            told[whole].append(t.item())
            return torch.ones_like(x)

        run(name, objective, 7, denoise=denoise)
    assert told[True] == [pytest.approx(int(t * 10) / 10) for t in told[False]]
    assert told[True] != told[False]
    constant = [
        run(name, FlowMatching(network_steps=steps), 7, denoise=lambda x, t: torch.ones_like(x))
        for steps in (10, None)
    ]
    assert torch.equal(*constant)


def test_where_it_starts_and_stops_can_be_given():
    objective, start = FlowMatching(shift=3.0), torch.full((1, *SHAPE), 2.0)
    told = []

    def denoise(x, t):
        told.append((t.item(), x.mean().item()))
        return torch.zeros_like(x)

    for options, stops in (
        ({"grid": UniformGrid()}, [1.0, 0.5]),
        ({}, [1.0, 0.75]),
        ({"shift": 1.0}, [1.0, 0.5]),
        ({"grid": ShiftedGrid(shift=1.0)}, [1.0, 0.5]),
        ({"grid": KarrasGrid(sigma_min=0.25, sigma_max=4.0)}, [0.8, 0.2]),
        ({"grid": torch.tensor([0.9, 0.3, 0.0])}, [0.9, 0.3]),
    ):
        told.clear()
        end = run("euler", objective, 2, denoise=denoise, noise=start, **options)
        assert torch.equal(end, start)
        assert told == [(pytest.approx(t), 2.0) for t in stops]
    by_tokens = FlowMatching(token_shift=SqrtTokenShift(base_tokens=4))
    told.clear()
    run("euler", by_tokens, 2, denoise=denoise, num_tokens=36)
    assert told[1][0] == pytest.approx(0.75)


def test_ddim_between_deterministic_and_ancestral():
    objective, x = DDPM(), initial_noise(generators(2), SHAPE)
    grid, denoise = objective.grid(5), best_denoiser(objective)

    def end(eta, seed):
        return ddim(denoise, x, grid, objective, eta=eta, generators=generators(2, seed))

    assert torch.equal(end(0.0, 1), end(0.0, 7))
    assert not torch.equal(end(0.5, 1), end(0.5, 7))
    assert not torch.equal(end(0.5, 1), end(1.0, 1))


def test_mistakes():
    flow, ddpm = FlowMatching(), DDPM()
    every_flow = "use euler, heun, midpoint, dpmpp_2m or unipc"
    for name, objective, message in (
        ("ddim", flow, f"sampler=ddim does not suit this model's objective; {every_flow}"),
        ("heun", ddpm, "use ddim, ancestral or dpmpp_2m"),
        ("eular", flow, f"unknown sampler eular; {every_flow}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(name, objective)
    for objective, num_steps, options, message in (
        (flow, 0, {}, "steps=0; use 1 or more"),
        (flow, 2, {"noise": torch.zeros(1, 2)}, r"noise has shape \(1, 2\); expected \(1, 2, 1"),
        (flow, 2, {"grid": torch.tensor([1.0, 0.0])}, r"one stop more than steps, \(3,\)"),
        (flow, 1, {"grid": torch.tensor([1.0, 0.1])}, "fall from at most 1"),
        (flow, 1, {"grid": torch.tensor([1.5, 0.0])}, "fall from at most 1"),
        (flow, 2, {"grid": torch.tensor([1.0, float("nan"), 0.0])}, "fall from at most 1"),
        (flow, 2, {"shift": 1e-300}, "shift=1e-300; use 0.001 to 1000, 1 for none"),
        (flow, 2, {"shift": 1e4, "grid": WanGrid()}, "shift=10000; use 0.001 to 1000"),
        (FlowMatching(token_shift=SqrtTokenShift(base_tokens=4)), 2, {}, "pass num_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            run(None, objective, num_steps, **options)
    for name in ("dpmpp_2m", "unipc"):  # a shift that a model folder says
        with pytest.raises(
            ValueError, match="two of the sampler's 4 stops are the same noise level"
        ):
            run(name, FlowMatching(shift=1e-300), 3)
    with pytest.raises(ValueError, match="one generator per sample"):
        ddim(best_denoiser(ddpm), torch.zeros(2, 1, 1, 1, 1), ddpm.grid(2), ddpm, eta=1.0)
