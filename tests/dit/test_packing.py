"""Clips of different sizes in one row: the same as each by itself."""

import pytest
import torch

from dit.transformer import DiT, DiTConfig

SIZES = [(3, 4, 6), (1, 8, 4), (2, 2, 2), (3, 4, 6), (5, 6, 2)]


def row(sizes=SIZES, words=(5, 1, 3, 7, 2)):
    g = torch.Generator().manual_seed(1)
    clips = [torch.randn(4, *size, generator=g) for size in sizes]
    # By turns one noise level per clip and one per frame, as when the first frame is given.
    t = [torch.rand(() if i % 2 else size[:1], generator=g) for i, size in enumerate(sizes)]
    contexts = []
    for count in words[: len(sizes)]:
        mask = torch.zeros(8, dtype=torch.bool)
        mask[torch.randperm(8, generator=g)[:count]] = True
        contexts.append((torch.randn(8, 12, generator=g), mask))
    return clips, t, contexts


def separately(dit, clips, t, contexts):
    return [
        dit(clip[None], level[None], context[None], None if mask is None else mask[None])[0]
        for clip, level, (context, mask) in zip(clips, t, contexts)
    ]


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1], [(1, 2, 2), (5, 8, 6)], [(2, 4, 4)] * 3])
def test_packed_equals_separate(dit, sizes):
    clips, t, contexts = row(sizes)
    expected = separately(dit, clips, t, contexts)
    got = dit.forward_packed(clips, t, contexts)
    assert [y.shape for y in got] == [clip.shape for clip in clips]
    for mine, wanted in zip(got, expected):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_separate_evaluation(dit):
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clips, t, contexts = row()
    weights = [torch.randn_like(clip) for clip in clips]

    def gradients(predictions):
        loss = sum((y * w).sum() for y, w in zip(predictions, weights))
        return torch.autograd.grad(loss, list(dit.parameters()))

    expected = gradients(separately(dit, clips, t, contexts))
    got = gradients(dit.forward_packed(clips, t, contexts))
    for (name, _), mine, wanted in zip(dit.named_parameters(), got, expected):
        scale = wanted.abs().max()
        if scale > 1e-3:  # a key's bias shifts all scores of a query alike: its gradient is noise
            assert (mine - wanted).abs().max() / scale <= 1e-4, name
    assert sum(wanted.abs().max() > 1e-3 for wanted in expected) > 0.9 * len(expected)


def test_clips_do_not_see_each_other(dit):
    clips, t, contexts = row()
    before = dit.forward_packed(clips, t, contexts)
    clips[1] = clips[1] + 1
    contexts[1] = (contexts[1][0] + 1, contexts[1][1])
    t[1] = t[1] / 2
    after = dit.forward_packed(clips, t, contexts)
    for i, (a, b) in enumerate(zip(before, after)):
        assert torch.equal(a, b) if i != 1 else (a - b).abs().max() > 1e-2


def test_noise_levels_as_one_tensor_and_texts_without_a_mask(dit):
    clips, _, contexts = row()
    t, contexts = torch.rand(len(clips)), [(context, None) for context, _ in contexts]
    expected = separately(dit, clips, t, contexts)
    for mine, wanted in zip(dit.forward_packed(clips, t, contexts), expected):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_patches_of_several_frames():
    torch.manual_seed(0)
    sizes = dict(in_channels=4, context_dim=12, dim=48, num_blocks=2, num_heads=4, mlp_dim=96)
    dit = DiT(DiTConfig(patch_size=(2, 1, 2), **sizes))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clips, t, contexts = row([(4, 3, 6), (2, 8, 4), (6, 1, 2)])
    expected = separately(dit, clips, t, contexts)
    for mine, wanted in zip(dit.forward_packed(clips, t, contexts), expected):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["plain", "sdpa", "flex"])
@torch.no_grad()
def test_every_kernel_gives_the_same(dit, backend):
    clips, t, contexts = row()
    expected = dit.forward_packed(clips, t, contexts)
    dit.use_attention(backend)
    for mine, wanted in zip(dit.forward_packed(clips, t, contexts), expected):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen and compiled flex need CUDA")
@pytest.mark.parametrize("backend", ["auto", "varlen", "flex"])
def test_packed_equals_separate_on_a_gpu(dit, backend):
    """In bfloat16, to two decimals of the largest value."""
    torch.manual_seed(0)
    config = dit.config.model_copy(update={"dim": 64, "num_heads": 4})
    dit = DiT(config).cuda()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clips, t, contexts = row()
    clips, t = [clip.cuda() for clip in clips], [level.cuda() for level in t]
    contexts = [(context.cuda(), mask.cuda()) for context, mask in contexts]
    expected = separately(dit, clips, t, contexts)
    dit.use_attention(backend)
    with torch.autocast("cuda", torch.bfloat16):
        got = dit.forward_packed(clips, t, contexts)
    for mine, wanted in zip(got, expected):
        assert (mine - wanted).abs().max() / wanted.abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t, x: ([], [], []), "0 clips with 0 noise levels and 0 contexts; give one of"),
        (lambda c, t, x: (c, t[:2], x), "3 clips with 2 noise levels and 3 contexts"),
        (lambda c, t, x: (c, [torch.rand(7), *t[1:]], x), r"t has shape \(7,\) for a clip of 3"),
        (
            lambda c, t, x: ([c[0][..., :3], *c[1:]], t, x),
            "3x4x3 do not divide into patches of 1x2x2",
        ),
        (
            lambda c, t, x: (c, t, [(x[0][0], torch.zeros(8, dtype=torch.bool)), *x[1:]]),
            "clip 0 has no text: its context_mask is False everywhere",
        ),
    ],
)
def test_mistakes(dit, change, message):
    with pytest.raises(ValueError, match=message):
        dit.forward_packed(*change(*row(SIZES[:3])))
