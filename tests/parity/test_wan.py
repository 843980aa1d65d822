"""Our DiT, VAE and text encoder against diffusers' and transformers', through imported folders.

The folders' weights are random, no layer of a transformer at zero; all comparisons are in float32.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from pydantic import ValidationError
from transformers import UMT5EncoderModel

from dit.diffusers_vae_config import WanVAEConfig
from dit.transformer import DiTConfig
from sample.model import load_model
from sample.wan_config import transformer_json
from sample.wan_names import wan_tensors

PROMPTS = ["a red circle", "x", "  caf&eacute; &amp;  blue  "]


@pytest.fixture(scope="module")
def dits(wan_folders):
    """Theirs and ours for a kind, and for an expert of it."""

    def pair(kind, expert="transformer"):
        theirs, ours = wan_folders(kind)
        model = load_model(ours)
        dit = model.dit if expert == "transformer" else model.dit_low_noise
        reference = WanTransformer3DModel.from_pretrained(theirs, subfolder=expert)
        return reference.train().requires_grad_(True), dit.train().requires_grad_(True)

    return pair


def padded_text(b, length):
    """States of up to 512 tokens, zero behind the text as Wan pads them."""
    context = torch.randn(b, 512, 16)
    for row in range(b):
        context[row, length - 50 * row :] = 0
    return context


def inputs(dit, b, f, h, w, text):
    torch.manual_seed(f + h)
    x = torch.randn(b, dit.config.in_channels, f, h, w)
    context = padded_text(b, 200) if text == "padded" else torch.randn(b, 7, 16)
    return x, context


def relative_error(got, expected):
    assert expected.abs().max() > 1e-3
    return (got - expected).abs().max() / expected.abs().max()


def assert_gradients_equal(theirs, ours):
    """Of every parameter, and none of them zero everywhere."""
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    pairs = wan_tensors(ours.config)
    assert len(pairs) == len(their_gradients)
    for pair in pairs:
        got = our_gradients[pair.ours]
        assert relative_error(got, their_gradients[pair.theirs].view(pair.shape)) <= 1e-4, pair


@pytest.mark.parametrize(
    ("kind", "expert"),
    [("t2v", "transformer"), ("ti2v", "transformer"), ("a14b", "transformer_2")],
)
@pytest.mark.parametrize(
    ("b", "f", "h", "w", "text"),
    [(1, 1, 4, 4, "padded"), (3, 3, 6, 4, "unpadded"), (3, 2, 2, 8, "padded")],
)
def test_forward_and_gradients(dits, kind, expert, b, f, h, w, text):
    theirs, ours = dits(kind, expert)
    x, context = inputs(ours, b, f, h, w, text)
    t = torch.rand(b)
    x_theirs, x_ours = (x.clone().requires_grad_() for _ in range(2))
    expected = theirs(
        x_theirs, timestep=1000 * t, encoder_hidden_states=context, return_dict=False
    )[0]
    mask = torch.ones(context.shape[:2], dtype=torch.bool)
    got = ours(x_ours, t, context, mask)
    assert relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-4
    assert_gradients_equal(theirs, ours)


@pytest.mark.parametrize(("b", "f", "h", "w"), [(1, 2, 4, 4), (3, 3, 4, 6)])
def test_per_frame_timesteps(dits, b, f, h, w):
    """Wan 2.2 TI2V gives every token its own timestep; ours gives every latent frame one."""
    theirs, ours = dits("ti2v")
    x, context = inputs(ours, b, f, h, w, "padded")
    t = torch.rand(b, f)
    t[:, 0] = 0
    tokens = (1000 * t).repeat_interleave(h * w // 4, dim=1)
    expected = theirs(x, timestep=tokens, encoder_hidden_states=context, return_dict=False)[0]
    got = ours(x, t, context)
    assert relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert_gradients_equal(theirs, ours)


@pytest.mark.parametrize(
    ("channels", "dim", "heads", "mlp_dim", "num_blocks"),
    [(16, 1536, 12, 8960, 30), (48, 3072, 24, 14336, 30), (16, 5120, 40, 13824, 40)],
    ids=["1.3B", "TI2V-5B", "14B"],
)
def test_names_and_shapes_at_full_size(channels, dim, heads, mlp_dim, num_blocks):
    config = DiTConfig(
        in_channels=channels,
        context_dim=4096,
        dim=dim,
        num_blocks=num_blocks,
        num_heads=heads,
        mlp_dim=mlp_dim,
    )
    with torch.device("meta"):
        settings = {k: v for k, v in transformer_json(config).items() if k[0] != "_"}
        theirs = WanTransformer3DModel(**settings).state_dict()
    tensors = wan_tensors(config)
    assert {t.theirs: t.their_shape for t in tensors} == {k: v.shape for k, v in theirs.items()}
    assert len({t.ours for t in tensors}) == len(theirs)


def test_padding_counts(dits):
    """Zero states behind a text are attended to, so that leaving them out would be another result."""
    _, ours = dits("t2v")
    x, context = inputs(ours, 1, 2, 4, 4, "padded")
    whole, cut = ours(x, torch.ones(1), context), ours(x, torch.ones(1), context[:, :200])
    assert relative_error(cut, whole) > 1e-2


@pytest.mark.parametrize(
    ("kind", "shape"), [("t2v", (2, 3, 5, 16, 24)), ("ti2v", (1, 3, 9, 32, 32))]
)
def test_vae(wan_folders, kind, shape):
    theirs, ours = wan_folders(kind)
    reference, vae = AutoencoderKLWan.from_pretrained(theirs, subfolder="vae"), load_model(ours).vae
    torch.manual_seed(0)
    video = torch.rand(shape) * 2 - 1
    mean, std = (
        torch.tensor(value).view(1, -1, 1, 1, 1)
        for value in (reference.config.latents_mean, reference.config.latents_std)
    )
    with torch.no_grad():
        expected = reference.encode(video).latent_dist
        got = vae.encode(video)
        assert relative_error(got.mean, (expected.mean - mean) / std) <= 1e-5
        assert relative_error(got.std, expected.std / std) <= 1e-5
        assert got.mean.shape[1:] == vae.latent_shape(*shape[2:])
        latents = torch.randn_like(got.mean)
        decoded = reference.decode(latents * std + mean, return_dict=False)[0]
        assert decoded.std() > 1e-3
        torch.testing.assert_close(vae.decode(latents), decoded, atol=1e-5, rtol=0)
    assert decoded.shape == shape


def test_vae_refuses_what_it_cannot_encode(wan_folders):
    vae = load_model(wan_folders("ti2v")[1], vae_only=True).vae
    with pytest.raises(ValueError, match=r"frames=4 does not fit the VAE: it needs 4\*k\+1"):
        vae.encode(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(
        ValueError, match="height=24 does not fit the VAE: it needs a multiple of 16"
    ):
        vae.encode(torch.zeros(1, 3, 5, 24, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_std": (1.0,) * 15}, "latents_std has 15 numbers, z_dim=16"),
        ({"dim_mult": (1, 2)}, "3 temperal_downsample for 2 dim_mult"),
        ({"temperal_downsample": (True, True, True)}, "gives 1/8 of the frames"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal is 8; Wan's VAE has 4"),
        (
            {"patch_size": 2, "in_channels": 12, "out_channels": 12},
            "scale_factor_spatial=8 but the layers reduce by 16",
        ),
        (
            {"patch_size": 2, "scale_factor_spatial": 16},
            "in_channels=3 and out_channels=3; RGB in patches of 2 has 12",
        ),
        ({"num_res_blocks": 10**9}, "less than or equal to 1000"),
        ({"dropout": 5}, "less than 1"),
    ],
)
def test_vae_settings_that_contradict_each_other(changes, message):
    whole = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}
    assert WanVAEConfig(**whole).scale_factor_spatial == 8
    with pytest.raises(ValidationError, match=message):
        WanVAEConfig(**{**whole, **changes})


def test_text_states(wan_folders):
    """As WanPipeline makes them, prompts cleaned, padded and longer than fits."""
    theirs, ours = wan_folders("t2v")
    pipeline = WanPipeline.from_pretrained(theirs, transformer=None, vae=None)
    text = load_model(ours).text
    prompts = [*PROMPTS, "abc " * 400, ""]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
        states, mask = text(text.tokenize(prompts))
    assert states.shape == (5, 512, 16)
    assert mask.all()
    assert [int(row.any(dim=-1).sum()) for row in expected] == [14, 3, 13, 512, 1]
    assert [int(row.any(dim=-1).sum()) for row in states] == [14, 3, 13, 512, 1]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05


def test_text_states_equal_the_encoders_own(wan_folders):
    theirs, ours = wan_folders("t2v")
    reference = UMT5EncoderModel.from_pretrained(theirs, subfolder="text_encoder")
    text = load_model(ours).text
    ids = text.tokenize(PROMPTS[:1])
    n = int((ids != 0).sum())
    with torch.no_grad():
        expected = reference(ids[:, :n]).last_hidden_state
        torch.testing.assert_close(text(ids)[0][:, :n], expected, atol=1e-5, rtol=0)
