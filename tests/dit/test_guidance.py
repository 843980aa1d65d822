"""Guidance against its formulas, against diffusers' guiders, and by what it costs."""

import math

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.guiders.guider_utils import rescale_noise_cfg
from pydantic import ValidationError

from dit.conditions import BesideFrames
from dit.guidance import GuidanceConfig, guided_denoiser, rescaled
from dit.objective import DDPM, FlowMatching

EVERY_KIND = [
    GuidanceConfig(scale=3.0),
    GuidanceConfig(scale=3.0, rescale=0.7),
    GuidanceConfig(kind="cfg_zero", scale=3.0, zero_steps=0),
    GuidanceConfig(kind="apg", scale=3.0, parallel=0.3, max_norm=2.0),
]


def texts(m_negative=5, mask_from=5):
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(5).expand(2, 5) < mask_from
    text = torch.randn(2, 5, 12, generator=g), mask
    negative = torch.randn(2, m_negative, 12, generator=g), None
    return text, negative


def noisy(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, 4, 4, generator=g), torch.full((2,), 0.6)


@pytest.fixture
def dit(dit):
    """One that listens to its text."""
    for block in dit.blocks:
        block.cross_attention.out.weight.data *= 10
        block.cross_attention.v.weight.data *= 10
    return dit


@pytest.fixture
def calls(dit):
    """Batch sizes that the DiT was called with."""
    sizes = []
    dit.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def predictions(dit, text, negative, x, t):
    return dit(x, t, *text), dit(x, t, *negative)


@torch.no_grad()
def test_cfg_is_its_formula_and_diffusers(dit):
    (text, negative), (x, t) = texts(), noisy()
    positive, away = predictions(dit, text, negative, x, t)
    got = guided_denoiser(dit, text, negative, 3.0)(x, t)
    torch.testing.assert_close(got, away + 3 * (positive - away), atol=1e-5, rtol=1e-5)
    theirs = ClassifierFreeGuidance(guidance_scale=3.0).forward(positive, away).pred
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-5)
    assert (got - positive).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("guidance", EVERY_KIND)
@pytest.mark.parametrize("per_frame", [False, True])
def test_one_after_the_other_equals_one_batch(dit, calls, guidance, per_frame):
    (text, negative), (x, t) = texts(m_negative=3, mask_from=4), noisy()
    t = torch.tensor([[0.0, 0.6, 0.6]]).expand(2, 3) if per_frame else t
    together = guided_denoiser(dit, text, negative, guidance)
    apart = guided_denoiser(dit, text, negative, guidance.model_copy(update={"sequential": True}))
    for _ in range(2):  # APG's second step has momentum
        expected = together(x, t)
        torch.testing.assert_close(apart(x, t), expected, atol=1e-5, rtol=1e-5)
    assert calls == [4, 2, 2, 4, 2, 2]
    assert together.num_evaluations == apart.num_evaluations == 8
    assert expected.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cfg", "cfg_zero", "apg"])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_scale_of_one_is_no_guidance_and_costs_one_evaluation(dit, calls, kind, sequential):
    (text, negative), (x, t) = texts(), noisy()
    guidance = GuidanceConfig(kind=kind, scale=1.0, rescale=0.5, sequential=sequential)
    denoise = guided_denoiser(dit, text, negative, guidance)
    got = denoise(x, t)
    assert calls == [2]
    torch.testing.assert_close(got, dit(x, t, *text), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cfg", "apg"])
def test_just_above_one_is_nearly_no_guidance(dit, kind):
    (text, negative), (x, t) = texts(), noisy()
    guidance = GuidanceConfig(kind=kind, scale=1 + 1e-6)
    got = guided_denoiser(dit, text, negative, guidance)(x, t)
    torch.testing.assert_close(got, dit(x, t, *text), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_guidance_keeps_to_its_interval(dit, calls, sequential):
    (text, negative), (x, _) = texts(), noisy()
    guidance = GuidanceConfig(scale=3.0, interval=(0.3, 0.8), sequential=sequential)
    denoise = guided_denoiser(dit, text, negative, guidance)
    full = guided_denoiser(dit, text, negative, 3.0)
    for level, inside in ((1.0, False), (0.8, True), (0.5, True), (0.3, True), (0.29, False)):
        calls.clear()
        t = torch.full((2,), level)
        got = denoise(x, t)
        assert calls == ([2, 2] if sequential else [4]) if inside else [2]
        expected = full(x, t) if inside else dit(x, t, *text)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_noisiest_frame_decides_on_the_interval(dit, calls):
    (text, negative), (x, _) = texts(), noisy()
    guidance = GuidanceConfig(scale=3.0, interval=(0.3, 0.8))
    denoise = guided_denoiser(dit, text, negative, guidance)
    denoise(x, torch.tensor([[0.0, 0.5, 0.5]]).expand(2, 3))
    denoise(x, torch.tensor([[0.0, 0.9, 0.9]]).expand(2, 3))
    assert calls == [4, 2]


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescale_equals_diffusers(share):
    guided, positive = 3 * torch.randn(2, 4, 3, 4, 4) + 1, torch.randn(2, 4, 3, 4, 4)
    got = rescaled(guided, positive, share)
    theirs = rescale_noise_cfg(guided, positive, share)
    torch.testing.assert_close(got, theirs, atol=1e-6, rtol=1e-5)
    if share == 1:
        dims = (1, 2, 3, 4)
        torch.testing.assert_close(got.std(dims), positive.std(dims), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rescaled_guidance_equals_diffusers(dit):
    (text, negative), (x, t) = texts(), noisy()
    pair = predictions(dit, text, negative, x, t)
    got = guided_denoiser(dit, text, negative, GuidanceConfig(scale=4.0, rescale=0.7))(x, t)
    theirs = ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.7).forward(*pair).pred
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-5)
    assert (got - guided_denoiser(dit, text, negative, 4.0)(x, t)).abs().max() > 0.01


@torch.no_grad()
def test_cfg_zero_equals_diffusers(dit, calls):
    (text, negative), (x, _) = texts(), noisy()
    denoise = guided_denoiser(
        dit, text, negative, GuidanceConfig(kind="cfg_zero", scale=3.0, zero_steps=2)
    )
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=2)
    for step, level in enumerate((1.0, 0.9, 0.7, 0.2)):
        t = torch.full((2,), level)
        guider.set_state(step=step, num_inference_steps=4, timestep=t)
        pair = predictions(dit, text, negative, x, t)
        calls.clear()
        got = denoise(x, t)
        assert calls == ([] if step < 2 else [4])  # standing still costs nothing
        torch.testing.assert_close(got, guider.forward(*pair).pred, atol=1e-5, rtol=1e-5)
    assert got.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("momentum", "parallel", "max_norm"), [(0.0, 1.0, None), (-0.5, 0.3, 2.0)])
def test_apg_equals_diffusers(dit, momentum, parallel, max_norm):
    """diffusers adds scale times the update to the positive prediction; the paper scale - 1 times."""
    text, negative = texts()
    guidance = GuidanceConfig(
        kind="apg", scale=3.0, momentum=momentum, parallel=parallel, max_norm=max_norm
    )
    denoise = guided_denoiser(dit, text, negative, guidance)
    guider = AdaptiveProjectedGuidance(
        guidance_scale=3.0 - 1,
        adaptive_projected_guidance_rescale=max_norm or 0.0,
        eta=parallel,
        use_original_formulation=True,
    )
    guider.momentum_buffer = MomentumBuffer(momentum)
    for step, level in enumerate((1.0, 0.7, 0.2)):
        x, t = noisy(seed=step)[0], torch.full((2,), level)
        pair = predictions(dit, text, negative, x, t)
        torch.testing.assert_close(denoise(x, t), guider.forward(*pair).pred, atol=1e-5, rtol=1e-4)
    plain = guided_denoiser(dit, text, negative, 3.0)(x, t)
    difference = (denoise(x, t) - plain).abs().max()
    assert difference < 1e-4 if parallel == 1 else difference > 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(),
        FlowMatching(prediction="x_0"),
        DDPM(prediction="v"),
        DDPM(prediction="noise"),
    ],
)
def test_apg_holds_back_what_is_parallel_to_the_data(dit, objective):
    """With the objective known: the guided data's change has no part along the predicted data."""
    (text, negative), (x, t) = texts(), noisy()
    guidance = GuidanceConfig(kind="apg", scale=3.0, momentum=0.0)
    got = guided_denoiser(dit, text, negative, guidance, objective=objective)(x, t)
    positive, away = (
        objective.x_0_and_noise(p, x, t)[0] for p in predictions(dit, text, negative, x, t)
    )
    guided = objective.x_0_and_noise(got, x, t)[0]
    change = (guided - positive).flatten(1)
    assert change.norm(dim=1).min() > 0.1
    cosine = torch.cosine_similarity(change, positive.flatten(1))
    assert cosine.abs().max() < 1e-4
    plain = 2 * (positive - away).flatten(1)
    assert torch.cosine_similarity(plain, positive.flatten(1)).abs().max() > 1e-2


@torch.no_grad()
def test_apg_with_everything_kept_is_cfg_in_either_space(dit):
    (text, negative), (x, _) = texts(), noisy()
    t = torch.tensor([[0.0, 0.6, 0.3]]).expand(2, 3)
    guidance = GuidanceConfig(kind="apg", scale=3.0, momentum=0.0, parallel=1.0)
    expected = guided_denoiser(dit, text, negative, 3.0)(x, t)
    got = guided_denoiser(dit, text, negative, guidance, objective=FlowMatching())(x, t)
    torch.testing.assert_close(got[:, :, 1:], expected[:, :, 1:], atol=1e-4, rtol=1e-4)
    assert got.isfinite().all()


@torch.no_grad()
def test_a_new_run_forgets_the_momentum(dit):
    (text, negative), (x, t) = texts(), noisy()
    guidance = GuidanceConfig(kind="apg", scale=3.0)
    first = guided_denoiser(dit, text, negative, guidance)
    begun, went_on = first(x, t), first(x, t)
    assert torch.equal(guided_denoiser(dit, text, negative, guidance)(x, t), begun)
    assert (went_on - begun).abs().max() > 1e-2


@torch.no_grad()
def test_keys_and_values_are_projected_once_for_a_sampling_run(dit):
    (text, negative), (x, t) = texts(), noisy()
    projected = []
    for block in dit.blocks:
        block.cross_attention.k.register_forward_hook(lambda *_: projected.append(1))
    denoise = guided_denoiser(dit, text, negative, 3.0)
    for _ in range(3):
        denoise(x, t)
    assert len(projected) == len(dit.blocks)


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_feature_reuse_with_guidance_and_an_interval(dit, sequential):
    (text, negative), (x, t) = texts(), noisy()
    guidance = GuidanceConfig(scale=3.0, interval=(0.0, 0.8), sequential=sequential)
    denoise = guided_denoiser(dit, text, negative, guidance, reuse_threshold=10.0)
    denoise(x, torch.ones(2))  # the positive text alone
    denoise(x, t)  # and now the negative one for the first time
    denoise(x, t)
    assert sum(reuse.num_evaluated for reuse in denoise.reuse) == 4
    assert sum(reuse.num_skipped for reuse in denoise.reuse) == 2 + 4
    exact = guided_denoiser(dit, text, negative, guidance, reuse_threshold=0.0)
    plain = guided_denoiser(dit, text, negative, guidance)
    for level in (1.0, 0.6, 0.6):
        t = torch.full((2,), level)
        assert torch.equal(exact(x, t), plain(x, t))


def beside(*positions):
    g = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, len(positions), 4, 4, generator=g)
    return BesideFrames(latents, torch.zeros(2, len(positions)), torch.tensor([positions] * 2))


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_references_have_a_scale_of_their_own(dit, calls, sequential, scale):
    """InstructPix2Pix, eq. 3: e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0)), where what
    stands beside the clip and is no reference is always there."""
    (text, negative), (x, t) = texts(), noisy()
    pictures, still = beside(1.5, -16.0, -24.0), beside(1.5)
    still = BesideFrames(pictures.latents[:, :, :1], still.t, still.positions)
    guidance = GuidanceConfig(
        scale=scale, references=2.5, sequential=sequential, interval=(0.0, 0.8)
    )
    denoise = guided_denoiser(dit, text, negative, guidance, beside=pictures)
    got = denoise(x, t)
    assert sum(calls) == denoise.num_evaluations == 6
    both, one = (dit(x, t, *each, beside=pictures) for each in (text, negative))
    none = dit(x, t, *negative, beside=still)
    expected = none + 2.5 * (one - none) + scale * (both - one)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (expected - one - scale * (both - one)).abs().max() > 0.01
    calls.clear()
    high = torch.ones(2)
    torch.testing.assert_close(denoise(x, high), dit(x, high, *text, beside=pictures))
    assert sum(calls) == 4  # one evaluation of each clip outside the interval, and the one above
    reused = guided_denoiser(dit, text, negative, guidance, beside=pictures, reuse_threshold=10.0)
    reused(x, t)
    torch.testing.assert_close(reused(x, t), got, atol=1e-5, rtol=1e-5)
    assert sum(reuse.num_skipped for reuse in reused.reuse) == 6


@torch.no_grad()
def test_without_references_their_scale_is_none(dit, calls):
    (text, negative), (x, t) = texts(), noisy()
    for pictures in (None, beside(1.5)):
        calls.clear()
        for scale, count in ((3.0, 4), (1.0, 2)):
            guidance = GuidanceConfig(scale=scale, references=2.5)
            got = guided_denoiser(dit, text, negative, guidance, beside=pictures)(x, t)
            plain = guided_denoiser(dit, text, negative, scale, beside=pictures)
            assert plain.num_evaluations == 0
            assert torch.equal(got, plain(x, t))
            assert plain.num_evaluations == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"references": -1.0}, "guidance: references=-1.0; expected greater than or equal to 0"),
        ({"scale": math.nan}, "guidance: scale=nan; expected a finite number"),
        ({"scale": math.inf}, "guidance: scale=inf; expected a finite number"),
        ({"scale": -1.0}, "guidance: scale=-1.0; expected greater than or equal to 0"),
        ({"rescale": 1.5}, "guidance: rescale=1.5; expected less than or equal to 1"),
        ({"rescale": math.nan}, "guidance: rescale=nan; expected a finite number"),
        ({"interval": (0.8, 0.2)}, "interval=0.8 to 0.2: give the lower noise level first"),
        ({"interval": (0.8,)}, r"interval=\(0.8,\); expected two noise levels"),
        ({"interval": (-1, 1)}, r"interval=\(-1, 1\); expected greater than or equal to 0"),
        ({"kind": "cgf"}, "guidance: kind=cgf; expected 'cfg', 'cfg_zero' or 'apg'"),
        ({"momentum": 0.1}, "momentum is an option of kind=apg, and kind is cfg"),
        ({"kind": "apg", "zero_steps": 1}, "zero_steps is an option of kind=cfg_zero"),
        ({"kind": "apg", "momentum": 1.0}, "momentum=1.0; expected less than 1"),
        ({"kind": "apg", "max_norm": math.inf}, "max_norm=inf; expected a finite number"),
    ],
)
def test_mistakes_take_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        GuidanceConfig.checked(**values)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValidationError):
        GuidanceConfig(**values)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -2.0])
def test_scales_that_are_none(dit, scale):
    with pytest.raises(ValueError, match=f"guidance: scale={scale}; expected"):
        guided_denoiser(dit, *texts(), scale)


def test_cfg_zero_is_for_velocity(dit):
    guidance = GuidanceConfig(kind="cfg_zero")
    with pytest.raises(ValueError, match="predict velocity, and this one predicts noise"):
        guided_denoiser(dit, *texts(), guidance, objective=DDPM(prediction="noise"))
    guided_denoiser(dit, *texts(), guidance, objective=FlowMatching())


@pytest.mark.parametrize("kind", ["cfg", "cfg_zero", "apg"])
def test_configs_read_back_the_same(kind):
    guidance = GuidanceConfig(kind=kind, scale=4.0, interval=(0.1, 0.9))
    assert GuidanceConfig(**guidance.model_dump(mode="json")) == guidance
