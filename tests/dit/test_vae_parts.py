"""Chunks and tiles give what the whole clip gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.vae import VAEConfig, VideoVAE
from dit.vae_layers import Stream
from dit.vae_parts import decode_in_parts, encode_in_parts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
FACTORS = [((1, 2), (2, 2)), ((2, 2), (2, 1)), ((4, 4),), ((1, 1), (2, 3), (1, 2))]


def random_vae(factors, num_blocks, seed=0) -> VideoVAE:
    """Nothing at zero: the last convolutions of blocks start there, and would hide their reach."""
    torch.manual_seed(seed)
    widths = (6, 8, 6)[: len(factors)]
    vae = VideoVAE(
        VAEConfig(latent_channels=4, widths=widths, factors=factors, num_blocks=num_blocks)
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "conv" in name:
                parameter.normal_(std=0.1)
        vae.latent_mean.normal_()
        vae.latent_std.uniform_(0.5, 2)
    return vae.eval().requires_grad_(False)


@settings(deadline=None, max_examples=40)
@given(
    factors=st.sampled_from(FACTORS),
    num_blocks=st.integers(0, 2),
    k=st.integers(0, 4),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 6)),
    tile=st.one_of(st.none(), st.integers(1, 10)),
)
def test_parts_equal_the_whole(factors, num_blocks, k, h, w, chunk, tile):
    vae = random_vae(factors, num_blocks)
    size = 1 + k * vae.temporal_factor, h * vae.spatial_factor, w * vae.spatial_factor
    video = torch.rand(2, 3, *size) * 2 - 1
    whole = vae.encode(video)
    parts = encode_in_parts(vae, video, chunk=chunk, tile=tile)
    torch.testing.assert_close(parts.mean, whole.mean, **TOLERANCE)
    torch.testing.assert_close(parts.std, whole.std, **TOLERANCE)
    decoded = vae.decode(whole.mean)
    assert decoded.shape == video.shape
    torch.testing.assert_close(
        decode_in_parts(vae, whole.mean, chunk=chunk, tile=tile), decoded, **TOLERANCE
    )


@pytest.mark.parametrize("factors", FACTORS)
def test_a_narrower_halo_would_show(factors, monkeypatch):
    """The halo is as wide as it has to be, and no test above passes by chance."""
    vae = random_vae(factors, num_blocks=2)
    latents = torch.randn(1, 4, 1, 12, 12)
    whole = vae.decode(latents)
    kind = type(vae.decoder)
    halo = vae.decoder.halo
    monkeypatch.setattr(kind, "halo", property(lambda self: halo - 2))
    off = (decode_in_parts(vae, latents, tile=4) - whole).abs().max()
    assert off > 1e-4


def test_a_stream_is_what_the_caller_makes_of_it():
    """Chunks of unequal length, as they come from a file or a camera."""
    vae = random_vae(FACTORS[1], num_blocks=1)
    video = torch.rand(1, 3, 21, 4, 6) * 2 - 1
    whole, stream = vae.encode(video).mean, Stream()
    parts = [vae.encode(piece, stream).mean for piece in video.split([5, 12, 4], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, **TOLERANCE)
    with pytest.raises(
        ValueError, match="a later chunk of 3 frames does not fit the VAE: it needs"
    ):
        vae.encode(video[:, :, :3], stream)


@pytest.mark.parametrize("part", ["chunk", "tile"])
def test_empty_parts(part):
    vae = random_vae(FACTORS[0], num_blocks=0)
    for run in (encode_in_parts, decode_in_parts):
        with pytest.raises(ValueError, match=f"{part}=0; use 1 or more"):
            run(vae, torch.zeros(1, 3, 1, 4, 4), **{part: 0})
