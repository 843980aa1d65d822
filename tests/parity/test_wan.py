"""Our DiT against diffusers' WanTransformer3DModel with the same weights."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit.transformer import DiT, DiTConfig

DIM, HEADS, LAYERS, CHANNELS, TEXT = 48, 4, 2, 4, 12
BLOCK = {
    "attn1.to_q": "self_attention.q",
    "attn1.to_k": "self_attention.k",
    "attn1.to_v": "self_attention.v",
    "attn1.to_out.0": "self_attention.out",
    "attn1.norm_q": "self_attention.norm_q",
    "attn1.norm_k": "self_attention.norm_k",
    "attn2.to_q": "cross_attention.q",
    "attn2.to_k": "cross_attention.k",
    "attn2.to_v": "cross_attention.v",
    "attn2.to_out.0": "cross_attention.out",
    "attn2.norm_q": "cross_attention.norm_q",
    "attn2.norm_k": "cross_attention.norm_k",
    "norm2": "norm_2",
    "ffn.net.0.proj": "mlp.fc1",
    "ffn.net.2": "mlp.fc2",
    "scale_shift_table": "modulation",
}
TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "scale_shift_table": "head_modulation",
    "proj_out": "head",
}


def ours_from(theirs: WanTransformer3DModel) -> DiT:
    config = DiTConfig(
        in_channels=CHANNELS,
        context_dim=TEXT,
        dim=DIM,
        num_blocks=LAYERS,
        num_heads=HEADS,
        mlp_dim=96,
        freq_dim=32,
    )
    ours, weights = DiT(config), {}
    for name, value in theirs.state_dict().items():
        parts = name.split(".")
        table, prefix = (BLOCK, f"blocks.{parts[1]}.") if parts[0] == "blocks" else (TOP, "")
        inner = ".".join(parts[2:]) if prefix else name
        key = next(k for k in table if inner == k or inner.startswith(k + "."))
        target = prefix + table[key] + inner.removeprefix(key)
        weights[target] = value.reshape(ours.state_dict()[target].shape)
    assert not ours.load_state_dict(weights).missing_keys
    return ours


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=96,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return theirs, ours_from(theirs)


@pytest.mark.parametrize(("b", "f", "h", "w"), [(1, 1, 4, 4), (2, 3, 6, 4), (3, 2, 2, 8)])
def test_forward_and_gradients(both, b, f, h, w):
    theirs, ours = both
    theirs.zero_grad()
    ours.zero_grad()
    x, t, context = torch.randn(b, CHANNELS, f, h, w), torch.rand(b), torch.randn(b, 7, TEXT)
    mask = torch.ones(b, 7, dtype=torch.bool)
    expected = theirs(x, timestep=1000 * t, encoder_hidden_states=context, return_dict=False)[0]
    got = ours(x, t, context, mask)
    scale = expected.abs().max()
    assert scale > 0.1
    assert (got - expected).abs().max() / scale <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for mine, other in (
        (ours.blocks[0].self_attention.q, theirs.blocks[0].attn1.to_q),
        (ours.patch_embedding, theirs.patch_embedding),
        (ours.time_projection[1], theirs.condition_embedder.time_proj),
    ):
        a, e = mine.weight.grad, other.weight.grad.reshape(mine.weight.shape)
        assert (a - e).abs().max() / e.abs().max() <= 1e-4


def test_per_frame_timesteps(both):
    """Wan 2.2 TI2V gives every token its own timestep; ours gives every latent frame one."""
    theirs, ours = both
    x, context = torch.randn(2, CHANNELS, 3, 4, 4), torch.randn(2, 7, TEXT)
    t = torch.rand(2, 3)
    t[:, 0] = 0
    tokens = (1000 * t).repeat_interleave(4, dim=1)
    expected = theirs(x, timestep=tokens, encoder_hidden_states=context, return_dict=False)[0]
    got = ours(x, t, context, torch.ones(2, 7, dtype=torch.bool))
    assert (got - expected).abs().max() / expected.abs().max() <= 1e-5
