"""train.launch ends as its processes do, and tells them to stop once."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from train.launch import _pass_on, exit_code, main

# Stands for training: says which signals it got, and takes a while to write its checkpoint.
WORKER = """
import os, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
with open(f"{sys.argv[1]}/rank-{os.environ['RANK']}", "w") as file:
    while not got:
        time.sleep(0.01)
    time.sleep(0.5)
    print(*got, file=file, flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], 75),
        ([-signal.SIGTERM, 75], 75),  # one was still closing its log when the other had ended
        ([2, 75], 2),  # stopped by torchrun because of the other's mistake
        ([75, -signal.SIGKILL], 128 + signal.SIGKILL),
        ([1, 2], 1),  # the first
    ],
)
def test_exit_code(codes, expected):
    failures = [SimpleNamespace(exitcode=code, timestamp=n) for n, code in enumerate(codes)]
    assert exit_code(failures) == expected


def test_stops_every_process_once(tmp_path, room):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "train.launch", "--standalone", "--nproc-per-node", "2"]
    launch = subprocess.Popen(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks = [tmp_path / f"rank-{rank}" for rank in range(2)]
    for path in ranks:
        room.wait_for(path, launch)
    launch.terminate()
    output = launch.communicate(timeout=60)[0]
    assert launch.returncode == 75, output
    assert [path.read_text() for path in ranks] == [f"{int(signal.SIGTERM)}\n"] * 2


@pytest.mark.parametrize(("variable", "expected"), [("OTHER", 75), ("SLURM_STEP_ID", 0)])
def test_signal_without_processes(monkeypatch, variable, expected):
    """It ends, where it waits for other nodes; but under Slurm, where they get signals of their own."""
    monkeypatch.setenv(variable, "0")
    process = os.fork()  # which has no processes of its own yet
    if process == 0:
        with suppress(SystemExit):
            _pass_on(signal.SIGTERM, None)
            os._exit(0)
        os._exit(75)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == expected


def test_restarts_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", "--max-restarts", "3", "x.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == (
        "zoetrope: error: --max-restarts is the scheduler's here; use 0\n"
    )
