"""Frames that are known, beside or inside a clip, against what they are by other ways."""

import pytest
import torch

from dit.conditions import (
    BesideFrames,
    keyframe_position,
    reference_position,
    with_held_frames,
    with_known_region,
)
from dit.flow import FlowMatching
from dit.objective import DDPM
from dit.samplers import DDPM_SAMPLERS, FLOW_SAMPLERS, run_sampler
from dit.transformer import DiT, DiTConfig


@pytest.fixture
def dit():
    torch.manual_seed(0)
    config = DiTConfig(in_channels=4, context_dim=8, dim=48, num_blocks=2, num_heads=4, mlp_dim=64)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(frames=3):
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(s, generator=generator) for s in ((2, 4, frames, 4, 4), (2, 5, 8)))
    return x, torch.rand(2, frames, generator=generator), context


def test_a_frame_beside_is_a_frame_of_a_longer_clip(dit):
    """Where its position is the next one; and its position matters."""
    x, t, context = inputs(4)
    whole = dit(x, t, context)
    at = torch.full((2, 1), 3.0)
    last = BesideFrames(x[:, :, 3:], t[:, 3:], at)
    torch.testing.assert_close(dit(x[:, :, :3], t[:, :3], context, beside=last), whole[:, :, :3])
    elsewhere = BesideFrames(x[:, :, 3:], t[:, 3:], at + 0.5)
    other = dit(x[:, :, :3], t[:, :3], context, beside=elsewhere)
    assert (other - whole[:, :, :3]).abs().max() > 1e-3


def test_frames_beside_have_an_order(dit):
    """Two references that change places are two other subjects."""
    x, t, context = inputs()
    pictures = torch.randn(2, 4, 2, 4, 4)
    places = torch.tensor([[reference_position(0), reference_position(1)]] * 2).float()
    one = dit(x, t, context, beside=BesideFrames(pictures, torch.zeros(2, 2), places))
    moved = BesideFrames(pictures.flip(2), torch.zeros(2, 2), places.flip(1))
    torch.testing.assert_close(dit(x, t, context, beside=moved), one)
    swapped = BesideFrames(pictures.flip(2), torch.zeros(2, 2), places)
    assert (dit(x, t, context, beside=swapped) - one).abs().max() > 1e-3


def test_one_noise_level_for_the_clip(dit):
    x, _, context = inputs()
    beside = BesideFrames(x[:, :, :1], torch.zeros(2, 1), torch.full((2, 1), -16.0))
    level = torch.tensor([0.3, 0.7])
    each = dit(x, level[:, None].expand(2, 3), context, beside=beside)
    torch.testing.assert_close(dit(x, level, context, beside=beside), each)


@pytest.mark.parametrize(
    ("latents", "levels"),
    [((2, 4, 1, 4, 2), (2, 1)), ((1, 4, 1, 4, 4), (1, 1)), ((2, 4, 2, 4, 4), (2, 1))],
)
def test_frames_beside_that_do_not_fit(dit, latents, levels):
    x, t, context = inputs()
    beside = BesideFrames(torch.zeros(latents), torch.zeros(levels), torch.zeros(levels))
    with pytest.raises(
        ValueError, match=r"frames beside the clip have shape .*; expected \(2 4 k 4 4\)"
    ):
        dit(x, t, context, beside=beside)


def test_keyframes_lie_among_the_frames_of_their_latent_frame():
    assert keyframe_position(0, 4) == 0
    for latent in (1, 2, 5):
        places = [keyframe_position(frame, 4) for frame in range(4 * latent - 3, 4 * latent + 1)]
        assert sum(places) / 4 == latent
        assert latent - 0.5 < places[0] < places[-1] < latent + 0.5


@pytest.mark.parametrize("objective", [FlowMatching(shift=2.0), DDPM()], ids=["flow", "ddpm"])
@pytest.mark.parametrize("held", [(0,), (0, 2), (1,)])
def test_held_frames_are_seen_as_they_are_at_every_step(objective, held):
    """Whatever the sampler makes of them, in all samplers."""
    known = torch.randn(2, 4, 3, 2, 2)
    levels = torch.full((2, 3), torch.nan)
    levels[:, list(held)] = 0.25
    free = [frame for frame in range(3) if frame not in held]

    def check(x, t):
        torch.testing.assert_close(x[:, :, list(held)], known[:, :, list(held)])
        assert (t[:, list(held)] == 0.25).all()
        assert (t[:, free] == t[:, free[:1]]).all()
        return 0.1 * x

    names = FLOW_SAMPLERS if isinstance(objective, FlowMatching) else DDPM_SAMPLERS
    for name in names:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        denoise = with_held_frames(check, known, levels)
        run_sampler(name, denoise, generators, (4, 3, 2, 2), 4, objective)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_a_known_region_ends_as_it_is_known(name):
    """And elsewhere the sample is what the network makes of it, with the region in sight."""
    objective = FlowMatching()
    x_0, noise = torch.randn(2, 1, 4, 3, 4, 4)
    known = torch.zeros(1, 1, 3, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    seen = []

    def denoise(x, t):
        path = objective.add_noise(x_0, noise, t)
        seen.append(t.item())
        torch.testing.assert_close(x[..., :2], path[..., :2], atol=1e-4, rtol=1e-4)
        return torch.zeros_like(x)

    generators = [torch.Generator().manual_seed(0)]
    sample = run_sampler(
        name,
        with_known_region(denoise, objective, x_0, noise, known),
        generators,
        (4, 3, 4, 4),
        6,
        objective,
        noise=noise,
    )
    torch.testing.assert_close(sample[..., :2], x_0[..., :2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample[..., 2:], noise[..., 2:], atol=1e-4, rtol=1e-4)
    assert len(seen) >= 6
