"""The tiny world and configs of tests/train, and torchrun."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "tiny_training_room", Path(__file__).parents[1] / "train" / "conftest.py"
)
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
one_thread, room, nursery = _tiny.one_thread, _tiny.room, _tiny.nursery


@pytest.fixture(scope="session")
def torchrun():
    """`torchrun --standalone --nproc-per-node ...`; returns (exit code, all output)."""

    def run(*arguments, processes=2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*command, "--nproc-per-node", str(processes), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return result.returncode, result.stdout + result.stderr

    return run
