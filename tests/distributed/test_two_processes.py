"""Two processes train as one does, and stop together."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from train.logs import read_log

TWENTY = {"train": {"steps": 20, "checkpoint_interval": 10}, "logging": {"interval": 1}}

DIVERGE_ON_ONE_RANK = """
import math, os
from train.cli import main
from train.recipe_vae import VAERecipe
import sys

forward, calls = VAERecipe.forward, []

def diverge(self, batch):
    losses, values = forward(self, batch)
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        losses = losses * math.nan
    return losses, values

VAERecipe.forward = diverge
main(["train", sys.argv[1]])
"""


@pytest.mark.parametrize("kind", ["vae", "gan", "dit"])
def test_same_losses_as_one_process(room, torchrun, tmp_path, kind):
    """Also with the latent cache, which both ranks fill together."""
    changes = dict(TWENTY)
    if kind == "gan":
        # Adam divides by a gradient's usual size; where a discriminator's gradients are next to zero at
        # first, that makes rounding errors as large as steps. A larger eps keeps them small.
        optimizer = {"kind": "adamw", "lr": 2e-3, "eps": 3e-2}
        changes["train"] = {**TWENTY["train"], "optimizer": optimizer}
    if kind == "dit":
        changes["recipe"] = {"latent_cache": str(tmp_path / "latents"), "cache_dtype": "float32"}
        changes["data"] = {"random_start": False}
    code, output = torchrun("-m", "train", room.write(tmp_path / "two", kind, **changes))
    assert code == 0, output
    one = room.train(tmp_path / "one", kind, **changes)
    keys = ["loss", "grad_norm", *(["grad_norm_discriminator"] if kind == "gan" else [])]
    for key in keys:
        single, double = (
            [row[key] for row in read_log(out / "log.jsonl")] for out in (one, tmp_path / "two")
        )
        assert len(single) == 20
        assert double == pytest.approx(single, abs=1e-5)
    part = "dit.safetensors" if kind == "dit" else "vae.safetensors"
    weights, others = (load_file(out / "model" / part) for out in (one, tmp_path / "two"))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=2e-4, rtol=1e-3)

    # One process goes on from what two have written.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000020")
    room.train(tmp_path / "two", kind, **changes)
    resumed = [row["loss"] for row in read_log(tmp_path / "two" / "log.jsonl")]
    assert resumed == pytest.approx([row["loss"] for row in read_log(one / "log.jsonl")], abs=1e-5)


def test_occupied_folder_stops_both(room, torchrun, tmp_path):
    with room.occupied(tmp_path / "run"):
        code, output = torchrun("-m", "train", room.write(tmp_path / "run", "vae"))
    assert code != 0
    assert "run: another process is training into this folder" in output


def test_nonfinite_on_one_rank_stops_both(room, torchrun, tmp_path):
    script = tmp_path / "diverge.py"
    script.write_text(DIVERGE_ON_ONE_RANK)
    code, output = torchrun(script, room.write(tmp_path / "run", "vae"))
    assert code != 0
    assert "zoetrope: error: step 2: loss nan" in output
    for rank in (0, 1):
        assert (tmp_path / "run" / f"nonfinite-step-2-rank-{rank}" / "batch.json").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()
