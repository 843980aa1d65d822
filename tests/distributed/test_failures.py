"""Stalls, ranks that differ, preemption of one rank, a killed rank: through torchrun."""

import os
import signal
import time

import pytest

from train.checkpoint import list_checkpoints
from train.logs import TIME_FIELDS, read_log

# A run with something that one rank does at a time: argv is config, rank, then what is given.
START = """
import os, signal, sys, time
from train import cli
from train.recipe_vae import VAERecipe

odd = os.environ["RANK"] == sys.argv[2]
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
calls = []
"""
STALL_IN_DATA = (
    START
    + """
from train.clips import TrainingClips
read = TrainingClips.__getitem__

def stalled(self, g):
    if odd and g >= 8:
        time.sleep(1000)
    return read(self, g)

TrainingClips.__getitem__ = stalled
cli.main(["train", sys.argv[1]])
"""
)
STALL_IN_FORWARD = (
    START
    + """
forward = VAERecipe.forward

def stalled(self, batch):
    calls.append(1)
    if odd and len(calls) == 3:
        time.sleep(1000)
    return forward(self, batch)

VAERecipe.forward = stalled
cli.main(["train", sys.argv[1]])
"""
)


def script(folder, text):
    path = folder / "start.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("where", "text", "phase"),
    [
        ("data", STALL_IN_DATA, "waiting for data in step 3"),
        ("forward", STALL_IN_FORWARD, "in the forward pass in step 3"),
    ],
)
def test_a_stalled_rank_is_named(room, torchrun, tmp_path, where, text, phase):
    config = room.write(tmp_path / "run", "vae", train={"stall_timeout": 4})
    code, output = torchrun(script(tmp_path, text), config, "1")
    assert code != 0
    assert output.count("zoetrope: error: stalled: ") == 1, output
    (line,) = (line for line in output.splitlines() if "stalled: " in line)
    assert "stalled: rank 1 (" in line
    assert f"has been {phase} for" in line
    assert "s; the other 1 waits for it" in line
    for rank in (0, 1):
        stacks = (tmp_path / "run" / "stalls" / f"rank-{rank}.txt").read_text()
        assert ("in stalled" in stacks) == (rank == 1)
    assert "exitcode  : 70" in output
