"""The latent cache: equal to encoding on the fly, resumable, and never silently stale."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.dataset import ClipDataset
from data.manifest import read_manifest
from sample.model import load_model
from sample.processes import Ranks
from train import latent_cache
from train.cache_folder import hash_weights
from train.config_data import DataConfig
from train.latent_cache import LatentCache, read_posterior
from train.latents import CachedLatents
from train.logs import read_log

RANKS = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture
def clips(room, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(room.folder / "train", folder)
    return folder


@pytest.fixture
def data(clips):
    size = {"num_frames": 5, "height": 16, "width": 16, "fps": 8.0}
    return DataConfig(manifest=clips / "manifest.jsonl", random_start=False, **size)


@pytest.fixture
def vae(room):
    return load_model(room.vae).vae


def make(data, vae, folder, dtype="float32"):
    cache = LatentCache(folder, read_manifest(data.manifest), data, dtype)
    cache.build(vae, RANKS)
    return cache


def dataset(cache, max_bad_share=0.0, **options):
    """Of the samples that the clips themselves would give."""
    size = {"num_frames": 5, "height": 16, "width": 16, "fps": 8.0}
    live = ClipDataset(cache.manifest, **size, seed=3, random_start=False)
    return CachedLatents(cache, live, max_bad_share, **options)


@pytest.mark.parametrize("memory", [0.0, 1e9])
def test_same_order_captions_and_posteriors_as_the_clips(data, vae, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 5)
    cached = dataset(make(data, vae, tmp_path / "cache"), memory=memory)
    assert cached.request(0).is_here == bool(memory)
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == 3
    manifest = read_manifest(data.manifest)
    live = ClipDataset(manifest, num_frames=5, height=16, width=16, fps=8.0, seed=3)
    wordings = set()
    for g in (0, 5, 11, 12, 40):  # in the first epoch and in later ones
        item, sample = cached[g], live[g]
        assert item["caption"] == sample["caption"]
        wordings.add(manifest.rows[sample["row"]].captions.index(sample["caption"]))
        posterior = vae.encode(sample["video"][None].float() / 127.5 - 1)
        torch.testing.assert_close(item["mean"], posterior.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(item["std"], posterior.std[0], atol=1e-5, rtol=1e-5)
    assert len(wordings) > 1


def test_cached_training_equals_uncached(room, tmp_path):
    data = {"random_start": False}
    plain = room.train(tmp_path / "plain", "dit", data=data)
    recipe = {"latent_cache": str(tmp_path / "cache"), "cache_dtype": "float32"}
    cached = room.train(tmp_path / "cached", "dit", recipe=recipe, data={**data, "num_workers": 1})
    plain, cached = ([r["loss"] for r in read_log(x / "log.jsonl")] for x in (plain, cached))
    assert cached == pytest.approx(plain, abs=1e-5)


def test_interrupted_build_goes_on(data, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 5)
    cache = make(data, vae, tmp_path / "cache")
    before = cache.shard(0).stat().st_mtime_ns
    content = cache.shard(1).read_bytes()
    cache.shard(1).unlink()
    make(data, vae, tmp_path / "cache")
    assert cache.shard(1).read_bytes() == content
    assert cache.shard(0).stat().st_mtime_ns == before


def test_mismatch_names_the_part(data, vae, clips, tmp_path):
    folder = tmp_path / "cache"
    make(data, vae, folder)
    make(data, vae, folder)  # the same again is fine
    with pytest.raises(ValueError, match=r"another transform.*delete the folder"):
        make(data.model_copy(update={"fps": 10.0}), vae, folder)
    with pytest.raises(ValueError, match="another dtype"):
        make(data, vae, folder, "float16")
    with torch.no_grad():
        vae.latent_std.mul_(1.5)
    with pytest.raises(ValueError, match="another VAE"):
        make(data, vae, folder)
    vae.latent_std.div_(1.5)
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    rows[3]["caption"] = "something else"
    (clips / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(data, vae, folder)  # captions are no part of the latents
    rows[3]["end"] = 0.9
    (clips / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="another list of clips"):
        make(data, vae, folder)


def test_the_decoder_is_no_part_of_latents(data, vae, tmp_path):
    """Nor is a cache of a version that counted it in refused, with the decoder it was made with."""
    folder = tmp_path / "cache"
    make(data, vae, folder)
    index = folder / "index.json"
    before, whole = index.read_text(), hash_weights(vae)
    new, old = (json.loads(before) for _ in range(2))
    old["fingerprint"]["VAE"] = whole
    index.write_text(json.dumps(old))
    make(data, vae, folder)
    with torch.no_grad():
        vae.decoder.stem.weight.mul_(1.5)
    with pytest.raises(ValueError, match=f"another VAE: it has {whole}"):
        make(data, vae, folder)
    index.write_text(before)
    make(data, vae, folder)
    with torch.no_grad():
        vae.encoder.head.weight.mul_(1.5)
    with pytest.raises(ValueError, match=f"another VAE: it has {new['fingerprint']['VAE']}"):
        make(data, vae, folder)


def test_changed_file_is_noticed(data, vae, clips, tmp_path):
    folder = tmp_path / "cache"
    make(data, vae, folder)
    clip = sorted(clips.rglob("*.mp4"))[2]
    stat = clip.stat()
    os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another version of the media files"):
        make(data, vae, folder)
    os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make(data, vae, folder)


def test_start_that_was_cut_short_goes_on(data, vae, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".index.json.17.partial").write_text('{"finger')
    assert make(data, vae, tmp_path / "cache").bad() == {}


def test_folder_with_something_else_is_left_alone(data, vae, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="something else in it"):
        make(data, vae, tmp_path / "photos")


def test_unreadable_clips_are_left_out_and_counted(data, vae, clips, tmp_path):
    broken = sorted(clips.rglob("*.mp4"))[2]
    broken.write_bytes(b"")
    cache = make(data, vae, tmp_path / "cache")
    assert list(cache.bad()) == [2]
    assert "000002.mp4" in cache.bad()[2]
    cached = dataset(cache, max_bad_share=0.1)
    live = ClipDataset(
        cache.manifest, num_frames=5, height=16, width=16, fps=8.0, seed=3, random_start=False
    )
    for g in range(24):  # the same substitute, and the same clip named as bad
        item, sample = cached[g], live[g]
        assert (item["row"], item["caption"]) == (sample["row"], sample["caption"])
        assert [name for name, _ in item["bad"]] == [name for name, _ in sample["bad"]]
    with pytest.raises(ValueError, match=r"1 of 12 clips cannot be read, a share of 0\.083"):
        dataset(cache, max_bad_share=0.05)


@pytest.mark.parametrize("damage", ["cut", "empty", "fewer", "no rows", "index", "empty index"])
def test_damaged_cache_is_named(data, vae, tmp_path, damage):
    cache = make(data, vae, tmp_path / "cache")
    shard, index = cache.shard(0), tmp_path / "cache" / "index.json"
    whole = load_file(shard)
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "empty":
            shard.write_bytes(b"")
        case "fewer":
            save_file({name: tensor[:2].clone() for name, tensor in whole.items()}, shard)
        case "no rows":
            save_file({"mean": whole["mean"], "std": whole["std"]}, shard)
        case "index":
            index.write_text("[]")
        case "empty index":
            index.write_text("")
    with pytest.raises(ValueError, match="is damaged; delete"):
        dataset(make(data, vae, tmp_path / "cache"))


def test_flipped_bit_is_noticed_when_it_is_read(data, vae, tmp_path):
    cache = make(data, vae, tmp_path / "cache")
    path = cache.shard(0)
    whole = path.read_bytes()
    assert read_posterior(path, 0).shape == (2, *vae.latent_shape(5, 16, 16))
    path.unlink()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    cached = dataset(cache)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged; delete"):
        [cached[g] for g in range(12)]
