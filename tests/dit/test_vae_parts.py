"""Chunks and tiles give what the whole clip gives; blended tiles come close, and say how close."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.vae import VAEConfig, VideoVAE
from dit.vae_layers import Stream
from dit.vae_parts import Span, blend_psnr, blended_spans, decode_in_parts, encode_in_parts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
FACTORS = [((1, 2), (2, 2)), ((2, 2), (2, 1)), ((4, 4),), ((1, 1), (2, 3), (1, 2))]


def random_vae(factors, num_blocks, seed=0, **options) -> VideoVAE:
    """Nothing at zero: the last convolutions of blocks start there, and would hide their reach."""
    torch.manual_seed(seed)
    widths = (6, 8, 6)[: len(factors)]
    vae = VideoVAE(
        VAEConfig(
            latent_channels=4, widths=widths, factors=factors, num_blocks=num_blocks, **options
        )
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "conv" in name:
                parameter.normal_(std=0.1)
        vae.latent_mean.normal_()
        vae.latent_std.uniform_(0.5, 2)
    return vae.eval().requires_grad_(False)


@settings(deadline=None, max_examples=60)
@given(
    factors=st.sampled_from(FACTORS),
    num_blocks=st.integers(0, 2),
    antialias=st.booleans(),
    stem=st.sampled_from(["space_to_depth", "haar"]),
    k=st.integers(0, 4),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 6)),
    tile=st.one_of(st.none(), st.integers(1, 10)),
)
def test_parts_equal_the_whole(factors, num_blocks, antialias, stem, k, h, w, chunk, tile):
    vae = random_vae(factors, num_blocks, antialias=antialias, stem=stem)
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


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
def test_a_narrower_halo_would_show(factors, antialias, monkeypatch):
    """The halo is as wide as it has to be, and no test above passes by chance."""
    vae = random_vae(factors, num_blocks=2, antialias=antialias)
    latents = torch.randn(1, 4, 1, 14, 14)
    whole = vae.decode(latents)
    encode_halo, decode_halo = vae.halos
    narrower = property(lambda self: (encode_halo, decode_halo - 2))
    monkeypatch.setattr(VideoVAE, "halos", narrower)
    off = (decode_in_parts(vae, latents, tile=4) - whole).abs().max()
    assert off > 1e-4


def test_a_stream_is_what_the_caller_makes_of_it():
    """Chunks of unequal length, as they come from a file or a camera."""
    vae = random_vae(FACTORS[1], num_blocks=1, antialias=True)
    video = torch.rand(1, 3, 21, 4, 6) * 2 - 1
    whole, stream = vae.encode(video).mean, vae.new_stream()
    parts = [vae.encode(piece, stream).mean for piece in video.split([5, 12, 4], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, **TOLERANCE)
    with pytest.raises(ValueError, match=r"chunk of 3 frames .* multiple of 4"):
        vae.encode(video[:, :, :3], stream)


def test_what_a_stream_holds_does_not_grow():
    vae = random_vae(FACTORS[0], num_blocks=2, antialias=True)
    stream, sizes = Stream(), []
    for latents in torch.randn(1, 4, 12, 3, 3).split(2, dim=2):
        vae.decode(latents, stream)
        sizes.append(sum(x.untyped_storage().nbytes() for x in stream.frames.values()))
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


@given(size=st.integers(1, 40), length=st.integers(1, 12), share=st.floats(0, 0.5))
def test_blended_spans_cover_everything_once(size, length, share):
    total = torch.zeros(3 * size)
    for span in blended_spans(size, length, int(share * length)):
        start, stop = span.inner
        total[3 * start : 3 * stop] += span.weights(3, torch.device("cpu"))
    torch.testing.assert_close(total, torch.ones(3 * size))


def test_weights_of_neighbours_are_ramps():
    left, right = Span((0, 6), (0, 6), after=2), Span((4, 9), (4, 9), before=2)
    device = torch.device("cpu")
    assert left.weights(1, device).tolist() == [1, 1, 1, 1, 0.75, 0.25]
    assert right.weights(1, device).tolist() == [0.25, 0.75, 1, 1, 1]


def test_blended_tiles_come_closer_with_more_overlap():
    vae = random_vae(FACTORS[0], num_blocks=1)
    latents = torch.randn(2, 4, 2, 16, 20)
    by_overlap = [blend_psnr(vae, latents, tile=8, overlap=n) for n in (0, 2, 4)]
    assert all(psnr.shape == (2,) for psnr in by_overlap)
    assert (by_overlap[0] < by_overlap[1]).all()
    assert (by_overlap[1] < by_overlap[2]).all()
    assert by_overlap[2].isfinite().all()
    assert blend_psnr(vae, latents, tile=20, overlap=4).isinf().all()  # a single tile
    video = vae.decode(latents).clamp(-1, 1)
    whole = vae.encode(video)
    blended = encode_in_parts(vae, video, tile=8, overlap=4)
    error = (blended.mean - whole.mean).square().mean() / whole.mean.square().mean()
    assert 0 < error < 1e-2


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"chunk": 0}, r"chunk=0; use 1 or more"),
        ({"tile": 0}, r"tile=0; use 1 or more"),
        ({"overlap": 1}, r"overlap=1 is of tiles; give their size too"),
        ({"tile": 5, "overlap": 3}, r"overlap=3 of tiles of 5; use 0 to 2"),
        ({"tile": 5, "overlap": -1}, r"overlap=-1 of tiles of 5; use 0 to 2"),
    ],
)
def test_parts_that_cannot_be(parts, message):
    vae = random_vae(FACTORS[1], num_blocks=0)
    with pytest.raises(ValueError, match=message):
        decode_in_parts(vae, torch.zeros(1, 4, 2, 2, 2), **parts)
    with pytest.raises(ValueError, match=message):
        encode_in_parts(vae, torch.zeros(1, 3, 5, 8, 8), **parts)
