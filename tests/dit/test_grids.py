"""Step grids as data, the shift of t, and the shift from the number of tokens."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from dit.grids import (
    ExponentialTokenShift,
    FlowMatchEulerGrid,
    GridConfig,
    KarrasGrid,
    ShiftedGrid,
    SqrtTokenShift,
    TokenShift,
    UniformGrid,
    WanGrid,
    checked_shift,
    shift_t,
)
from dit.objective import DDPM, FlowMatching

GRIDS = [UniformGrid(), ShiftedGrid(), KarrasGrid(), WanGrid(), FlowMatchEulerGrid()]
KINDS = [grid.kind for grid in GRIDS]
DDPM_GRIDS = [UniformGrid(), ShiftedGrid(shift=3.0), KarrasGrid()]


def test_every_kind_is_tested():
    union, _ = get_args(GridConfig)
    assert {type(grid) for grid in GRIDS} == set(get_args(union))
    for config in (GridConfig, TokenShift):
        adapter = TypeAdapter(config)
        for example in get_args(get_args(config)[0]):
            values = {"kind": example.model_fields["kind"].default}
            if example is SqrtTokenShift:
                values["base_tokens"] = 100
            assert type(adapter.validate_python(values)) is example


@given(shift=st.floats(0.1, 10), t=st.floats(0, 1))
def test_shift_keeps_the_ends_and_inverts(shift, t):
    t_tensor = torch.tensor(t, dtype=torch.float64)
    back = shift_t(shift_t(t_tensor, shift), 1 / shift)
    assert abs(back - t_tensor) < 1e-9
    assert abs(shift_t(torch.tensor(1.0), shift) - 1) < 1e-6
    assert shift_t(torch.tensor(0.0), shift) == 0


@pytest.mark.parametrize("grid", GRIDS, ids=KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_grids_fall_from_noise_to_data(grid, num_steps, shift):
    stops = FlowMatching(shift=shift, step_grid=grid).grid(num_steps)
    assert stops.shape == (num_steps + 1,)
    assert stops.dtype == torch.float32
    assert 0.98 < stops[0] <= 1
    assert stops[-1] == 0
    assert (stops.diff() < 0).all()
    given_now = FlowMatching(shift=shift).grid(num_steps, grid=grid)
    assert torch.equal(given_now, stops)


@pytest.mark.parametrize("grid", DDPM_GRIDS, ids=[grid.kind for grid in DDPM_GRIDS])
@pytest.mark.parametrize("num_steps", [1, 2, 20, 50, 333, 990])
@pytest.mark.parametrize("objective", [DDPM(), DDPM(prediction="noise", schedule="linear")])
def test_ddpm_grids_stop_at_training_steps(grid, num_steps, objective):
    stops = objective.grid(num_steps, grid=grid)
    steps = stops.double() * 1000
    assert stops.shape == (num_steps + 1,)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert (steps.round().diff() <= -1).all()
    assert stops[-1] == 0
    assert 0.9 < stops[0] <= 1


def test_the_formulas():
    flow = FlowMatching(shift=3.0)
    assert flow.grid(4, grid=UniformGrid()).tolist() == [1, 0.75, 0.5, 0.25, 0]
    even = torch.linspace(1, 0, 5)
    torch.testing.assert_close(flow.grid(4), 3 * even / (1 + 2 * even))
    torch.testing.assert_close(flow.grid(4, 5.0), 5 * even / (1 + 4 * even))
    assert torch.equal(flow.grid(4, grid=ShiftedGrid(shift=5.0)), flow.grid(4, 5.0))
    stops = flow.grid(3, grid=KarrasGrid(sigma_min=0.1, sigma_max=10.0, rho=2.0))
    ratios = [10.0, ((10**0.5 + 0.1**0.5) / 2) ** 2, 0.1]
    torch.testing.assert_close(stops[:-1] / (1 - stops[:-1]), torch.tensor(ratios))
    ddpm = DDPM(schedule="linear")
    alpha, sigma = ddpm.alpha_sigma(
        ddpm.grid(3, grid=KarrasGrid(sigma_min=0.1, sigma_max=10.0))[:-1]
    )
    ratios = [10.0, ((10 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7, 0.1]
    torch.testing.assert_close(sigma / alpha, torch.tensor(ratios), rtol=0.05, atol=0)


def test_an_explicit_shift_replaces_the_saved_one():
    saved = FlowMatching(shift=2.0, step_grid=ShiftedGrid(shift=5.0))
    assert torch.equal(saved.grid(4), FlowMatching().grid(4, 5.0))
    assert torch.equal(saved.grid(4, 3.0), FlowMatching().grid(4, 3.0))
    by_tokens = FlowMatching(token_shift=SqrtTokenShift(base_tokens=100))
    assert torch.equal(by_tokens.grid(4, 3.0), FlowMatching().grid(4, 3.0))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_wan_stops_keep_their_whole_timestep(shift):
    """floor(1000 t) from float32 stops equals it from the float64 ones, where rounding would not."""
    objective = FlowMatching(shift=shift, network_steps=1000, step_grid=WanGrid())
    plain_differs = 0
    for num_steps in range(1, 101):
        exact = np.linspace(1, 1 / 1000, num_steps + 1)[:-1]
        exact = shift * exact / (1 + (shift - 1) * exact)
        exact[0] -= 1e-6
        stops = objective.grid(num_steps)[:-1]
        np.testing.assert_allclose(stops.numpy(), exact, rtol=0, atol=1e-7)
        told = (objective.network_t(stops) * 1000).round().long().numpy()
        assert np.array_equal(told, (exact * 1000).astype(np.int64))
        rounded = np.floor(exact.astype(np.float32).astype(np.float64) * 1000)
        plain_differs += not np.array_equal(told, rounded)
    assert plain_differs > 10 or shift != 1


@pytest.mark.parametrize("grid", [ShiftedGrid(), WanGrid(), FlowMatchEulerGrid()])
@pytest.mark.parametrize("shift", [1e-3, 1e3])
def test_the_farthest_shifts(grid, shift):
    stops = FlowMatching().grid(50, checked_shift(shift), grid=grid)
    assert (stops.diff() < 0).all()
    for beyond in (shift / 2 if shift < 1 else shift * 2, math.nan):
        with pytest.raises(ValueError, match=r"shift=.*; use 0.001 to 1000, 1 for none"):
            checked_shift(beyond)


def test_shift_from_tokens():
    exponential, sqrt = ExponentialTokenShift(), SqrtTokenShift(base_tokens=1024)
    tokens = torch.tensor([256, 4096, 8192])
    torch.testing.assert_close(
        exponential.factor(tokens).log(),
        torch.tensor([0.5, 1.15, 0.5 + 0.65 * 7936 / 3840], dtype=torch.float64),
    )
    torch.testing.assert_close(
        sqrt.factor(tokens), torch.tensor([0.5, 2, 8**0.5], dtype=torch.float64)
    )
    flow = FlowMatching(shift=1.5, token_shift=sqrt, t_distribution="uniform")
    u = torch.tensor([0.2, 0.5, 0.7])
    per_clip = flow.sample_t(u, tokens)
    torch.testing.assert_close(per_clip[1], shift_t(u[1], 3.0))
    for index, count in enumerate(tokens.tolist()):
        torch.testing.assert_close(flow.sample_t(u, count)[index], per_clip[index])
    frames = flow.sample_t(u[:, None].expand(3, 4), tokens)
    torch.testing.assert_close(frames, per_clip[:, None].expand(3, 4))
    assert torch.equal(flow.grid(5, num_tokens=4096), FlowMatching().grid(5, 3.0))
    assert torch.equal(DDPM().sample_t(u, 4096), DDPM().sample_t(u))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (UniformGrid, {"shift": 2.0}),
        (ShiftedGrid, {"shift": 0}),
        (ShiftedGrid, {"shift": math.inf}),
        (ShiftedGrid, {"shift": 1e-300}),
        (WanGrid, {"shift": 1e-4}),
        (FlowMatchEulerGrid, {"shift": 1e4}),
        (KarrasGrid, {"sigma_min": 3.0, "sigma_max": 2.0}),
        (KarrasGrid, {"sigma_min": 0.0}),
        (KarrasGrid, {"rho": -1}),
        (WanGrid, {"num_train_steps": 1}),
        (FlowMatchEulerGrid, {"num_train_steps": 0}),
        (ExponentialTokenShift, {"base_tokens": 4096}),
        (ExponentialTokenShift, {"base_mu": math.nan}),
        (SqrtTokenShift, {}),
        (SqrtTokenShift, {"base_tokens": 0}),
    ],
)
def test_malformed_configs(config: type[BaseModel], wrong):
    with pytest.raises(ValidationError):
        config(**wrong)


def test_mistakes():
    flow, ddpm = FlowMatching(), DDPM()
    for shift in (0, -1.0, float("nan"), math.inf):
        with pytest.raises(ValueError, match="use a number above 0"):
            flow.grid(10, shift)
    for objective, arguments, message in (
        (flow, {"shift": 3.0, "grid": UniformGrid()}, "the uniform grid has no shift"),
        (flow, {"shift": 3.0, "grid": KarrasGrid()}, "the karras grid has no shift"),
        (flow, {"shift": 3.0, "grid": torch.zeros(11)}, "the given grid has no shift"),
        (flow, {"shift": 3.0, "grid": ShiftedGrid(shift=2.0)}, "a grid with shift=2.0; leave one"),
        (ddpm, {"shift": 3.0}, "DDPM has no shift"),
        (ddpm, {"grid": ShiftedGrid()}, "no shift of its own"),
        (ddpm, {"grid": WanGrid()}, "grid wan is for flow matching; use uniform or karras"),
        (ddpm, {"grid": FlowMatchEulerGrid()}, "grid flow_match_euler is for flow matching"),
        (ddpm, {"grid": torch.linspace(0.001, 0, 11)}, "at least 1/1000 apart"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.grid(10, **arguments)
    with pytest.raises(ValueError, match="use 1000 or fewer"):
        ddpm.grid(1001)
    with pytest.raises(ValueError, match=r"num_steps=1000 but this DDPM has 9\d\d steps"):
        DDPM(prediction="noise").grid(1000)
    by_tokens = FlowMatching(token_shift=SqrtTokenShift(base_tokens=100))
    with pytest.raises(ValueError, match="pass num_tokens"):
        by_tokens.grid(10)
    with pytest.raises(ValueError, match="pass num_tokens"):
        by_tokens.sample_t(torch.rand(4))
    with pytest.raises(ValueError, match="num_tokens=0; a clip has 1 or more"):
        by_tokens.grid(10, num_tokens=0)
    with pytest.raises(ValueError, match="one per clip"):
        by_tokens.sample_t(torch.rand(4), torch.tensor([5, 6]))
