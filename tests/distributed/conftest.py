"""The tiny world and configs of tests/train, and torchrun."""

import contextlib
import importlib.util
import os
import random
import socket
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
def torchrun(tmp_path_factory):
    """`torchrun --standalone --nproc-per-node ...`; returns (exit code, all output)."""
    # torch.compile's cache is shared among all processes of a user. A process that is killed, as some
    # tests do, may leave half a library there, which the next one then cannot load.
    cache = str(tmp_path_factory.mktemp("inductor"))

    def run(*arguments, processes=2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*command, "--nproc-per-node", str(processes), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=550,
        )
        return result.returncode, result.stdout + result.stderr

    return run


# Starting processes takes most of the time: they do one thing after the other, each of which meets at a
# store of its own.
_SEVERAL = """
import os, sys
from train.cli import main
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for line in open(sys.argv[1]):
    port, *arguments = line.rstrip("\\n").split("\\t")
    os.environ["MASTER_PORT"] = port
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="session")
def free_port():
    """Finds a port that nothing listens at, of those that systems do not hand out by themselves: what
    is found may be used minutes later."""

    def find():
        for port in random.sample(range(15_000, 30_000), 1_000):
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.bind(("localhost", port))
                return port
        raise RuntimeError("no free port")

    return find


@pytest.fixture(scope="session")
def several(torchrun, free_port, tmp_path_factory):
    """Commands of `zoetrope`, one after the other in the same processes: (exit code, all output)."""

    def run(commands, processes):
        folder = tmp_path_factory.mktemp("several")
        lines = ["\t".join(map(str, (free_port(), *command))) for command in commands]
        (folder / "commands.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / "several.py").write_text(_SEVERAL)
        code, output = torchrun(folder / "several.py", folder / "commands.txt", processes=processes)
        # Of hundreds of lines those of training say nothing about what went wrong.
        lines = [line for line in output.splitlines() if not line.startswith("step ")]
        return code, "\n".join(lines[-80:])

    return run
