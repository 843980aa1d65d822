"""The text encoders: open_clip's own tokens, masks, trainable or frozen; umT5's padding."""

import open_clip
import pytest
import torch
from pydantic import ValidationError

from dit.text import TextConfig, TextEncoder
from dit.umt5 import UMT5Config, UMT5Encoder, clean_prompt

SMALL = dict(context_length=16, width=32, num_layers=1, num_heads=2)
CAPTIONS = ["a red circle moving left", "", "a large blue square"]


@pytest.mark.parametrize("causal", [False, True])
def test_states_and_mask(causal):
    encoder = TextEncoder(TextConfig(**SMALL, causal=causal))
    context, mask = encoder(encoder.tokenize(CAPTIONS))
    assert context.shape == (3, 16, 32)
    assert encoder.width == 32
    assert mask.sum(dim=1).tolist() == [7, 2, 6]  # words, start and end
    assert torch.isfinite(context).all()


def test_padding_changes_nothing():
    encoder = TextEncoder(TextConfig(**SMALL, causal=False)).eval()
    ids = encoder.tokenize(CAPTIONS[:1])
    whole, mask = encoder(ids)
    short, _ = encoder(ids[:, :7])
    torch.testing.assert_close(whole[:, :7], short, atol=1e-5, rtol=1e-4)
    assert not mask[:, 7:].any()


def test_word_order_matters():
    encoder = TextEncoder(TextConfig(**SMALL, causal=False))
    ids = encoder.tokenize(["a red circle on a blue square", "a blue circle on a red square"])
    (a, b), _ = encoder(ids)
    assert (a[3] - b[3]).abs().max() > 1e-3  # "circle" stands at the same place in both


def test_a_caption_that_is_too_long_is_cut_and_still_ends():
    encoder = TextEncoder(TextConfig(**SMALL))
    ids = encoder.tokenize(["red " * 50])
    assert ids.shape == (1, 16)
    assert ids[0, -1] == 49_407
    _, mask = encoder(ids)
    assert mask.all()


def test_a_zero_id_inside_a_caption_is_not_padding():
    encoder = TextEncoder(TextConfig(**SMALL, causal=False))
    ids = encoder.tokenize(["red circle"])
    ids[0, 1] = 0  # "!" is token 0 in CLIP's vocabulary
    _, mask = encoder(ids)
    assert mask.sum() == 4


def test_states_equal_open_clips_own_tower():
    clip = open_clip.create_model("ViT-B-32", pretrained=None)
    config = TextConfig(num_layers=12)
    encoder = TextEncoder(config)
    own = {k.removeprefix("transformer."): v for k, v in encoder.transformer.state_dict().items()}
    theirs = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    names = encoder.transformer.state_dict().keys()
    assert own
    assert set(names) <= set(theirs)
    encoder.transformer.load_state_dict({k: theirs[k] for k in names})
    ids = encoder.tokenize(CAPTIONS)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))
    states, _ = encoder.eval()(ids)
    pooled = states[torch.arange(3), ids.argmax(-1)] @ clip.text_projection
    torch.testing.assert_close(pooled, clip.eval().encode_text(ids), atol=1e-5, rtol=1e-4)


def test_frozen_unless_trainable():
    assert not any(p.requires_grad for p in TextEncoder(TextConfig(**SMALL)).parameters())
    trained = TextEncoder(TextConfig(**SMALL, trainable=True))
    assert all(p.requires_grad for p in trained.parameters())
    with pytest.raises(ValidationError, match="width=30 does not divide into num_heads=4"):
        TextConfig(width=30, num_heads=4)


def tiny_umt5(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=20, width=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32)
    return UMT5Encoder(UMT5Config(**shape, context_length=8, **changes), None).eval()


def test_umt5_states_are_zero_behind_the_prompt_and_none_is_hidden():
    """tests/parity compares them with transformers'."""
    ids = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0], [5, 0, 7, 1, 0, 0, 0, 0], [9] * 7 + [1]])
    states, mask = tiny_umt5()(ids)
    assert mask.all()
    assert mask.shape == (3, 8)
    assert [int(row.any(dim=-1).sum()) for row in states] == [4, 4, 8]  # a 0 inside is a token


def test_umt5_padding_changes_nothing():
    encoder, ids = tiny_umt5(), torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0]])
    whole, _ = encoder(ids)
    short, _ = encoder(ids[:, :4])
    assert short.std() > 0.1
    torch.testing.assert_close(whole[:, :4], short, atol=1e-5, rtol=0)


def test_umt5_is_frozen_unless_trainable():
    assert not any(p.requires_grad for p in tiny_umt5().parameters())
    assert all(p.requires_grad for p in tiny_umt5(trainable=True).parameters())


def test_prompts_are_cleaned():
    assert clean_prompt("  a &amp;amp; b\n\tcafÃ© ") == "a & b café"
