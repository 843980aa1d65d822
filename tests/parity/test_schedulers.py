"""Our samplers, grids, schedules and loss weights against diffusers' schedulers.

Trajectories are whole ones of one fixed toy network; within 1e-4 of the largest value.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from dit.grids import (
    ExponentialTokenShift,
    FlowMatchEulerGrid,
    KarrasGrid,
    ShiftedGrid,
    WanGrid,
)
from dit.objective import DDPM, FlowMatching
from dit.samplers import ddim, dpmpp_2m, euler, heun, run_sampler

# diffusers' own, about NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (3, 2, 4, 4)
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
THEIRS = {"noise": "epsilon", "v": "v_prediction", "x_0": "sample", "velocity": "flow_prediction"}
SCHEDULES = pytest.mark.parametrize("schedule", BETAS)
PREDICTIONS = pytest.mark.parametrize("prediction", ["noise", "v", "x_0"])


def network(x, t):
    """Nonlinear in x and t, the same for both sides; t is 0 .. 1."""
    return torch.sin(2 * x) * (0.5 + t.view(-1, 1, 1, 1, 1)) + 0.3 * x


def noise_network(x, t):
    """Near t = 1 it says x, without which a prediction of the noise blows trajectories up."""
    t = t.view(-1, 1, 1, 1, 1)
    return t * x + (1.005 - t) * torch.sin(3 * x)


def network_for(objective):
    return noise_network if objective.prediction == "noise" else network


def is_noise(scheduler):
    return scheduler.config.get("prediction_type") == "epsilon"


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@pytest.fixture
def noise():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))


def theirs(scheduler, x, to_t, generator=None):
    """A diffusers pipeline's loop; to_t turns its timesteps into ours."""
    network_used = noise_network if is_noise(scheduler) else network
    options = {} if generator is None else {"generator": generator}
    for step in scheduler.timesteps:
        pred = network_used(x, to_t(step).float().expand(len(x)))
        x = scheduler.step(pred, step, x, **options).prev_sample
    return x


def assert_equal_trajectories(got, expected, tolerance=1e-4):
    assert expected.isfinite().all()
    assert 0.05 < expected.std() < 100
    assert (got - expected).abs().max() / expected.abs().max() < tolerance


def ours(name, objective, noise, num_steps, **options):
    return run_sampler(
        name,
        network_for(objective),
        generators(),
        SHAPE,
        num_steps,
        objective,
        noise=noise,
        **options,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 12, 50])
def test_euler_as_pipelines_call_it(noise, shift, num_steps):
    """SD3's and Flux's pipelines hand over linspace(1, 1 / n, n), which the scheduler shifts."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    objective = FlowMatching(shift=shift)
    torch.testing.assert_close(scheduler.sigmas, objective.grid(num_steps), atol=1e-6, rtol=0)
    got = ours("euler", objective, noise, num_steps)
    assert_equal_trajectories(got, theirs(scheduler, noise, lambda t: t / 1000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 12, 50])
def test_euler_and_heun_on_their_own_steps(noise, shift, num_steps):
    objective = FlowMatching(shift=shift, step_grid=FlowMatchEulerGrid())
    for name, kind in (
        ("euler", FlowMatchEulerDiscreteScheduler),
        ("heun", FlowMatchHeunDiscreteScheduler),
    ):
        scheduler = kind(shift=shift)
        scheduler.set_timesteps(num_steps)
        # Heun's stops are each listed twice, but for the first and the last.
        sigmas = scheduler.sigmas.unique_consecutive()
        assert torch.equal(sigmas, objective.grid(num_steps))
        got = ours(name, objective, noise, num_steps)
        assert_equal_trajectories(got, theirs(scheduler, noise, lambda t: t / 1000))


def test_shift_from_tokens(noise):
    """Flux: mu from the number of tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    objective = FlowMatching(token_shift=ExponentialTokenShift())
    for num_tokens in (256, 1024, 9000):
        mu = calculate_shift(num_tokens)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10), mu=mu)
        stops = objective.grid(10, num_tokens=num_tokens)
        torch.testing.assert_close(scheduler.sigmas, stops, atol=1e-6, rtol=0)
        got = ours("euler", objective, noise, 10, num_tokens=num_tokens)
        assert_equal_trajectories(got, theirs(scheduler, noise, lambda t: t / 1000))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 20, 50])
def test_unipc_as_wan_uses_it(noise, shift, num_steps):
    """Whole timesteps for the network, and the same sigmas but for one unit in the last place."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    objective = FlowMatching(shift=shift, network_steps=1000, step_grid=WanGrid())
    stops = objective.grid(num_steps)
    torch.testing.assert_close(scheduler.sigmas, stops, atol=1e-7, rtol=0)
    told = (objective.network_t(stops[:-1]) * 1000).round().long()
    assert torch.equal(told, scheduler.timesteps)
    got = ours("unipc", objective, noise, num_steps)
    assert_equal_trajectories(got, theirs(scheduler, noise, lambda t: t / 1000))


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
def test_unipc_on_karras_steps(noise, prediction):
    scheduler = UniPCMultistepScheduler(
        prediction_type=THEIRS[prediction],
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_min=0.01,
        sigma_max=40.0,
    )
    scheduler.set_timesteps(15)
    grid = KarrasGrid(sigma_min=0.01, sigma_max=40.0)
    objective = FlowMatching(prediction=prediction, network_steps=1000)
    torch.testing.assert_close(
        scheduler.sigmas, objective.grid(15, grid=grid), atol=1e-6, rtol=1e-6
    )
    got = ours("unipc", objective, noise, 15, grid=grid)
    assert_equal_trajectories(got, theirs(scheduler, noise, lambda t: t / 1000))


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 12, 40])
def test_dpmpp_2m_on_flow(noise, prediction, shift, num_steps):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=THEIRS[prediction], use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    objective = FlowMatching(prediction=prediction)
    got = ours("dpmpp_2m", objective, noise, num_steps, grid=scheduler.sigmas)
    # The network is told the sigma itself: theirs also rounds down, which test_unipc covers.
    expected = theirs(scheduler, noise, lambda _: scheduler.sigmas[scheduler.step_index or 0])
    assert_equal_trajectories(got, expected)


def vp_scheduler(kind, prediction, schedule, **options):
    return kind(
        **BETAS[schedule],
        prediction_type=THEIRS[prediction],
        timestep_spacing="trailing",
        **options,
    )


def vp_stops(scheduler):
    """Its step index k is our t = (k + 1) / 1000."""
    return torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])


def vp_timesteps(stops):
    return ((stops[:-1] * 1000).round().long() - 1).tolist()


def vp_t(step):
    return (step + 1) / 1000


@SCHEDULES
def test_ddpm_schedules(schedule):
    scheduler = vp_scheduler(DDPMScheduler, "v", schedule)
    alpha_bar = DDPM(schedule=schedule).alpha_bar()[1:].float()
    torch.testing.assert_close(scheduler.alphas_cumprod, alpha_bar, atol=1e-6, rtol=1e-3)
    betas = rescale_zero_terminal_snr(scheduler.betas.double())
    theirs_rescaled = torch.cumprod(1 - betas, 0)
    ours_rescaled = DDPM(schedule=schedule, zero_terminal_snr=True).alpha_bar()[1:]
    assert not torch.equal(ours_rescaled.float(), alpha_bar)
    torch.testing.assert_close(theirs_rescaled, ours_rescaled, atol=1e-6, rtol=1e-3)


# DDIM steps by 1000 // n, and so is exact for divisors only.
@PREDICTIONS
@SCHEDULES
@pytest.mark.parametrize("num_steps", [1, 20, 50])
def test_ddim(noise, prediction, schedule, num_steps):
    scheduler = vp_scheduler(DDIMScheduler, prediction, schedule, clip_sample=False)
    scheduler.set_timesteps(num_steps)
    objective, stops = DDPM(prediction=prediction, schedule=schedule), vp_stops(scheduler)
    if prediction != "noise" or schedule != "cosine":
        assert torch.equal(stops, objective.grid(num_steps))
    got = ddim(network_for(objective), noise, stops, objective)
    assert_equal_trajectories(got, theirs(scheduler, noise, vp_t))


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@SCHEDULES
def test_ddim_with_zero_terminal_snr(noise, prediction, schedule):
    scheduler = vp_scheduler(
        DDIMScheduler, prediction, schedule, clip_sample=False, rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(25)
    objective = DDPM(prediction=prediction, schedule=schedule, zero_terminal_snr=True)
    got = ours("ddim", objective, noise, 25)
    assert_equal_trajectories(got, theirs(scheduler, noise, vp_t))


@PREDICTIONS
@SCHEDULES
@pytest.mark.parametrize("num_steps", [2, 40])
def test_ancestral(noise, prediction, schedule, num_steps):
    """The same generators, so the same fresh noise at every step."""
    scheduler = vp_scheduler(DDPMScheduler, prediction, schedule, clip_sample=False)
    objective = DDPM(prediction=prediction, schedule=schedule)
    stops = objective.grid(num_steps)
    scheduler.set_timesteps(timesteps=vp_timesteps(stops))
    got = ours("ancestral", objective, noise, num_steps)
    assert_equal_trajectories(got, theirs(scheduler, noise, vp_t, generators()))
    without = ddim(network_for(objective), noise, stops, objective)
    assert (got - without).abs().max() / got.abs().max() > 0.1


@PREDICTIONS
@SCHEDULES
@pytest.mark.parametrize("num_steps", [1, 2, 12, 40])
def test_dpmpp_2m_on_ddpm(noise, prediction, schedule, num_steps):
    scheduler = vp_scheduler(DPMSolverMultistepScheduler, prediction, schedule)
    objective = DDPM(prediction=prediction, schedule=schedule)
    scheduler.set_timesteps(timesteps=vp_timesteps(objective.grid(num_steps)))
    got = ours("dpmpp_2m", objective, noise, num_steps)
    assert_equal_trajectories(got, theirs(scheduler, noise, vp_t))


def test_euler_and_heun_are_not_the_same(noise):
    """What the equalities above could not tell apart if the toy network were too tame."""
    objective = FlowMatching()
    stops = objective.grid(12)
    ends = [sampler(network, noise, stops, objective) for sampler in (euler, heun, dpmpp_2m)]
    for index, end in enumerate(ends):
        for other in ends[:index]:
            assert (end - other).abs().max() / end.abs().max() > 2e-3


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap", "uniform"])
def test_flow_loss_weights(weighting):
    """sigma_sqrt is held below t = 0.05, where theirs goes on growing."""
    t = torch.linspace(0.05, 1, 50)
    expected = compute_loss_weighting_for_sd3(weighting, t)
    assert (weighting == "uniform") == bool((expected == 1).all())
    got = FlowMatching(weighting=weighting).loss_weight(t)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@PREDICTIONS
@SCHEDULES
def test_min_snr_weights(prediction, schedule):
    scheduler = vp_scheduler(DDPMScheduler, prediction, schedule)
    steps = torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, steps)
    weight = torch.minimum(snr, torch.tensor(5.0))
    expected = weight / {"noise": snr, "v": snr + 1, "x_0": torch.ones(())}[prediction]
    objective = DDPM(prediction=prediction, schedule=schedule, min_snr_gamma=5.0)
    got = objective.loss_weight(vp_t(steps))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)


def test_the_shifted_grid_is_not_wans():
    """Close enough to be taken for each other, and too far for 1e-4."""
    flow = FlowMatching(shift=3.0)
    grids = [flow.grid(20, grid=grid) for grid in (ShiftedGrid(), WanGrid(), FlowMatchEulerGrid())]
    for index, stops in enumerate(grids):
        for other in grids[:index]:
            assert 5e-4 < (stops - other).abs().max() < 0.2
