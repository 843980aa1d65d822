"""A tiny rendered world, tiny configs, and ways to run them."""

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from data.world_files import WorldSpec, write_world
from train.config_file import load_config
from train.loop import train

_spec = importlib.util.spec_from_file_location("nursery", Path(__file__).with_name("nursery.py"))
_nursery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_nursery)

VAE = {
    "kind": "vae",
    "vae": {"latent_channels": 4, "widths": [8, 12], "factors": [[2, 2], [2, 2]]},
    "num_statistics_clips": 8,
}
# With everything that a VAE may be trained on, but a perceptual network.
GAN = {
    **VAE,
    "vae": {**VAE["vae"], "stem": "haar", "antialias": True},
    "charbonnier_epsilon": 0.01,
    "temporal_weight": 0.5,
    "channels_last": True,
    "adversarial": {
        "start_step": 5,
        "ramp_steps": 4,
        "discriminator": {"width": 4, "num_layers": 2},
        "r1_interval": 3,
    },
}
DIT = {
    "kind": "dit",
    "dit": {"dim": 24, "num_blocks": 1, "num_heads": 2, "mlp_dim": 32},
    "text": {
        "context_length": 24,
        "width": 8,
        "num_layers": 1,
        "num_heads": 2,
        "causal": False,
        "trainable": True,
    },
    "objective": {"kind": "flow", "shift": 3.0},
}


def deep_update(base, changes):
    """`base` with the nested values of `changes` put over it; another `kind` replaces a section."""
    if changes.get("kind", base.get("kind")) != base.get("kind"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_update(merged[key], value) if nested else value
    return merged


class Room:
    """A folder with a rendered world and a trained VAE, to start runs in."""

    recipes: ClassVar = {"vae": VAE, "gan": GAN, "dit": DIT}

    def __init__(self, folder):
        self.folder = folder
        self.vae = folder / "vae" / "model"

    def render(self):
        for split, clips in (("train", 12), ("held-out", 4)):
            spec = WorldSpec(clips, 1, split, 1, height=16, width=16, num_frames=5, fps=8.0)
            write_world(self.folder / split, spec, workers=1)

    def values(self, out, kind, **changes):
        """The raw values of a config."""
        recipe = dict(self.recipes[kind])
        if recipe["kind"] == "dit":
            recipe["vae"] = str(self.vae)
        base = {
            "out": str(out),
            "device": "cpu",
            "data": {
                "manifest": str(self.folder / "train" / "manifest.jsonl"),
                "validation": str(self.folder / "held-out" / "manifest.jsonl"),
                "num_frames": 5,
                "height": 16,
                "width": 16,
                "fps": 8.0,
            },
            "recipe": recipe,
            "train": {
                "steps": 12,
                "batch_size": 4,
                "dtype": "float32",
                "optimizer": {"kind": "adamw", "lr": 2e-3},
                "schedule": {"warmup_steps": 3},
                "checkpoint_interval": 100,
                "threads": 1,
            },
            "logging": {
                "interval": 3,
                "val_interval": 6,
                "sample_interval": 100,
                "num_samples": 1,
                "sample_steps": 2,
                "wandb": "disabled",
            },
        }
        return deep_update(base, changes)

    def write(self, out, kind, **changes):
        """The path of a config file."""
        path = Path(out).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.values(out, kind, **changes)))
        return path

    def train(self, out, kind, **changes):
        """Trains in this process; returns the run's folder."""
        train(load_config(self.write(out, kind, **changes)))
        return Path(out)

    def start(self, config, *overrides, **environment):
        """`python -m train CONFIG ...` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "train", str(config), *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextmanager
    def occupied(self, out):
        """Inside it another process holds the folder of a run."""
        out.mkdir(parents=True, exist_ok=True)
        code = (
            "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(out / ".lock")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield
            process.communicate()

    def wait_for(self, path, process, seconds=120):
        """Until `path` exists; fails when the process ends before it does."""
        limit = time.monotonic() + seconds
        while not path.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        assert path.exists(), process.communicate()[0]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    room = Room(tmp_path_factory.mktemp("room"))
    room.render()
    room.train(room.folder / "vae", "vae")
    return room


@pytest.fixture(scope="session")
def nursery():
    """Starts processes that have imported everything already; see nursery.py."""
    nursery = _nursery.Nursery()
    yield nursery
    nursery.close()
