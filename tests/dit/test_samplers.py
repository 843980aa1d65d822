"""Samplers against closed forms: for Gaussian data the best denoiser, and so the flow, is known."""

import math

import pytest
import torch

from dit.guidance import guided_denoiser
from dit.objective import DDPM, FlowMatching
from dit.samplers import ddim, euler, heun, initial_noise, run_sampler, samplers_for

MEAN, STD = 1.5, 0.5


def best_denoiser(objective):
    """The optimal prediction for data N(MEAN, STD^2): E[x_0 | x_t] in closed form."""

    def denoise(x, t):
        alpha, sigma = (w.view(-1, 1, 1, 1, 1) for w in objective.alpha_sigma(t))
        variance = (alpha * STD).square() + sigma.square()
        x_0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        p, q = objective._weights(alpha, sigma)
        return p * x_0 + q * noise

    return denoise


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def exact_end(x_1):
    """Probability-flow ODE of Gaussian data from t = 1: the monotone map of N(0,1) onto it."""
    return MEAN + STD * x_1


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler, order):
    objective = FlowMatching()
    x_1 = torch.randn(
        64, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    errors = []
    for num_steps in (20, 40, 80):
        grid = objective.grid(num_steps).double()
        x_0 = sampler(best_denoiser(objective), x_1, grid, objective)
        errors.append((x_0 - exact_end(x_1)).abs().mean().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.3


@pytest.mark.parametrize("prediction", ["noise", "v", "x_0"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", ["ddim", "ancestral"])
def test_ddpm_samplers_give_the_data_distribution(prediction, schedule, name):
    objective = DDPM(prediction=prediction, schedule=schedule)
    n = 64
    x = run_sampler(name, best_denoiser(objective), generators(n), (4, 1, 8, 8), 200, objective)
    assert abs(x.mean() - MEAN) < 0.03
    assert abs(x.std() - STD) < 0.03


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_flow_samplers_give_the_data_distribution(prediction, name):
    objective = FlowMatching(prediction=prediction, shift=3.0)
    x = run_sampler(name, best_denoiser(objective), generators(64), (4, 1, 8, 8), 100, objective)
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() - STD) < 0.02


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ancestral"])
def test_a_sample_does_not_depend_on_its_batch(name):
    objective = FlowMatching() if name in ("euler", "heun") else DDPM()
    denoise = best_denoiser(objective)

    def run(which):
        return run_sampler(name, denoise, [which(i) for i in range(3)], (2, 1, 2, 2), 5, objective)

    together = run(lambda i: torch.Generator().manual_seed(i))
    alone = run_sampler(
        name, denoise, [torch.Generator().manual_seed(2)], (2, 1, 2, 2), 5, objective
    )
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("sampler", [euler, heun, ddim])
def test_progress_is_told_every_step(sampler):
    objective = DDPM() if sampler is ddim else FlowMatching()
    seen = []
    x = initial_noise(generators(1), (1, 1, 2, 2))
    end = sampler(
        best_denoiser(objective), x, objective.grid(4), objective, lambda s, y: seen.append((s, y))
    )
    assert [s for s, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], end)


class CountingModel:
    """Says the mean of its context, and counts the samples it was asked about."""

    asked = 0

    def __call__(self, x, t, context, mask):
        self.asked += len(x)
        return torch.ones_like(x) * context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


def test_guidance_moves_away_from_the_negative_and_costs_nothing_at_one():
    text = torch.full((2, 3, 4), 2.0), torch.ones(2, 3, dtype=torch.bool)
    negative = torch.full((2, 3, 4), -1.0), torch.ones(2, 3, dtype=torch.bool)
    x, t = torch.zeros(2, 1, 1, 1, 1), torch.ones(2)
    model = CountingModel()
    assert guided_denoiser(model, text, negative, 3.0)(x, t).flatten().tolist() == [8.0, 8.0]
    assert model.asked == 4
    assert guided_denoiser(model, text, negative, 1.0)(x, t).flatten().tolist() == [2.0, 2.0]
    assert model.asked == 6


def test_mistakes():
    flow, ddpm = FlowMatching(), DDPM()
    assert samplers_for(flow)[0] == "euler"
    assert samplers_for(ddpm)[0] == "ddim"
    for name, objective, message in (
        ("ddim", flow, "sampler=ddim does not suit this model's objective; use euler or heun"),
        ("heun", ddpm, "use ddim or ancestral"),
        ("eular", flow, "unknown sampler eular; use euler or heun"),
    ):
        with pytest.raises(ValueError, match=message):
            run_sampler(name, best_denoiser(objective), generators(1), (1, 1, 1, 1), 5, objective)
    with pytest.raises(ValueError, match="steps=0; use 1 or more"):
        run_sampler(None, best_denoiser(flow), generators(1), (1, 1, 1, 1), 0, flow)
    with pytest.raises(ValueError, match="one generator per sample"):
        ddim(best_denoiser(ddpm), torch.zeros(2, 1, 1, 1, 1), ddpm.grid(2), ddpm, eta=1.0)
