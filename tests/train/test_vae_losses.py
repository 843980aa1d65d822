"""The VAE's losses against closed forms; gradients go where they belong."""

import math

import pytest
import torch
from torch import distributions, nn

from dit.discriminator import DiscriminatorConfig, PatchDiscriminator
from train.config_recipes import AdversarialConfig
from train.recipe_vae import spread
from train.vae_losses import (
    AdversarialLoss,
    charbonnier,
    kl_divergence,
    r1_penalty,
    temporal_difference,
    with_gradient,
    zero_gradients,
)

TINY = {"width": 4, "num_layers": 2}


def adversary(**options) -> AdversarialLoss:
    torch.manual_seed(0)
    values = {"start_step": 0, "ramp_steps": 0, "discriminator": TINY, "r1_weight": 0.0, **options}
    return AdversarialLoss(AdversarialConfig(**values))


def test_charbonnier_is_l1_far_from_zero_and_l2_near_it():
    error = torch.full((2, 3, 1, 2, 2), 0.5)
    torch.testing.assert_close(charbonnier(error, 0.0), torch.full((2,), 0.5))
    torch.testing.assert_close(charbonnier(error, 1e-3), torch.full((2,), 0.5), atol=1e-5, rtol=0)
    small = charbonnier(1e-4 * error, 1e-2) - 1e-2
    torch.testing.assert_close(small, torch.full((2,), (0.5e-4) ** 2 / 2e-2), atol=1e-8, rtol=1e-2)


def test_temporal_difference_is_of_flicker_alone():
    steady = torch.rand(2, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    assert temporal_difference(steady).tolist() == [0, 0]
    flicker = torch.tensor([0.1, -0.1]).repeat(3)[:5].view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    torch.testing.assert_close(temporal_difference(flicker), torch.full((2,), 0.2))
    assert temporal_difference(steady[:, :, :1]).tolist() == [0, 0]


def test_kl_is_torchs():
    mean, log_variance = torch.randn(2, 3, 4, 2, 5, 5).unbind(0)
    posterior = distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = distributions.kl_divergence(posterior, distributions.Normal(0, 1))
    got = kl_divergence(mean, log_variance)
    torch.testing.assert_close(got, expected.sum(dim=(1, 2, 3, 4)), rtol=1e-5, atol=1e-4)


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    weight = torch.randn(3, 2, 4, 4, requires_grad=True)
    video = torch.rand(2, 3, 2, 4, 4)
    penalty = r1_penalty(lambda x: (x * weight).sum(dim=(1, 2, 3, 4))[:, None], video)
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum().expand(2))
    penalty[0].backward()
    torch.testing.assert_close(weight.grad, weight.detach())


def test_r1_is_in_float32_under_autocast():
    loss = adversary()
    video = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    expected = r1_penalty(loss.discriminator, video)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(r1_penalty(loss.discriminator, video), expected)


def test_with_gradient_keeps_the_value_and_replaces_the_gradient():
    x = torch.randn(2, 3, 1, 2, 2, requires_grad=True)
    output = 2 * x
    gradient = torch.randn(output.shape)
    losses = with_gradient(output.square().mean(dim=(1, 2, 3, 4)), output, gradient)
    torch.testing.assert_close(losses, output.detach().square().mean(dim=(1, 2, 3, 4)))
    losses.sum().backward()
    torch.testing.assert_close(x.grad, 2 * gradient)


def test_the_generators_gradient_is_that_of_its_own_loss():
    loss, video = adversary(), torch.rand(2, 3, 3, 8, 8) * 2 - 1
    output = (0.9 * video).requires_grad_(True)
    verdict = loss(output, video, 0)
    logits = loss.discriminator(output).flatten(1)
    expected = torch.nn.functional.softplus(-logits).mean(1)
    torch.testing.assert_close(verdict.generator_loss, expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), output)
    torch.testing.assert_close(verdict.gradient, gradient)
    assert gradient.abs().max() > 0


def test_the_discriminator_learns_from_its_own_loss_alone():
    loss, video = adversary(), torch.rand(2, 3, 3, 8, 8) * 2 - 1
    output = (0.9 * video).requires_grad_(True)
    loss(output, video, 0).discriminator_loss.sum().backward()
    assert output.grad is None  # and nothing of it reaches the generator
    got = [p.grad.clone() for p in loss.parameters()]
    loss.zero_grad()
    fake, real = (loss.discriminator(x.detach()).flatten(1) for x in (output, video))
    softplus = torch.nn.functional.softplus
    (softplus(fake) + softplus(-real)).mean(1).sum().backward()
    for gradient, parameter in zip(got, loss.parameters()):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_discriminator_learns_to_tell():
    loss = adversary(r1_weight=0.01, r1_interval=4)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3, betas=(0.5, 0.9))
    video = torch.rand(8, 3, 3, 8, 8) * 2 - 1
    output = nn.functional.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1))
    for step in range(60):
        verdict = loss(output, video, step)
        optimizer.zero_grad()
        verdict.discriminator_loss.mean().backward()
        optimizer.step()
    values = loss(output, video, 1).values
    assert values["logit_real"].mean() > values["logit_fake"].mean() + 1
    assert values["discriminator"].mean() < 2 * math.log(2)


def test_r1_is_taken_now_and_then_and_weighted_up():
    loss, video = adversary(r1_weight=0.5, r1_interval=4), torch.rand(2, 3, 1, 8, 8) * 2 - 1
    output = 0.5 * video
    due, between = (loss(output, video, step) for step in (8, 9))
    extra = due.discriminator_loss - between.discriminator_loss
    torch.testing.assert_close(extra, 4 * 0.5 * r1_penalty(loss.discriminator, video))
    assert "r1" in due.values
    assert "r1" not in between.values


def test_adaptive_weights_make_gradients_alike():
    loss = adversary(weight=0.5)
    ours, theirs = torch.randn(2, 3, 3, 1, 4, 4).unbind(0)
    theirs = theirs * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1, 1, 1)
    weights = loss.weights(0, ours, theirs)
    scaled = (weights.view(3, 1, 1, 1, 1) * theirs).flatten(1).norm(dim=1)
    torch.testing.assert_close(scaled, 0.5 * ours.flatten(1).norm(dim=1))
    assert loss.weights(0, ours, torch.zeros_like(theirs)).isfinite().all()
    fixed = adversary(weight=0.5, adaptive=False)
    assert fixed.weights(0, ours, theirs).tolist() == [0.5] * 3


def test_it_starts_late_and_grows():
    loss = adversary(start_step=10, ramp_steps=4, adaptive=False, weight=1.0)
    assert not loss.has_started(9)
    assert loss.has_started(10)
    gradient = torch.ones(1, 3, 1, 2, 2)
    shares = [loss.weights(step, gradient, gradient).item() for step in range(10, 16)]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    zero_gradients(loss).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in loss.parameters())


def test_a_sample_costs_the_same_in_any_batch():
    loss, video = adversary(r1_weight=1.0), torch.rand(3, 3, 3, 8, 8) * 2 - 1
    output = (video + 0.1 * torch.randn(video.shape)).clamp(-1, 1)
    whole = loss(output, video, 0)
    for index in range(3):
        alone = loss(output[index : index + 1], video[index : index + 1], 0)
        torch.testing.assert_close(alone.discriminator_loss[0], whole.discriminator_loss[index])
        torch.testing.assert_close(alone.gradient[0], whole.gradient[index], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_logits_of_patches(frames, layers):
    net = PatchDiscriminator(DiscriminatorConfig(width=6, num_layers=layers))
    smallest = net(torch.zeros(1, 3, frames, net.smallest, net.smallest))
    assert smallest.shape[2:] == (1, 1)
    logits = net(torch.zeros(1, 3, frames, 4 * net.smallest, 2 * net.smallest + 1))
    assert logits.shape[2:] == (4, 2)
    assert frames > 1 or logits.shape[1] == 1


@pytest.mark.parametrize(
    ("frames", "wanted", "expected"),
    [
        (9, None, list(range(9))),
        (9, 20, list(range(9))),
        (9, 1, [4]),
        (9, 3, [0, 4, 8]),
        (1, 3, [0]),
    ],
)
def test_frames_that_are_compared(frames, wanted, expected):
    assert spread(frames, wanted) == expected
