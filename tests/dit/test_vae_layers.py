"""The VAE's layers: the wavelet stem, low-passes, images, layouts, compiling, what pixels may be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dit.vae import VAEConfig, VideoVAE, check_pixels
from dit.vae_layers import (
    Blur,
    CausalConv,
    ChannelNorm,
    Pointwise,
    Stream,
    haar_basis,
    haar_matrix,
    space_to_depth,
)


def randomised(vae: VideoVAE) -> VideoVAE:
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "conv" in name:
                parameter.normal_(std=0.1)
    return vae


def two_stages(**options) -> VideoVAE:
    torch.manual_seed(0)
    config = VAEConfig(latent_channels=4, widths=(8, 12), factors=((2, 2), (2, 2)), **options)
    return randomised(VideoVAE(config))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_haar_matrix(size):
    matrix = haar_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    torch.testing.assert_close(matrix[0], torch.full((size,), 1 / math.sqrt(size)))
    if size > 1:
        assert matrix[1:].sum(dim=1).abs().max() < 1e-6  # the others see differences alone
        half = torch.full((size // 2,), 1 / math.sqrt(size))
        torch.testing.assert_close(matrix[1], torch.cat([half, -half]))


@given(ft=st.sampled_from([1, 2, 4]), fs=st.sampled_from([1, 2, 4]), channels=st.integers(1, 3))
def test_haar_basis_is_orthogonal_with_the_means_first(ft, fs, channels):
    basis = haar_basis(channels, ft, fs)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    means = torch.rand(channels)
    video = means.view(1, channels, 1, 1, 1).expand(1, channels, 1 + ft, 2 * fs, fs)
    bands = torch.einsum("mn,bnfhw->bmfhw", basis, space_to_depth(video, ft, fs))
    expected = means * math.sqrt(ft * fs * fs)
    torch.testing.assert_close(bands[:, :channels].mean((0, 2, 3, 4)), expected)
    if ft * fs > 1:
        assert bands[:, channels:].abs().max() < 1e-5


def test_a_basis_is_what_inputs_or_outputs_are_expressed_in():
    basis, x = haar_basis(3, 2, 2), torch.randn(2, 24, 2, 3, 3)
    plain, haar = Pointwise(24, 8), Pointwise(24, 8, basis)
    haar.load_state_dict(plain.state_dict())
    in_basis = torch.einsum("mn,bnfhw->bmfhw", basis, x)
    torch.testing.assert_close(haar(x), plain(in_basis), atol=1e-5, rtol=1e-5)
    plain, haar = Pointwise(8, 24), Pointwise(8, 24, basis, synthesis=True)
    torch.nn.init.normal_(plain.bias)
    haar.load_state_dict(plain.state_dict())
    y = x[:, :8]
    expected = torch.einsum("mn,bmfhw->bnfhw", basis, plain(y))
    torch.testing.assert_close(haar(y), expected, atol=1e-5, rtol=1e-5)


def test_blur_keeps_what_is_constant_and_stops_what_alternates():
    blur = Blur(time=True, space=True)
    constant = torch.full((1, 2, 3, 4, 5), 0.7)
    torch.testing.assert_close(blur(constant), constant)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 1, 1, 8).expand(1, 1, 3, 8, 8)
    assert blur(stripes)[..., 1:-1].abs().max() < 1e-6
    flicker = torch.tensor([1.0, -1.0]).repeat(3).view(1, 1, 6, 1, 1).expand(1, 1, 6, 4, 4)
    assert blur(flicker)[:, :, 2:].abs().max() < 1e-6
    still = Blur(time=False, space=True)
    assert still.reach == 1
    torch.testing.assert_close(still(flicker), flicker)


def test_blur_is_causal():
    x = torch.randn(1, 2, 5, 4, 4)
    changed = x.clone()
    changed[:, :, 3:] += 1
    blur = Blur(time=True, space=True)
    assert torch.equal(blur(x)[:, :, :3], blur(changed)[:, :, :3])


def test_low_passes_make_latents_shift_with_the_picture():
    """A picture moved by half a latent: aliasing is what then differs most."""

    def error(antialias: bool) -> float:
        torch.manual_seed(0)
        factors = ((1, 1), (1, 2))
        config = VAEConfig(latent_channels=4, widths=(8, 8), factors=factors, antialias=antialias)
        vae, video = randomised(VideoVAE(config)), torch.rand(1, 3, 1, 32, 32) * 2 - 1
        here = vae.encode(video).mean[..., 4:-4, 4:-4]
        there = vae.encode(video.roll(1, dims=-1)).mean[..., 4:-4, 4:-4]
        return ((here - there).square().mean() / here.var()).item()

    assert error(True) < 0.75 * error(False)


def test_an_image_costs_a_third_and_is_the_same():
    conv, x = CausalConv(3, 5), torch.randn(2, 3, 1, 6, 6)
    torch.testing.assert_close(conv(x), conv(x, Stream()), atol=1e-5, rtol=1e-5)


def test_norms_are_computed_in_float32():
    x = torch.full(
        (1, 512, 1, 1, 1), 3e4, dtype=torch.float16
    )  # the sum of squares overflows float16
    torch.testing.assert_close(ChannelNorm()(x), torch.ones_like(x))


@pytest.mark.parametrize("antialias", [False, True])
def test_channels_last_is_a_layout_alone(antialias):
    vae, video = two_stages(antialias=antialias, stem="haar"), torch.rand(1, 3, 5, 8, 8) * 2 - 1
    mean = vae.moments(video)[0]
    decoded = vae.decode_raw(mean)
    vae.to(memory_format=torch.channels_last_3d)
    assert vae.encoder.blocks[0][0].conv_1.weight.is_contiguous(
        memory_format=torch.channels_last_3d
    )
    video = video.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(vae.moments(video)[0], mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode_raw(mean), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_compiles_without_a_graph_break(part):
    vae = two_stages(stem="haar", antialias=True)
    given = torch.rand(1, 3, 5, 8, 8) if part == "encoder" else torch.randn(1, 4, 2, 2, 2)
    network = getattr(vae, part)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), network(given), atol=1e-5, rtol=1e-5)


def test_one_depth_for_each_stage():
    vae = two_stages(num_blocks=(0, 2))
    assert [len(blocks) for blocks in vae.encoder.blocks] == [0, 2]
    assert [len(blocks) for blocks in vae.decoder.blocks] == [2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": (1,)}, r"1 num_blocks but 2 widths; give one number, or one per stage"),
        ({"stem": "haar", "factors": ((1, 3), (1, 1))}, r"stem=haar needs powers of 2 .* \(1, 3\)"),
    ],
)
def test_configs_that_cannot_be(options, message):
    values = {"latent_channels": 4, "widths": (8, 12), "factors": ((2, 2), (2, 2)), **options}
    with pytest.raises(ValidationError, match=message):
        VAEConfig(**values)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 5, 8, 8), r"shape \(3, 5, 8, 8\), expected \(b 3 f h w\)"),
        (torch.zeros(1, 4, 5, 8, 8), r"shape \(1, 4, 5, 8, 8\)"),
        (torch.zeros(0, 3, 5, 8, 8), r"shape \(0, 3, 5, 8, 8\)"),
        (
            torch.zeros(1, 3, 1, 4, 4, dtype=torch.uint8),
            r"got uint8 pixels, .* data.video.to_float",
        ),
        (torch.full((1, 3, 1, 4, 4), math.nan), r"NaN or infinite"),
        (torch.full((1, 3, 1, 4, 4), math.inf), r"NaN or infinite"),
        (torch.full((1, 3, 1, 4, 4), 255.0), r"got pixels in \[255, 255\], expected \[-1, 1\]"),
    ],
)
def test_pixels_that_cannot_be(video, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(video)
    with pytest.raises(ValueError, match=message):
        two_stages().encode(video)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 8, 8), r"frames=2 .* needs 4\*k\+1; use 5 or 1"),
        ((5, 9, 8), r"height=9 .* use 12 or 8"),
        ((1, 8, 1), r"width=1 .* use 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_encode(size, message):
    with pytest.raises(ValueError, match=message):
        two_stages().encode(torch.zeros(1, 3, *size))
