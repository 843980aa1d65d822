"""States of frozen text encoders: from the cache as from the encoder, and never of another."""

import pytest
import torch
from safetensors.torch import save_file

from data.manifest import read_manifest, write_manifest
from dit.text import TextConfig, TextEncoder
from sample.processes import Ranks
from train import text_cache
from train.cache_folder import open_shard
from train.logs import read_log
from train.text_cache import TextCache

RANKS = Ranks(0, 1, torch.device("cpu"), None)
CONFIG = TextConfig(context_length=24, width=8, num_layers=1, num_heads=2)
CAPTIONS = ["a red circle", ["a", "a blue square moves left on a very long way to the other side"]]


class Padded(torch.nn.Module):
    """As umT5 is here: states behind the prompt are zero, and all are visible."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG
        self.states = torch.nn.Embedding(60_000, 8).requires_grad_(False)
        self.inner = TextEncoder(CONFIG)

    def tokenize(self, captions):
        return self.inner.tokenize(captions)

    def forward(self, ids):
        shown = ids != 0
        return self.states(ids) * shown[..., None], torch.ones_like(shown)


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [{"path": "a.mp4", "caption": caption} for caption in CAPTIONS])
    return read_manifest(path)


def make(kind=TextEncoder):
    torch.manual_seed(0)
    text = TextEncoder(CONFIG) if kind is TextEncoder else kind()
    for parameter in text.parameters():
        torch.nn.init.normal_(parameter)
    return text.requires_grad_(False)


@pytest.mark.parametrize("kind", [TextEncoder, Padded])
def test_states_are_those_of_the_encoder(tmp_path, manifest, monkeypatch, kind):
    monkeypatch.setattr(text_cache, "SHARD_CAPTIONS", 2)
    text = make(kind)
    cache = TextCache(tmp_path / "cache", manifest, "float32")
    cache.build(text, RANKS)
    assert len(list((tmp_path / "cache" / "text").glob("shard-*"))) == 2
    wanted = [CAPTIONS[1][1], "", "a", CAPTIONS[0], "a"]
    states, mask = cache.read(wanted)
    expected, expected_mask = text(text.tokenize(wanted))
    assert torch.equal(mask, expected_mask)
    shown = expected_mask[..., None]
    # Not bit for bit: the encoder had other captions in its batch.
    torch.testing.assert_close(states * shown, expected * shown, atol=1e-5, rtol=1e-5)


def test_what_differs_is_named(tmp_path, manifest):
    text = make()
    cache = TextCache(tmp_path / "cache", manifest, "float32")
    cache.build(text, RANKS)
    cache.build(text, RANKS)
    with pytest.raises(ValueError, match=r"text cache .* was made with another dtype"):
        TextCache(tmp_path / "cache", manifest, "float16").build(text, RANKS)
    with torch.no_grad():
        next(text.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="another text encoder"):
        cache.build(text, RANKS)
    write_manifest(tmp_path / "n.jsonl", [{"path": "a.mp4", "caption": "new words"}])
    other = TextCache(tmp_path / "cache", read_manifest(tmp_path / "n.jsonl"), "float32")
    with pytest.raises(ValueError, match="another set of captions"):
        other.build(make(), RANKS)


def test_damage_is_noticed(tmp_path, manifest):
    text = make()
    cache = TextCache(tmp_path / "cache", manifest, "float32")
    cache.build(text, RANKS)
    path = cache.shard(0)
    whole = bytearray(path.read_bytes())
    place = whole.find(open_shard(path).get_tensor("states").numpy().tobytes()[:32])
    whole[place + 5] ^= 1
    path.unlink()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"text cache: .*shard-00000.safetensors is damaged"):
        cache.read(["", "a", "a red circle"])
    path.unlink()
    cache.build(text, RANKS)
    cache.read(["", "a", "a red circle"])


def test_training_with_it_equals_training_with_the_encoder(room, tmp_path):
    save_file(make().transformer.state_dict(), tmp_path / "clip.safetensors")
    frozen = {**CONFIG.model_dump(), "checkpoint": str(tmp_path / "clip.safetensors")}
    frozen["trainable"] = False
    same = {"recipe": {"text": frozen, "caption_dropout": 0.3}, "data": {"random_start": False}}
    plain = room.train(tmp_path / "plain", "dit", **same)
    cache = {"latent_cache": str(tmp_path / "cache"), "cache_dtype": "float32"}
    same["recipe"] |= cache
    cached = room.train(tmp_path / "cached", "dit", **same)
    assert (tmp_path / "cache" / "text" / "index.json").is_file()
    plain, cached = ([r["loss"] for r in read_log(x / "log.jsonl")] for x in (plain, cached))
    assert cached == pytest.approx(plain, abs=1e-4)
