"""The one noise convention: conversions, schedules, the distribution of t."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dit.objective import DDPM, FlowMatching, ObjectiveConfig, shift_t

EVERY = [
    FlowMatching(),
    FlowMatching(prediction="x_0", t_distribution="uniform", shift=3.0),
    *(
        DDPM(prediction=prediction, schedule=schedule)
        for prediction in ("noise", "v", "x_0")
        for schedule in ("cosine", "linear")
    ),
]
IDS = [f"{o.kind}-{o.prediction}-{getattr(o, 'schedule', '')}" for o in EVERY]


def pair(b=2, f=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, b, 4, f, 2, 2, generator=g).unbind(0)


def test_the_convention():
    """x_t = (1 - t) x_0 + t noise and velocity = noise - x_0: DESIGN's one sign convention."""
    x_0, noise = pair()
    t = torch.tensor([0.25, 1.0])
    x_t = FlowMatching().add_noise(x_0, noise, t)
    torch.testing.assert_close(x_t[0], 0.75 * x_0[0] + 0.25 * noise[0])
    torch.testing.assert_close(x_t[1], noise[1])
    torch.testing.assert_close(FlowMatching().target(x_0, noise, t), noise - x_0)


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
@pytest.mark.parametrize("per_frame", [False, True])
@given(seed=st.integers(0, 10_000))
def test_every_prediction_converts_back(objective, per_frame, seed):
    g = torch.Generator().manual_seed(seed)
    x_0, noise = pair()
    t = 0.02 + 0.96 * torch.rand((2, 3) if per_frame else (2,), generator=g)
    x_t, target = objective.add_noise(x_0, noise, t), objective.target(x_0, noise, t)
    data, eps = objective.x_0_and_noise(target, x_t, t)
    torch.testing.assert_close(data, x_0, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(eps, noise, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        objective.velocity(target, x_t, t), noise - x_0, atol=4e-3, rtol=4e-3
    )


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
def test_the_ends_are_data_and_noise(objective):
    alpha, sigma = objective.alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert alpha[1] < 0.07
    assert sigma[1] > 0.99


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
def test_score_of_a_gaussian(objective):
    """For x_0 ~ N(0, 4) the best prediction is linear and the score is -x_t / var(x_t)."""
    x_t, t = pair()[0], torch.tensor([0.3, 0.8])
    alpha, sigma = (w.view(2, 1, 1, 1, 1) for w in objective.alpha_sigma(t))
    variance = 4 * alpha**2 + sigma**2
    best_x_0, best_noise = 4 * alpha / variance * x_t, sigma / variance * x_t
    p, q = objective._weights(alpha, sigma)
    score = objective.score(p * best_x_0 + q * best_noise, x_t, t)
    torch.testing.assert_close(score, -x_t / variance, atol=1e-4, rtol=1e-3)


def test_logit_normal_and_shift():
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = FlowMatching(logit_mean=0.4, logit_std=1.5).sample_t(u).double()
    logit = torch.logit(t)
    assert abs(logit.mean() - 0.4) < 1e-3
    assert abs(logit.std() - 1.5) < 1e-2
    shifted = FlowMatching(logit_mean=0.4, logit_std=1.5, shift=3.0).sample_t(u).double()
    torch.testing.assert_close(torch.logit(shifted), logit + math.log(3), atol=1e-2, rtol=1e-3)
    uniform = FlowMatching(t_distribution="uniform").sample_t(u)
    torch.testing.assert_close(uniform, u)


@given(shift=st.floats(0.1, 10), t=st.floats(0, 1))
def test_shift_keeps_the_ends_and_inverts(shift, t):
    t_tensor = torch.tensor(t, dtype=torch.float64)
    back = shift_t(shift_t(t_tensor, shift), 1 / shift)
    assert abs(back - t_tensor) < 1e-9
    assert abs(shift_t(torch.tensor(1.0), shift) - 1) < 1e-6
    assert shift_t(torch.tensor(0.0), shift) == 0


def test_ddpm_draws_every_step_once():
    n = 1000
    t = DDPM().sample_t((torch.arange(n) + 0.5) / n)
    assert torch.equal((t.double() * n).round().long(), torch.arange(1, n + 1))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddpm_schedules_fall(schedule):
    alpha_bar = DDPM(schedule=schedule).alpha_bar()
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1] > 0


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 37])
def test_grids_fall_from_noise_to_data(objective, num_steps):
    grid = objective.grid(num_steps)
    assert len(grid) == num_steps + 1
    starts_at_one = objective.prediction != "noise" or objective.schedule == "linear"
    assert grid[0] == 1 if starts_at_one else 0.99 < grid[0] < 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_loss_is_the_velocity_error_for_both_flow_predictions():
    x_0, noise = pair()
    t = torch.tensor([0.3, 0.9])
    guess = x_0 + 0.1
    x_t = FlowMatching().add_noise(x_0, noise, t)
    as_x_0 = FlowMatching(prediction="x_0")
    velocity = as_x_0.velocity(guess, x_t, t)
    torch.testing.assert_close(
        as_x_0.loss(guess, x_0, noise, t), FlowMatching().loss(velocity, x_0, noise, t)
    )
    assert FlowMatching().loss(velocity, x_0, noise, t).shape == (2, 3)


def test_the_kind_chooses_the_class():
    adapter = TypeAdapter(ObjectiveConfig)
    for objective in EVERY:
        assert adapter.validate_python(objective.model_dump()) == objective
    for wrong in (
        {"kind": "flow", "schedule": "cosine"},
        {"kind": "ddpm", "prediction": "velocity"},
        {"kind": "edm"},
        {"kind": "flow", "shift": 0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_mistakes():
    x_0, noise = pair()
    with pytest.raises(ValueError, match=r"x_0 is .* but noise is"):
        FlowMatching().add_noise(x_0, noise[:1], torch.rand(2))
    with pytest.raises(ValueError, match="t has shape"):
        FlowMatching().add_noise(x_0, noise, torch.rand(5))
    with pytest.raises(ValueError, match="use 1000 or fewer"):
        DDPM().grid(1001)
    for shift in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="use a number above 0"):
            FlowMatching().grid(10, shift=shift)
    with pytest.raises(ValueError, match="no shift"):
        DDPM().grid(10, shift=3.0)
