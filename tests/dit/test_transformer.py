"""The DiT: shapes, noise levels per frame, masks, prepared texts, dtypes, compiled blocks."""

import pytest
import torch
from pydantic import ValidationError

from dit.layers import GELU, RMSNorm, modulate, rotary_table, rotate
from dit.transformer import DiT, DiTConfig


def inputs(b: int = 2, f: int = 3, h: int = 4, w: int = 6, m: int = 5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(b, 4, f, h, w, generator=g)
    context = torch.randn(b, m, 12, generator=g)
    mask = torch.ones(b, m, dtype=torch.bool)
    return x, torch.rand(b, generator=g), context, mask


@pytest.mark.parametrize(("f", "h", "w"), [(1, 2, 2), (1, 8, 4), (3, 4, 6), (5, 2, 8)])
def test_output_is_like_the_input(dit, f, h, w):
    x, t, context, mask = inputs(f=f, h=h, w=w)
    assert dit(x, t, context, mask).shape == x.shape


def test_a_fresh_dit_predicts_zero():
    config = DiTConfig(in_channels=4, context_dim=12, dim=48, num_blocks=1, num_heads=4, mlp_dim=96)
    x, t, context, mask = inputs()
    assert DiT(config)(x, t, context, mask).abs().max() == 0


def test_one_t_per_clip_equals_the_same_t_in_every_frame(dit):
    x, t, context, mask = inputs()
    per_frame = dit(x, t[:, None].expand(-1, 3), context, mask)
    torch.testing.assert_close(dit(x, t, context, mask), per_frame, atol=1e-6, rtol=1e-5)


def test_a_frame_of_its_own_t_changes_the_prediction(dit):
    x, t, context, mask = inputs()
    t_frames = t[:, None].repeat(1, 3)
    same = dit(x, t_frames, context, mask)
    t_frames[:, 0] = 0
    assert (dit(x, t_frames, context, mask) - same).abs().max() > 1e-2


def test_masked_text_is_not_seen(dit):
    x, t, context, mask = inputs()
    mask[:, 3:] = False
    before = dit(x, t, context, mask)
    context[:, 3:] = 1e3
    torch.testing.assert_close(dit(x, t, context, mask), before)
    torch.testing.assert_close(dit(x, t, context[:, :3], mask[:, :3]), before, atol=1e-5, rtol=1e-4)


def test_without_a_mask_all_of_the_text_is_seen(dit):
    x, t, context, mask = inputs()
    assert torch.equal(dit(x, t, context), dit(x, t, context, mask))
    mask[:, 3:] = False
    assert (dit(x, t, context) - dit(x, t, context, mask)).abs().max() > 1e-4


@pytest.mark.parametrize("num_words", [5, 3])
@pytest.mark.parametrize("per_frame", [False, True])
def test_a_prepared_context_gives_the_same(dit, num_words, per_frame):
    x, t, context, mask = inputs()
    mask[1, num_words:] = False
    t = torch.rand(2, 3) if per_frame else t
    prepared = dit.prepare_context(context, mask)
    assert (prepared.mask is None) == (num_words == 5)  # padding only where there is some
    expected = dit(x, t, context, mask)
    torch.testing.assert_close(dit(x, t, prepared), expected, atol=1e-6, rtol=1e-6)
    one = prepared.rows(slice(1, 2))
    torch.testing.assert_close(dit(x[1:], t[1:], one), expected[1:], atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_a_prepared_context_is_projected_once(dit):
    x, t, context, mask = inputs()
    calls = []
    for block in dit.blocks:
        for layer in (block.cross_attention.k, block.cross_attention.v):
            layer.register_forward_hook(lambda *_: calls.append(1))
    dit.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    prepared = dit.prepare_context(context, mask)
    assert len(calls) == 1 + 2 * len(dit.blocks)
    for _ in range(3):
        dit(x, t, prepared)
    assert len(calls) == 1 + 2 * len(dit.blocks)


def test_positions_may_differ_between_clips(dit):
    """Every token carries its position: a clip moved in space alone gives another prediction."""
    tokens, context, mask = torch.randn(2, 6, 16), torch.randn(2, 5, 12), None
    positions = torch.randint(0, 5, (2, 6, 3))
    t = torch.rand(2, 3)
    together = dit.forward_tokens(tokens, positions, t, context, mask)
    for i in range(2):
        one = slice(i, i + 1)
        alone = dit.forward_tokens(tokens[one], positions[i], t[one], context[one], mask)
        torch.testing.assert_close(together[one], alone, atol=1e-6, rtol=1e-5)
    moved = dit.forward_tokens(tokens, positions.flip(0), t, context, mask)
    assert (moved - together).abs().max() > 1e-3


def test_weights_in_bfloat16_need_no_autocast(dit):
    x, t, context, mask = inputs()
    expected = dit(x, t, context, mask)
    got = dit.bfloat16()(x, t, context, mask)
    assert got.dtype is torch.bfloat16
    assert (got - expected).abs().max() / expected.abs().max() < 0.05


def test_blocks_compile_without_graph_breaks(dit):
    """Plain, with a noise level per frame, masked, and with prepared keys and values."""
    x, t, context, mask = inputs()
    mask[1, 3:] = False
    prepared = dit.prepare_context(context, mask)
    calls = [(t, context, mask), (t[:, None].expand(-1, 3), context, None), (t, prepared, None)]
    expected = [dit(x, *call) for call in calls]
    for block in dit.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="eager")
    for call, wanted in zip(calls, expected):
        torch.testing.assert_close(dit(x, *call), wanted, atol=1e-6, rtol=1e-5)


def test_text_matters_and_samples_do_not_mix(dit):
    x, t, context, mask = inputs()
    before = dit(x, t, context, mask)
    context[1] += 1
    after = dit(x, t, context, mask)
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_patches_put_every_value_back_in_its_place(dit):
    """With nothing but linear in and out layers, one changed latent changes its own patch only."""
    for block in dit.blocks:
        block.forward = lambda x, *_: x
    x, t, context, mask = inputs()
    before = dit(x, t, context, mask)
    x[0, 2, 1, 3, 5] += 1
    changed = (dit(x, t, context, mask) - before).abs().amax(dim=(0, 1)) > 0
    expected = torch.zeros(3, 4, 6, dtype=torch.bool)
    expected[1, 2:4, 4:6] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rms_norm_is_torchs(dtype, tolerance):
    norm, theirs = RMSNorm(16, eps=1e-3), torch.nn.RMSNorm(16, eps=1e-3)
    theirs.weight.data = norm.weight.data = torch.rand(16) + 0.5
    x, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 16, dtype=dtype)
    results = []
    for module in (norm.to(dtype), theirs.to(dtype)):
        mine = x.to(dtype).requires_grad_()
        y = module(mine)
        results.append((y, *torch.autograd.grad((y * weight).sum(), (mine, module.weight))))
    for got, expected in zip(*results):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_rms_norm_of_bfloat16_is_rounded_once():
    """Weights stay in float32 under autocast; the gradients have each tensor's dtype."""
    norm, g = RMSNorm(16, eps=1e-6), torch.Generator().manual_seed(0)
    norm.weight.data = torch.rand(16, generator=g) + 0.5
    x = torch.randn(2, 5, 16, generator=g).bfloat16().requires_grad_()
    expected = torch.nn.functional.rms_norm(x.double(), (16,), norm.weight.double(), 1e-6)
    y = norm(x)
    assert torch.equal(y, expected.bfloat16())
    y.sum().backward()
    assert x.grad.dtype is torch.bfloat16
    assert norm.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_the_same_compiled(dtype):
    x = torch.linspace(-20, 20, 4001, dtype=dtype, requires_grad=True)
    compiled = torch.compile(GELU(), backend="eager", fullgraph=True)
    results = [(gelu(x), *torch.autograd.grad(gelu(x).sum(), x)) for gelu in (compiled, GELU())]
    tolerance = 4e-6 if dtype is torch.float32 else 2**-8  # half a unit of bfloat16
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_rotation_is_the_same_compiled():
    x, table = torch.randn(2, 3, 5, 24), rotary_table(torch.randint(0, 9, (2, 5, 3)), 24, 1e4)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rotate(x, table).norm(), x.norm())
    assert (rotate(x, table) - x).abs().max() > 0.1


def test_rotary_scores_depend_on_distances_only():
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64).unbind(0)

    def score(a, b):
        tables = [rotary_table(torch.tensor([p]), 24, 1e4) for p in (a, b)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    moved = score([5.0, 7.0, 2.0], [6.0, 4.0, 2.5])
    torch.testing.assert_close(score([0.0, 3.0, 0.0], [1.0, 0.0, 0.5]), moved, atol=1e-5, rtol=1e-5)
    assert abs(score([0.0, 0.0, 0.0], [1.0, 0.0, 0.5]) - moved) > 1e-4


def test_modulation_is_shared_by_token_groups():
    x = torch.ones(1, 4, 2)
    shift, scale = torch.tensor([[[1.0, 1], [5, 5]]]), torch.tensor([[[0.0, 0], [1, 1]]])
    assert modulate(x, shift, scale)[0, :, 0].tolist() == [2, 2, 7, 7]


def test_gradients_reach_every_parameter(dit):
    x, t, context, mask = inputs()
    dit(x, t, context, mask).square().mean().backward()
    assert [n for n, p in dit.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "dim=48 does not divide into num_heads=5"),
        ({"num_heads": 16}, "even number of at least 6"),
        ({"dim": -1}, "greater than 0"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_config_mistakes(changes, message):
    config = dict(in_channels=4, context_dim=12, dim=48, num_blocks=2, num_heads=4, mlp_dim=96)
    with pytest.raises(ValidationError, match=message):
        DiTConfig(**(config | changes))


def test_sizes_that_do_not_fit(dit):
    x, t, context, mask = inputs(h=5)
    with pytest.raises(ValueError, match="3x5x6 do not divide into patches of 1x2x2"):
        dit(x, t, context, mask)
    x, t, context, mask = inputs()
    with pytest.raises(ValueError, match=r"t has shape \(2, 2\); expected \(2,\) or \(2, 3\)"):
        dit(x, t[:, None].expand(-1, 2), context, mask)
