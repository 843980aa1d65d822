"""Published VAEs against diffusers' classes, called as their pipelines call them.

The folders' weights are random, none of them at zero, and so are the statistics of the latents.
Comparisons with diffusers are in float32; those of chunks with the whole compute in float64, because
other kernels round otherwise, which norms over the few values of tiny networks make larger.
"""

import copy
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.diffusers_vae import published_vae
from dit.diffusers_vae_config import (
    CogVideoXVAEConfig,
    HunyuanVideoVAEConfig,
    LTXVideoVAEConfig,
    MochiVAEConfig,
    WanVAEConfig,
)
from dit.vae_layers import Stream
from dit.vae_parts import decode_in_parts, encode_in_parts
from sample.vae_import import open_vae

# Of the first frame and every further group, and rows or columns of a latent.
STEPS = {
    "wan": (4, 8),
    "wan-2.2": (4, 16),
    "hunyuan_video": (4, 8),
    "cogvideox": (8, 8),
    "cogvideox-1.5": (8, 8),
    "ltx_video": (8, 32),
    "ltx_video-0.9.1": (8, 32),
    "ltx_video-0.9.5": (8, 32),
    "mochi": (6, 8),
}
STREAMED = ("wan", "wan-2.2", "mochi")


@pytest.fixture(scope="module")
def vaes(vae_folder):
    """diffusers' network and ours, of a family."""
    made = {}

    def pair(family):
        if family not in made:
            ours = open_vae(vae_folder(family)).vae
            theirs = getattr(diffusers, ours.config.class_name).from_pretrained(vae_folder(family))
            made[family] = theirs.eval().requires_grad_(False), ours
        return made[family]

    return pair


@pytest.fixture(scope="module")
def exact(vaes):
    """Our network of a family in float64."""
    made = {}

    def vae(family):
        if family not in made:
            made[family] = copy.deepcopy(vaes(family)[1]).double()
        return made[family]

    return vae


def normalise(family, vae, z):
    """What the pipeline gives to its transformer."""
    if family.startswith("ltx"):
        factor = vae.config.scaling_factor
        normalised = diffusers.LTXPipeline._normalize_latents
        return normalised(z, vae.latents_mean, vae.latents_std, factor)
    if family.startswith(("hunyuan", "cog")):  # pipeline_hunyuan_video_image2video, video2video
        return vae.config.scaling_factor * z
    mean, std = (
        torch.tensor(value).view(1, -1, 1, 1, 1)
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    if family == "mochi":  # the other way round in pipeline_mochi
        return (z - mean) * vae.config.scaling_factor / std
    return (z - mean) / std


def pipeline_decode(family, vae, latents):
    """What the pipeline shows for its latents."""
    if family.startswith("ltx"):
        denormalised = diffusers.LTXPipeline._denormalize_latents
        factor = vae.config.scaling_factor
        z = denormalised(latents, vae.latents_mean, vae.latents_std, factor)
        t = torch.zeros(len(z)) if vae.config.timestep_conditioning else None
        return vae.decode(z, t, return_dict=False)[0]
    if family.startswith("cog"):
        pipeline = SimpleNamespace(
            vae=vae, vae_scaling_factor_image=vae.config.scaling_factor, vae_dtype=torch.float32
        )
        decode = diffusers.CogVideoXPipeline.decode_latents
        return decode(pipeline, latents.permute(0, 2, 1, 3, 4))
    if family == "hunyuan_video":
        return vae.decode(latents / vae.config.scaling_factor).sample
    mean, std = (
        torch.tensor(value).view(1, -1, 1, 1, 1)
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    if family == "mochi":
        return vae.decode(latents * std / vae.config.scaling_factor + mean).sample
    return vae.decode(latents / (1.0 / std) + mean).sample


def assert_close(got, expected):
    assert expected.std() > 1e-3
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", STEPS)
@pytest.mark.parametrize(("groups", "rows", "columns"), [(0, 2, 3), (1, 3, 2), (3, 2, 2)])
def test_as_the_pipeline(vaes, family, groups, rows, columns):
    theirs, ours = vaes(family)
    step, side = STEPS[family]
    f, h, w = 1 + groups * step, rows * side, columns * side
    torch.manual_seed(groups)
    video = torch.rand(2, 3, f, h, w) * 2 - 1
    expected = theirs.encode(video).latent_dist
    mean, log_variance = ours.moments(video)
    assert_close(mean, expected.mean)
    assert_close(log_variance, expected.logvar)
    got = ours.encode(video)
    assert tuple(got.mean.shape[1:]) == ours.latent_shape(f, h, w)
    assert_close(got.mean, normalise(family, theirs, expected.mean))
    zero = torch.zeros_like(got.mean)
    scaled = normalise(family, theirs, expected.std) - normalise(family, theirs, zero)
    assert_close(got.std, scaled)
    latents = torch.randn_like(got.mean)
    torch.manual_seed(0)  # where the decoder injects noise, ours is that of seed 0
    decoded = pipeline_decode(family, theirs, latents)
    assert decoded.shape == video.shape
    torch.manual_seed(1)
    assert_close(ours.decode(latents), decoded)


def test_long_clips_of_hunyuan_video_are_blended_as_diffusers_does(vaes):
    theirs, ours = vaes("hunyuan_video")
    video = torch.rand(1, 3, 29, 8, 8) * 2 - 1
    expected = theirs.encode(video).latent_dist.mean
    assert_close(ours.moments(video)[0], expected)
    decoded = theirs.decode(expected).sample
    assert decoded.shape == video.shape
    assert_close(ours.decode_raw(expected), decoded)
    theirs.use_framewise_encoding = False
    try:
        assert (theirs.encode(video).latent_dist.mean - expected).abs().max() > 1e-4
    finally:
        theirs.use_framewise_encoding = True


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx_video", "mochi"])
def test_the_clips_that_come_back(vaes, family):
    """Of all lengths up to two groups, exactly those that latent_shape takes come back as long as they
    were; but CogVideoX's groups without a first frame, which no pipeline has."""
    theirs, ours = vaes(family)
    step, side = STEPS[family]
    for f in range(1, 2 + 2 * step):
        video = torch.rand(1, 3, f, side, side) * 2 - 1
        if f % step == 1:
            shape = ours.latent_shape(f, side, side)
            latents = ours.encode(video).mean
            assert tuple(latents.shape[1:]) == shape
            assert ours.decode(latents).shape == video.shape
            continue
        with pytest.raises(
            ValueError, match=rf"frames={f} does not fit the VAE: it needs {step}\*k"
        ):
            ours.encode(video)
        try:
            back = theirs.decode(theirs.encode(video).latent_dist.mean).sample.shape[2]
        except RuntimeError:
            continue
        assert back != f or (family == "cogvideox" and f % step == 0)


def test_an_even_number_of_latent_frames_is_not_cogvideox(vaes):
    with pytest.raises(ValueError, match="2 latent frames do not fit CogVideoX's VAE"):
        vaes("cogvideox")[1].decode(torch.zeros(1, 4, 2, 1, 1))


@pytest.mark.parametrize("family", STREAMED)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_chunks_give_the_whole(exact, family, data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    vae, (step, side) = exact(family), STEPS[family]
    torch.manual_seed(sum(sizes))
    video = torch.rand(1, 3, 1 + (sum(sizes) - 1) * step, side, 2 * side) * 2 - 1
    whole, stream = vae.encode(video), vae.new_stream()
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    cuts = [0, *(1 + (end - 1) * step for end in ends)]
    parts = [vae.encode(video[:, :, a:b], stream) for a, b in zip(cuts, cuts[1:])]
    assert_close(torch.cat([part.mean for part in parts], 2), whole.mean)
    assert_close(torch.cat([part.std for part in parts], 2), whole.std)
    latents, stream = torch.randn_like(whole.mean), vae.new_stream()
    decoded = [vae.decode(chunk, stream) for chunk in latents.split(sizes, dim=2)]
    assert_close(torch.cat(decoded, 2), vae.decode(latents))


@pytest.mark.parametrize("family", STREAMED)
def test_two_streams_at_once(exact, family):
    vae, (step, side) = exact(family), STEPS[family]
    videos = torch.rand(2, 1, 3, 1 + 3 * step, side, side) * 2 - 1
    streams = [vae.new_stream() for _ in videos]
    out = [[], []]
    for a, b in ((0, 1), (1, 1 + 2 * step), (1 + 2 * step, 1 + 3 * step)):
        for video, stream, parts in zip(videos, streams, out):
            parts.append(vae.encode(video[:, :, a:b], stream).mean)
    for video, parts in zip(videos, out):
        assert_close(torch.cat(parts, 2), vae.encode(video).mean)


@pytest.mark.parametrize("family", STREAMED)
def test_in_parts(exact, family):
    vae, (step, side) = exact(family), STEPS[family]
    video = torch.rand(1, 3, 1 + 4 * step, side, side) * 2 - 1
    latents = encode_in_parts(vae, video, chunk=2).mean
    assert_close(latents, vae.encode(video).mean)
    assert_close(decode_in_parts(vae, latents, chunk=2), vae.decode(latents))
    with pytest.raises(ValueError, match="sees the whole picture"):
        decode_in_parts(vae, latents, tile=1)


def test_attention_in_portions(exact, monkeypatch):
    """Mochi's attention takes so many positions at once; a stream remembers those of every portion."""
    vae = exact("mochi")
    video = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    expected = vae.encode(video).mean
    for block in vae.model.encoder.down_blocks:
        monkeypatch.setattr(
            block, "forward", lambda x, conv_cache=None, f=block.forward: f(x, conv_cache, 5)
        )
    assert_close(encode_in_parts(vae, video, chunk=1).mean, expected)


@pytest.mark.parametrize("family", sorted(set(STEPS) - set(STREAMED)))
def test_no_chunks(vaes, family):
    vae, (step, side) = vaes(family)[1], STEPS[family]
    with pytest.raises(ValueError, match="leave the chunk out"):
        vae.new_stream()
    with pytest.raises(ValueError, match="leave the chunk out"):
        vae.encode(torch.zeros(1, 3, 1 + step, side, side), Stream())
    with pytest.raises(ValueError, match="leave the chunk out"):
        vae.decode(torch.zeros(1, vae.latent_channels, 3, 1, 1), Stream())


def test_injected_noise_leaves_the_generator_alone(vaes):
    vae = vaes("ltx_video-0.9.1")[1]
    latents = torch.randn(1, 6, 2, 1, 1)
    before = torch.get_rng_state()
    first, again = vae.decode(latents), vae.decode(latents)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)


def test_the_decode_timestep(vaes):
    """LTXPipeline's, without noise on the latents."""
    theirs, ours = vaes("ltx_video-0.9.5")
    config = ours.config.model_copy(update={"decode_timestep": 0.05})
    other = published_vae(config)
    other.load_state_dict(ours.state_dict())
    z = torch.randn(2, 6, 2, 1, 1)
    expected = theirs.decode(z, torch.full((2,), 0.05)).sample
    assert_close(other.decode_raw(z), expected)
    assert (ours.decode_raw(z) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "channels", "factors"),
    [
        (HunyuanVideoVAEConfig(), 16, (4, 8)),
        (CogVideoXVAEConfig(), 16, (4, 8)),
        (LTXVideoVAEConfig(), 128, (8, 32)),
        (MochiVAEConfig(latents_mean=(0.0,) * 12, latents_std=(1.0,) * 12), 12, (6, 8)),
        (WanVAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16), 16, (4, 8)),
    ],
)
def test_settings_at_full_size(config, channels, factors):
    """The defaults are diffusers', which are the published ones, and the network does what they say."""
    signature = inspect.signature(getattr(diffusers, config.class_name).__init__).parameters
    ours = {name: getattr(config, name) for name in type(config).model_fields.keys() - config.own}
    assert ours.keys() == signature.keys() - {"self"}
    for name, value in ours.items():
        default = signature[name].default
        default = tuple(default) if isinstance(default, list) else default
        assert name in ("latents_mean", "latents_std") or value == default, name
    with torch.device("meta"):
        vae = published_vae(config)
    vae.check_sizes()
    assert (vae.latent_channels, (vae.temporal_factor, vae.spatial_factor)) == (channels, factors)
