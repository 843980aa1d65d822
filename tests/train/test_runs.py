"""Whole tiny runs in this process: what they write, and when they stop."""

import json
import math
import os
import shutil

import pytest
import torch
import wandb
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from data.manifest import read_manifest
from data.randomness import permuted_index
from data.video import probe, to_float
from sample.model import load_model
from sample.processes import Ranks
from train import loop
from train.checkpoint import list_checkpoints
from train.clips import read_rows
from train.config import RunConfig
from train.config_data import DataConfig
from train.dit_validation import NUM_T_BINS
from train.logs import TIME_FIELDS, read_log
from train.loop import NonFiniteError
from train.recipe import counted_noise
from train.recipe_dit import DiTRecipe
from train.recipe_vae import VAERecipe
from train.setup import build_recipe, open_data

# Losses of the four log intervals. A change in the networks, the data order, the objective or the
# optimizer shows here; different CPUs and versions of torch differ far less than the tolerance.
GOLDEN = {
    "vae": [0.6695, 0.5724, 0.4974, 0.4559],
    "gan": [0.7261, 1.2354, 1.9757, 1.6594],
    "dit": [1.8906, 1.8192, 1.9404, 1.9903],
}


@pytest.mark.parametrize("kind", ["vae", "gan", "dit"])
def test_run_folder_and_golden_losses(room, tmp_path, kind):
    out = room.train(tmp_path / "run", kind, logging={"sample_interval": 12})
    rows = read_log(out / "log.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:
        assert {"loss", "grad_norm", "lr", *TIME_FIELDS} - {"mfu"} <= row.keys()  # of a CPU
        assert 0 <= row["data_wait_share"] <= 1
        assert all(math.isfinite(value) for value in row.values())
    assert [row["loss"] for row in rows] == pytest.approx(GOLDEN[kind], rel=5e-3)
    validated = [row["step"] for row in rows if any(key.startswith("val/") for key in row)]
    assert validated == [6, 12]
    if kind == "dit":
        assert sum(key.startswith("val/loss/t=") for key in rows[-1]) == NUM_T_BINS
        assert sum(key.startswith("val/x_0_error_shuffled/t=") for key in rows[-1]) == NUM_T_BINS
    else:
        assert {"psnr", "kl", "l1", "val/psnr", "val/l1"} <= rows[-1].keys()

    model = load_model(out / "model")
    assert model.info.provenance["step"] == 12
    assert model.info.provenance["data_fingerprint"]
    assert (model.dit is not None) == (kind == "dit")
    videos = list((out / "samples" / "step-00000012").glob("*.mp4"))
    assert len(videos) == 1
    info = probe(videos[0])
    assert (info.height, info.width) == (16, 16 if kind == "dit" else 32)
    assert (out / "config.yaml").is_file()


def test_vae_export_has_unit_variance_latents(room):
    vae = load_model(room.vae).vae
    assert not torch.equal(vae.latent_std, torch.ones_like(vae.latent_std))
    manifest = read_manifest(room.folder / "train" / "manifest.jsonl")
    data = DataConfig(manifest=manifest.path, num_frames=5, height=16, width=16, fps=8)
    rows = [permuted_index(0, number, 12) for number in range(8)]
    _, video, _ = read_rows(manifest, rows, data, {})
    posterior = vae.encode(to_float(video))
    noise = counted_noise(0, "statistics", rows, posterior.mean.shape[1:], torch.device("cpu"))
    values = posterior.sample(noise).transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(4), atol=3e-3, rtol=0)


def test_exported_weights_are_the_averages(room, tmp_path):
    """A decay of 0 exports the weights themselves; a long one stays near the start."""
    fast = room.train(tmp_path / "fast", "vae", train={"ema": {"decay": 0.0}})
    slow = room.train(tmp_path / "slow", "vae", train={"ema": {"decay": 0.9999, "warmup": False}})
    fast, slow = (load_file(out / "model" / "vae.safetensors") for out in (fast, slow))
    zero_at_start = [name for name in slow if name.endswith("conv_2.weight")]
    assert zero_at_start
    for name in zero_at_start:
        assert slow[name].abs().max() < 0.01 * fast[name].abs().max()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_stops_before_the_update_with_a_dump(room, tmp_path, monkeypatch, where):
    forward = VAERecipe.forward
    weights = []

    def diverge(self, batch):
        losses, values = forward(self, batch)
        weights.append(self.vae.encoder.head.weight.detach().clone())
        if len(weights) == 10:  # the second micro-batch of step 4
            if where == "loss":
                return losses * math.nan, values
            steep = losses * 1e36  # a finite loss with an infinite gradient norm
            return losses.detach() + steep - steep.detach(), values
        return losses, values

    monkeypatch.setattr(VAERecipe, "forward", diverge)
    with pytest.raises(NonFiniteError, match=r"step 4: loss .* stopped before the update"):
        room.train(tmp_path / "run", "vae", train={"grad_accum": 2})
    dump = tmp_path / "run" / "nonfinite-step-4-rank-0"
    report = json.loads((dump / "batch.json").read_text())
    assert [micro["g"] for micro in report["micro_batches"]] == [[16, 17], [18, 19]]
    batch = load_file(dump / "micro-batch-1.safetensors")
    assert batch["video"].shape == (2, 3, 5, 16, 16)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ddpm_trains(room, tmp_path):
    changes = {"recipe": {"objective": {"kind": "ddpm", "prediction": "noise"}}}
    out = room.train(tmp_path / "run", "dit", train={"steps": 3}, **changes)
    objective = load_model(out / "model").objective
    assert (objective.kind, objective.prediction) == ("ddpm", "noise")


def test_bfloat16_keeps_float32_weights(room, tmp_path):
    out = room.train(tmp_path / "run", "dit", train={"dtype": "bfloat16", "steps": 3})
    weights = load_file(out / "model" / "dit.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert math.isfinite(read_log(out / "log.jsonl")[-1]["loss"])


def test_accumulation_changes_nothing(room, tmp_path):
    """Same batch in one, two and four pieces: the same losses, but for rounding."""
    losses = []
    for pieces in (1, 2, 4):
        out = room.train(tmp_path / f"run-{pieces}", "dit", train={"grad_accum": pieces})
        losses.append([row["loss"] for row in read_log(out / "log.jsonl")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_too_many_bad_files_stop_the_run(room, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(room.folder / "train", clips)
    broken = sorted(clips.rglob("*.mp4"))[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    data = {"manifest": str(clips / "manifest.jsonl")}
    with pytest.raises(ValueError, match="of the clips cannot be read"):
        room.train(tmp_path / "strict", "vae", data=data)
    out = room.train(tmp_path / "lenient", "vae", data={**data, "max_bad_share": 0.5})
    assert read_log(out / "log.jsonl")[-1]["step"] == 12
    assert read_log(out / "log.jsonl")[-1]["bad_clips"] == 3
    assert "3 clips could not be read: " in capsys.readouterr().out


@pytest.fixture
def unreadable(room, tmp_path):
    """A manifest of which no clip can be read."""
    clips = tmp_path / "unreadable"
    shutil.copytree(room.folder / "held-out", clips)
    for path in clips.rglob("*.mp4"):
        path.write_bytes(b"")
    return clips / "manifest.jsonl"


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_no_validation_clip_is_noticed_at_the_start(room, tmp_path, unreadable, kind):
    with pytest.raises(ValueError, match=r"none of the first 64 clips of .* can be read"):
        room.train(tmp_path / "run", kind, data={"validation": str(unreadable)})
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_no_statistics_from_nothing(room, tmp_path, unreadable):
    values = room.values(tmp_path, "vae", data={"manifest": str(unreadable)})
    config = RunConfig.model_validate(values)
    recipe = build_recipe(config, open_data(config), Ranks(0, 1, torch.device("cpu"), None))
    assert isinstance(recipe, VAERecipe)
    with pytest.raises(ValueError, match="none of the 4 clips"):
        recipe.measure_latents()


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_rank_without_validation_clips_works(room, tmp_path, kind):
    config = RunConfig.model_validate(room.values(tmp_path, kind, logging={"num_val_clips": 1}))
    alone, main, other = (
        build_recipe(config, open_data(config), Ranks(rank, size, torch.device("cpu"), None))
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert [recipe.load_validation() for recipe in (alone, main, other)] == [1, 1, 0]
    figures = alone.validate()
    assert main.validate() == figures
    sums = []
    object.__setattr__(other.ranks, "sum", lambda values: sums.append(values) or values + 1)
    other.validate()
    assert not sums[0].any()


def test_wandb_offline(room, tmp_path, capsys):
    logging = {"wandb": "offline", "sample_interval": 12}
    out = room.train(tmp_path / "run", "vae", logging=logging)
    output = capsys.readouterr().out
    assert "wandb stopped" not in output
    assert "wandb did not" not in output
    (run,) = (out / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    assert len(list(run.rglob("*.mp4"))) == 1


def test_failing_wandb_does_not_stop_a_run(room, tmp_path, monkeypatch, capsys):
    class Broken:
        def log(self, *args, **kwargs):
            raise RuntimeError("no disk")

    started = []

    def init(**kwargs):
        started.append(kwargs)
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    out = room.train(tmp_path / "run", "vae", logging={"wandb": "auto"})
    assert started[0]["mode"] == "offline"
    room.train(tmp_path / "other", "vae", logging={"wandb": "auto"})
    shutil.rmtree(out / "model")
    room.train(out, "vae", logging={"wandb": "auto"})
    first, other, again = (start["id"] for start in started)
    assert first == again != other
    assert len(read_log(out / "log.jsonl")) == 4
    assert capsys.readouterr().out.count("wandb stopped (RuntimeError: no disk)") == 2


def test_captions_are_dropped_by_counter(room, tmp_path):
    values = room.values(tmp_path, "dit", recipe={"caption_dropout": 0.5})
    config = RunConfig.model_validate(values)
    recipe = build_recipe(config, open_data(config), Ranks(0, 1, torch.device("cpu"), None))
    assert isinstance(recipe, DiTRecipe)
    items = {
        "g": list(range(8, 12)),
        "captions": ["red"] * 4,
        "mean": torch.zeros(4, *recipe.latent_shape),
        "std": torch.ones(4, *recipe.latent_shape),
    }
    batch = recipe.make_batch(items, step=2)
    empty = recipe.text.tokenize([""])[0]
    dropped = [torch.equal(ids, empty) for ids in batch["ids"]]
    alone = ({key: value[i : i + 1] for key, value in items.items()} for i in range(4))
    assert dropped == [torch.equal(recipe.make_batch(i, 2)["ids"][0], empty) for i in alone]
    many = sum(
        torch.equal(ids, empty)
        for step in range(50)
        for ids in recipe.make_batch({**items, "g": [4 * step + i for i in range(4)]}, step)["ids"]
    )
    assert 70 < many < 130


def test_samples_that_fail_do_not_stop_a_run(room, tmp_path, monkeypatch, capsys):
    def fail(self, progress):
        progress()
        assert list_checkpoints(self.config.out / "checkpoints")  # written before
        raise ValueError("not finite")

    monkeypatch.setattr("train.recipe_vae.VAERecipe.samples", fail)
    logging = {"sample_interval": 6}
    steps = {"checkpoint_interval": 6, "async_checkpoints": False}
    out = room.train(tmp_path / "run", "vae", train=steps, logging=logging)
    assert "no samples after step 6: not finite" in capsys.readouterr().out
    assert (out / "model" / "model.yaml").is_file()


def test_a_full_disk_is_one_line(room, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})

    steps = {"checkpoint_interval": 6}
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint_writer.save", full)
        with pytest.raises(
            OSError, match=r"step-00000006: the checkpoint cannot be written .*No space"
        ):
            room.train(tmp_path / "run", "vae", train=steps)
    room.train(tmp_path / "run", "vae", train=steps)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_a_file_that_hangs_holds_up_nothing(room, tmp_path, monkeypatch):
    """Neither validation, nor training, nor the statistics of an export; nobody asks for it twice."""
    folder = tmp_path / "clips"
    shutil.copytree(room.folder / "train", folder)
    stuck = sorted(folder.rglob("*.mp4"))[1]
    stuck.unlink()
    os.mkfifo(stuck)  # whoever opens it waits for ever
    data = {"manifest": str(folder / "manifest.jsonl"), "validation": None}
    data |= {"num_workers": 1, "file_seconds": 2, "max_bad_share": 0.2}
    out = room.train(
        tmp_path / "run", "vae", data=data, train={"steps": 6, "checkpoint_interval": 3}
    )
    assert (out / "model" / "model.yaml").is_file()
    (_, first), (_, last) = list_checkpoints(out / "checkpoints")
    state = json.loads((first / "state.json").read_text())
    assert state["unread"] == {str(stuck): "quarantined: it took longer than 2 s"}
    assert state["quarantine"] == state["unread"]

    known, make = [], loop.make_loader
    look = lambda *a: (known.append(dict(a[4])), make(*a))[1]  # noqa: E731
    monkeypatch.setattr(loop, "make_loader", look)
    shutil.rmtree(last)
    room.train(out, "vae", data=data, train={"steps": 6, "checkpoint_interval": 3})
    assert known == [state["quarantine"]]
