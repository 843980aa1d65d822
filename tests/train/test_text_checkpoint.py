"""Frozen pretrained text towers from a local open_clip checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.text import TextConfig, TextEncoder
from train.text_checkpoint import load_text_weights

CONFIG = TextConfig(context_length=12, width=8, num_layers=2, num_heads=2)


def clip_weights(prefix="", positions=16):
    """What open_clip would save for a whole model with this text tower."""
    torch.manual_seed(1)
    tower = TextEncoder(CONFIG.model_copy(update={"context_length": positions}))
    weights = {
        f"{prefix}{k}": torch.randn_like(v) for k, v in tower.transformer.state_dict().items()
    }
    return {
        **weights,
        f"{prefix}text_projection": torch.zeros(8, 4),
        "visual.conv1.weight": torch.zeros(3),
        "logit_scale": torch.zeros(()),
    }


@pytest.mark.parametrize("prefix", ["", "text.", "module.text."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_towers_load_with_and_without_prefix(tmp_path, prefix, suffix):
    weights, path = clip_weights(prefix), tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        save_file(weights, path)
    text = TextEncoder(CONFIG)
    load_text_weights(text, path)
    loaded = text.transformer.state_dict()
    assert torch.equal(loaded["token_embedding.weight"], weights[f"{prefix}token_embedding.weight"])
    assert torch.equal(
        loaded["positional_embedding"], weights[f"{prefix}positional_embedding"][:12]
    )


def test_misfits_are_named(tmp_path):
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    for change, expected in (
        ({"num_layers": 3}, "lacks"),
        ({"num_layers": 1}, "more than recipe.text.num_layers"),
        ({"width": 16}, "recipe.text makes it"),
        ({"context_length": 32}, "context_length"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_text_weights(
                TextEncoder(CONFIG.model_copy(update=change)), tmp_path / "clip.safetensors"
            )


def test_files_that_are_no_checkpoint(tmp_path):
    text = TextEncoder(CONFIG)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_text_weights(text, tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match="not a file of weights"):
            load_text_weights(text, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_text_weights(text, tmp_path / "list.pt")


def test_frozen_text_trains_nothing_and_is_saved_with_the_model(room, tmp_path):
    torch.manual_seed(2)
    config = TextConfig(context_length=24, width=8, num_layers=1, num_heads=2)
    path = tmp_path / "clip.safetensors"
    save_file(TextEncoder(config).transformer.state_dict(), path)
    text = {"trainable": False, "checkpoint": str(path), "causal": True}
    out = room.train(tmp_path / "run", "dit", recipe={"text": text}, train={"steps": 3})
    saved = load_file(out / "model" / "text.safetensors")
    before = load_file(path)
    assert all(torch.equal(saved[f"transformer.{name}"], before[name]) for name in before)
