"""The one noise convention: conversions, schedules, the distribution of t, the weights of the loss."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dit.grids import (
    ExponentialTokenShift,
    FlowMatchEulerGrid,
    KarrasGrid,
    ShiftedGrid,
    SqrtTokenShift,
    WanGrid,
    shift_t,
)
from dit.objective import DDPM, FlowMatching, ObjectiveConfig, Quantity, weights

EVERY = [
    FlowMatching(),
    FlowMatching(prediction="x_0", t_distribution="uniform", shift=3.0, weighting="logit_normal"),
    FlowMatching(t_distribution="mode", weighting="cosmap", token_shift=ExponentialTokenShift()),
    FlowMatching(weighting="sigma_sqrt", network_steps=1000, step_grid=WanGrid()),
    *(
        DDPM(prediction=prediction, schedule=schedule)
        for prediction in ("noise", "v", "x_0")
        for schedule in ("cosine", "linear", "scaled_linear")
    ),
    DDPM(prediction="v", schedule="linear", zero_terminal_snr=True, min_snr_gamma=5.0),
    DDPM(prediction="x_0", schedule="scaled_linear", zero_terminal_snr=True),
    DDPM(prediction="noise", num_train_steps=500, min_snr_gamma=1.0, step_grid=KarrasGrid()),
]


def label(objective):
    changed = objective.model_dump(exclude_defaults=True)
    return "-".join([objective.kind, *(f"{k}={v}" for k, v in changed.items() if k != "kind")])


IDS = [label(objective) for objective in EVERY]
QUANTITIES = get_args(Quantity)


def pair(b=2, f=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, 4, f, 2, 2, generator=g, dtype=dtype).unbind(0)


def test_every_value_of_every_option_is_among_the_tested():
    for kind, options in (
        (FlowMatching, ("prediction", "t_distribution", "weighting")),
        (DDPM, ("prediction", "schedule")),
    ):
        for name in options:
            values = {getattr(o, name) for o in EVERY if isinstance(o, kind)}
            assert values == set(get_args(kind.model_fields[name].annotation))


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
@settings(max_examples=20, deadline=None)
def test_every_prediction_converts_back(objective, per_frame, seed):
    g = torch.Generator().manual_seed(seed)
    x_0, noise = pair()
    t = 0.02 + 0.93 * torch.rand((2, 3) if per_frame else (2,), generator=g)
    x_t, target = objective.add_noise(x_0, noise, t), objective.target(x_0, noise, t)
    data, eps = objective.x_0_and_noise(target, x_t, t)
    torch.testing.assert_close(data, x_0, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(eps, noise, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        objective.velocity(target, x_t, t), noise - x_0, atol=4e-3, rtol=4e-3
    )


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
@given(seed=st.integers(0, 10_000), per_frame=st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_quantity_from_every_other(objective, seed, per_frame):
    """All 25 pairs against their definitions, in float64: 1e-9, over alpha^2 where little data is
    left in x_t to read it from."""
    g = torch.Generator().manual_seed(seed)
    x_0, noise = pair(seed=seed, dtype=torch.float64)
    shape = (2, 3) if per_frame else (2,)
    t = 0.02 + 0.96 * torch.rand(shape, generator=g, dtype=torch.float64)
    if objective.kind == "flow":
        alpha, sigma = 1 - t, t
    else:
        alpha_bar = objective.alpha_bar()[(t * objective.num_train_steps).round().long()]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    alpha, sigma = (w.view(2, 1, -1, 1, 1) for w in (alpha, sigma))
    defined = {
        "x_0": x_0,
        "noise": noise,
        "velocity": noise - x_0,
        "v": alpha * noise - sigma * x_0,
        "score": -noise / sigma,
    }
    assert set(defined) == set(QUANTITIES)
    x_t, tolerance = alpha * x_0 + sigma * noise, 1e-9 / alpha.min().item() ** 2
    assert torch.equal(objective.target(x_0, noise, t), defined[objective.prediction])
    for source, to in itertools.product(QUANTITIES, QUANTITIES):
        got = objective.convert(defined[source], x_t, t, to, source)
        torch.testing.assert_close(got, defined[to], rtol=1e-9, atol=tolerance)
    own = objective.convert(defined[objective.prediction], x_t, t, "score")
    torch.testing.assert_close(own, defined["score"], rtol=1e-9, atol=tolerance)


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
    p, q = weights(objective.prediction, alpha, sigma)
    score = objective.score(p * best_x_0 + q * best_noise, x_t, t)
    torch.testing.assert_close(score, -x_t / variance, atol=1e-4, rtol=1e-3)


MIDDLES = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def test_logit_normal_and_shift():
    t = FlowMatching(logit_mean=0.4, logit_std=1.5).sample_t(MIDDLES).double()
    logit = torch.logit(t)
    assert abs(logit.mean() - 0.4) < 1e-3
    assert abs(logit.std() - 1.5) < 1e-2
    shifted = FlowMatching(logit_mean=0.4, logit_std=1.5, shift=3.0).sample_t(MIDDLES).double()
    torch.testing.assert_close(torch.logit(shifted), logit + math.log(3), atol=1e-2, rtol=1e-3)
    uniform = FlowMatching(t_distribution="uniform").sample_t(MIDDLES)
    torch.testing.assert_close(uniform, MIDDLES.float())


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_distribution(scale):
    """Esser et al. 2024, eq. 20: t = f(u) rises from 0 to 1 over its whole range of scales, and its
    density is 1 / |f'(f^-1(t))|, checked as a histogram."""
    t = FlowMatching(t_distribution="mode", mode_scale=scale).sample_t(MIDDLES).double()
    u = 1 - MIDDLES
    paper = 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    torch.testing.assert_close(t, paper, atol=1e-6, rtol=0)
    assert (t.diff() >= 0).all()
    assert t[0] < 0.01
    assert t[-1] > 0.99
    middle = ((t > 0.495) & (t < 0.505)).double().mean()
    slope = 1 + scale * (1 - math.pi / 2)  # f' at u = 1/2, where t = 1/2
    if scale < 1.5:  # at the upper limit the density is infinite there
        assert middle == pytest.approx(0.01 / slope, rel=0.05)
    else:
        assert middle > 0.1


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
def test_draws_of_t_rise_with_the_uniform_draws(objective):
    """So that strata of uniform draws are strata of t; the ends stay inside (0, 1]."""
    t = objective.sample_t(torch.tensor([0.0, 1e-9, 0.1, 0.5, 0.7, 0.999, 1.0]), num_tokens=500)
    assert t.dtype == torch.float32
    assert (t.diff() >= 0).all()
    assert t[0] > 0
    assert t[-1] <= 1
    assert (t[2:6].diff() > 0).all()


def test_ddpm_draws_every_step_once():
    n = 1000
    t = DDPM().sample_t((torch.arange(n) + 0.5) / n)
    assert torch.equal((t.double() * n).round().long(), torch.arange(1, n + 1))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "scaled_linear"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("num_train_steps", [1000, 250])
def test_ddpm_schedules_fall(schedule, zero_terminal_snr, num_train_steps):
    alpha_bar = DDPM(
        schedule=schedule, zero_terminal_snr=zero_terminal_snr, num_train_steps=num_train_steps
    ).alpha_bar()
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all()
    assert (alpha_bar[-1] == 0) == zero_terminal_snr
    plain = DDPM(schedule=schedule, num_train_steps=num_train_steps).alpha_bar()
    assert alpha_bar[1] == pytest.approx(plain[1].item(), rel=1e-12)


@pytest.mark.parametrize("num_train_steps", [100, 1000])
def test_the_ends_of_the_betas(num_train_steps):
    scale = 1000 / num_train_steps
    for schedule, first, last in (("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)):
        alpha_bar = DDPM(schedule=schedule, num_train_steps=num_train_steps).alpha_bar()
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        assert beta[0] == pytest.approx(first * scale)
        assert beta[-1] == pytest.approx(last * scale)
        bend = beta.diff().diff()
        assert bend.abs().max() < 1e-9 if schedule == "linear" else (bend > 1e-10).all()


@pytest.mark.parametrize("objective", EVERY, ids=IDS)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 37])
def test_grids_fall_from_noise_to_data(objective, num_steps):
    grid = objective.grid(num_steps, num_tokens=500)
    assert len(grid) == num_steps + 1
    assert 0.97 < grid[0] <= 1
    if objective.step_grid.kind in ("uniform", "shifted"):
        starts_at_one = objective.prediction != "noise" or objective.schedule != "cosine"
        assert grid[0] == 1 if starts_at_one else 0.99 < grid[0] < 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_network_t():
    t = torch.tensor([1.0, 0.999999, 0.7, 0.0014, 0.0009, 0.0])
    told = FlowMatching(network_steps=1000).network_t(t)
    torch.testing.assert_close(told, torch.tensor([1.0, 0.999, 0.699, 0.001, 0.0, 0.0]))
    assert told.dtype == t.dtype
    for objective in (FlowMatching(), DDPM()):
        assert objective.network_t(t) is t


def test_loss_is_the_velocity_error_for_both_flow_predictions():
    x_0, noise = pair()
    t = torch.tensor([0.3, 0.9])
    guess = x_0 + 0.1
    x_t = FlowMatching().add_noise(x_0, noise, t)
    for weighting in ("uniform", "cosmap", "sigma_sqrt"):
        as_x_0 = FlowMatching(prediction="x_0", weighting=weighting)
        as_velocity = FlowMatching(weighting=weighting)
        velocity = as_x_0.velocity(guess, x_t, t)
        expected = as_velocity.loss(velocity, x_0, noise, t)
        assert expected.shape == (2, 3)
        assert (expected > 1e-3).all()
        torch.testing.assert_close(as_x_0.loss(guess, x_0, noise, t), expected)


def test_flow_weights():
    t = torch.tensor([[0.05, 0.3], [0.5, 0.9]])
    x_0, noise = pair(f=2)
    plain = FlowMatching(t_distribution="uniform").loss(x_0, x_0, noise, t)
    for weighting, expected in (
        ("uniform", torch.ones_like(t)),
        ("cosmap", 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
        ("sigma_sqrt", t**-2),
        (
            "logit_normal",
            torch.exp(-((torch.logit(t) - 0.4) ** 2) / (2 * 1.5**2))
            / (1.5 * math.sqrt(2 * math.pi) * t * (1 - t)),
        ),
    ):
        objective = FlowMatching(
            t_distribution="uniform", weighting=weighting, logit_mean=0.4, logit_std=1.5
        )
        torch.testing.assert_close(objective.loss_weight(t), expected)
        torch.testing.assert_close(objective.loss(x_0, x_0, noise, t), plain * expected)
        assert objective.loss_weight(torch.tensor([0.0, 1.0])).isfinite().all()


def test_logit_normal_weights_are_logit_normal_draws():
    """A mean over uniform t with the weights is the mean over drawn t."""
    drawn = FlowMatching(logit_mean=0.4, logit_std=0.8)
    weighted = FlowMatching(
        t_distribution="uniform", weighting="logit_normal", logit_mean=0.4, logit_std=0.8
    )
    for f in (torch.ones_like, torch.square, torch.cos):
        t = weighted.sample_t(MIDDLES).double()
        got = (weighted.loss_weight(t) * f(t)).mean()
        assert got == pytest.approx(f(drawn.sample_t(MIDDLES).double()).mean().item(), rel=1e-4)


@pytest.mark.parametrize("prediction", ["noise", "v", "x_0"])
def test_min_snr_weights_the_error_of_x_0(prediction):
    """Hang et al. 2023: whatever is predicted, the loss is min(SNR, gamma) |x_0 error|^2."""
    objective = DDPM(prediction=prediction, schedule="linear", min_snr_gamma=5.0)
    x_0, noise = pair()
    t = torch.tensor([[0.05, 0.1, 0.15], [0.3, 0.5, 0.8]])
    x_t = objective.add_noise(x_0, noise, t)
    pred = objective.target(x_0, noise, t) + 0.1 * noise
    guess, _ = objective.x_0_and_noise(pred, x_t, t)
    alpha, sigma = objective.alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    assert (snr > 5).any()
    assert (snr < 5).any()
    expected = snr.clamp(max=5.0) * (guess - x_0).square().mean((1, 3, 4))
    got = objective.loss(pred, x_0, noise, t)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)
    plain = objective.model_copy(update={"min_snr_gamma": None}).loss(pred, x_0, noise, t)
    assert not torch.allclose(got, plain, rtol=0.05) or prediction == "x_0"
    assert objective.loss_weight(torch.tensor([0.0, 1.0])).isfinite().all()


def test_the_kind_chooses_the_class():
    adapter = TypeAdapter(ObjectiveConfig)
    for objective in EVERY:
        assert adapter.validate_python(objective.model_dump()) == objective
        assert adapter.validate_json(objective.model_dump_json()) == objective


def test_configs_of_stored_models_still_load():
    adapter = TypeAdapter(ObjectiveConfig)
    flow = {
        "kind": "flow",
        "prediction": "velocity",
        "t_distribution": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "shift": 3.0,
    }
    ddpm = {"kind": "ddpm", "prediction": "v", "schedule": "cosine", "num_train_steps": 1000}
    assert adapter.validate_python(flow) == FlowMatching(shift=3.0)
    assert adapter.validate_python(ddpm) == DDPM()
    even = torch.linspace(1, 0, 5)
    torch.testing.assert_close(adapter.validate_python(flow).grid(4), shift_t(even, 3.0))
    assert adapter.validate_python(ddpm).grid(4).tolist() == even.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "edm"},
        {"kind": "flow", "schedule": "cosine"},
        {"kind": "flow", "prediction": "noise"},
        {"kind": "flow", "t_distribution": "beta"},
        {"kind": "flow", "t_distribution": "mode", "mode_scale": 1.8},
        {"kind": "flow", "mode_scale": -1.1},
        {"kind": "flow", "logit_std": 0},
        {"kind": "flow", "logit_mean": math.nan},
        {"kind": "flow", "shift": 0},
        {"kind": "flow", "shift": math.inf},
        {"kind": "flow", "token_shift": {"kind": "sqrt"}},
        {"kind": "flow", "token_shift": {"kind": "linear"}},
        {"kind": "flow", "token_shift": 3.0},
        {"kind": "flow", "weighting": "snr"},
        {"kind": "flow", "weighting": "logit_normal"},
        {"kind": "flow", "network_steps": 0},
        {"kind": "flow", "step_grid": {"kind": "euler"}},
        {"kind": "flow", "step_grid": {"kind": "shifted", "shift": -1}},
        {"kind": "ddpm", "prediction": "velocity"},
        {"kind": "ddpm", "schedule": "sigmoid"},
        {"kind": "ddpm", "num_train_steps": 0},
        {"kind": "ddpm", "min_snr_gamma": 0},
        {"kind": "ddpm", "zero_terminal_snr": "perhaps"},
        {"kind": "ddpm", "zero_terminal_snr": True, "num_train_steps": 1},
        {"kind": "ddpm", "shift": 3.0},
    ],
    ids=str,
)
def test_malformed_configs(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(ObjectiveConfig).validate_python(wrong)


def test_contradictions_say_what_to_do():
    with pytest.raises(ValidationError, match="use prediction=v or x_0"):
        DDPM(prediction="noise", zero_terminal_snr=True)
    with pytest.raises(ValidationError, match="use t_distribution=uniform"):
        FlowMatching(weighting="logit_normal")
    for grid in (ShiftedGrid(shift=2.0), FlowMatchEulerGrid()):
        assert FlowMatching(step_grid=grid).step_grid == grid
    assert FlowMatching(token_shift={"kind": "sqrt", "base_tokens": 4}).token_shift == (
        SqrtTokenShift(base_tokens=4)
    )


def test_mistakes():
    x_0, noise = pair()
    with pytest.raises(ValueError, match=r"x_0 is .* but noise is"):
        FlowMatching().add_noise(x_0, noise[:1], torch.rand(2))
    with pytest.raises(ValueError, match="t has shape"):
        FlowMatching().add_noise(x_0, noise, torch.rand(5))
