"""The VAE: causality, locality, shape arithmetic, normalisation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dit.vae import VAEConfig, VideoVAE
from dit.vae_layers import depth_to_space, space_to_depth


@given(ft=st.integers(1, 4), fs=st.integers(1, 3), k=st.integers(0, 3))
def test_depth_to_space_undoes_space_to_depth(ft, fs, k):
    x = torch.randn(2, 3, 1 + k * ft, 2 * fs, 3 * fs)
    y = space_to_depth(x, ft, fs)
    assert y.shape == (2, 3 * ft * fs * fs, 1 + k, 2, 3)
    # The decoder's channel order is its own; the same rearrangement inverts it.
    y = y.unflatten(1, (3, ft, fs, fs)).flatten(1, 4)
    assert torch.equal(depth_to_space(y, ft, fs), x)


@given(k=st.integers(0, 3), h=st.integers(1, 3), w=st.integers(1, 3))
def test_shapes(k, h, w):
    config = VAEConfig(latent_channels=4, widths=(8, 8), factors=((2, 2), (2, 2)), num_blocks=0)
    vae = VideoVAE(config)
    video = torch.rand(1, 3, 4 * k + 1, 4 * h, 4 * w) * 2 - 1
    latents = vae.encode(video).mean
    assert latents.shape[1:] == vae.latent_shape(*video.shape[2:]) == (4, k + 1, h, w)
    assert vae.decode(latents).shape == video.shape


def test_the_first_frame_alone_gives_the_first_latent_frame(vae):
    video = torch.rand(2, 3, 9, 16, 16) * 2 - 1
    whole, first = vae.encode(video), vae.encode(video[:, :, :1])
    torch.testing.assert_close(first.mean, whole.mean[:, :, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.std, whole.std[:, :, :1], atol=1e-5, rtol=1e-5)


def test_encoder_and_decoder_are_causal(vae):
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    latents = vae.encode(video).mean
    later = video.clone()
    later[:, :, 5:] *= -1
    changed = (vae.encode(later).mean - latents).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:2].max() == 0 < changed[2]
    later_latents = latents.clone()
    later_latents[:, :, 2] += 1
    changed = (vae.decode(later_latents) - vae.decode(latents)).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:5].max() == 0 < changed[5:].min()


def test_statistics_normalise_and_cancel(vae):
    video = torch.rand(4, 3, 5, 16, 16) * 2 - 1
    raw, decoded = vae.encode(video), vae.decode(vae.encode(video).mean)
    vae.latent_mean.copy_(raw.mean.mean(dim=(0, 2, 3, 4)))
    vae.latent_std.copy_(raw.mean.std(dim=(0, 2, 3, 4)))
    normalised = vae.encode(video)
    torch.testing.assert_close(normalised.mean.std(dim=(0, 2, 3, 4)), torch.ones(4))
    assert normalised.mean.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-5
    torch.testing.assert_close(normalised.std * vae.latent_std.view(-1, 1, 1, 1), raw.std)
    torch.testing.assert_close(vae.decode(normalised.mean), decoded, atol=1e-4, rtol=1e-4)


def test_a_posterior_is_no_broader_than_the_prior(vae):
    """Where training clips never went, nothing holds its variance back."""
    video = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    before = vae.encode(video)
    with torch.no_grad():
        vae.encoder.head.bias[vae.latent_channels :] += 17
    assert vae.moments(video)[1].max() > 10
    after = vae.encode(video)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.std, (1 / vae.latent_std).view(-1, 1, 1, 1).expand_as(after.std))


def test_a_posterior_draw_has_its_mean_and_std(vae):
    posterior = vae.encode(torch.rand(1, 3, 1, 4, 4) * 2 - 1)
    noise = torch.randn(4000, *posterior.mean.shape[1:])
    draws = posterior.sample(noise)
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], atol=0.1, rtol=0.1)
    torch.testing.assert_close(draws.std(0), posterior.std[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 16, 16), r"frames=16 does not fit the VAE: it needs 4\*k\+1; use 17 or 13"),
        ((3, 16, 16), r"frames=3 .* use 5 or 1"),
        ((0, 16, 16), r"frames=0 .* use 1"),
        ((5, 18, 16), r"height=18 .* multiple of 4; use 20 or 16"),
        ((5, 16, 3), r"width=3 .* multiple of 4; use 4"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(vae, size, message):
    with pytest.raises(ValueError, match=message):
        vae.latent_shape(*size)


def test_config_mistakes():
    with pytest.raises(ValidationError, match="2 widths but 1 factors"):
        VAEConfig(latent_channels=4, widths=(8, 8), factors=((1, 2),))
    with pytest.raises(ValidationError, match="greater than 0"):
        VAEConfig(latent_channels=0, widths=(8,), factors=((1, 2),))


def test_it_learns(vae):
    """A few hundred steps on one clip bring the error down by far: the gradients are right."""
    video = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    errors = []
    for _ in range(150):
        mean, _ = vae.moments(video)
        error = (vae.decoder(mean) - video).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]
