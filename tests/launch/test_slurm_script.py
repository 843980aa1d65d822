"""What slurm.sh does when training has ended, on a cluster whose every answer is made up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "launch" / "slurm.sh"

COMMANDS = {
    "srun": 'echo "$@" >>"$BOOK/srun"; exit "$CODE"',
    "scontrol": """case $1 in
requeue) echo "$2" >>"$BOOK/requeued" ;;
*) [ "$2" = hostnames ] && printf 'n1\\nn2\\n' || echo "NodeName=$4 NodeAddr=$4.cluster Port=1" ;;
esac""",
    "squeue": 'echo "$STATE"',
    "sleep": "",
}


@pytest.fixture
def sbatch(tmp_path):
    """Runs slurm.sh as a job whose training ends with `code`; returns (exit code, output, how often it
    was queued again)."""
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(code, *arguments, state="RUNNING", **environment):
        variables = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "BOOK": str(tmp_path),
            "CODE": str(code),
            "STATE": state,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_ON_NODE": "96",
            **environment,
        }
        command = ["bash", str(SCRIPT), *arguments]
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        requeued = tmp_path / "requeued"
        times = requeued.read_text().count("7\n") if requeued.exists() else 0
        return result.returncode, result.stdout + result.stderr, times

    return run


def test_syntax():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    result = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert not result.returncode, result.stdout


@pytest.mark.parametrize("code", [0, 2, 130])
def test_done_and_mistakes_are_not_queued_again(sbatch, code):
    assert sbatch(code)[::2] == (code, 0)


def test_stopped_is_queued_again_each_time(sbatch):
    for times in range(1, 5):
        assert sbatch(75)[::2] == (75, times)


def test_cancelled_stays_so(sbatch):
    for code in (75, 143):
        assert sbatch(code, state="COMPLETING")[::2] == (code, 0)


def test_crashes_are_queued_again_while_the_run_gets_on(sbatch, tmp_path):
    run = ["configs/presets/1.3b.yaml", "--profile", "3:5", f"out={tmp_path / 'run'}"]
    assert sbatch(137, *run)[::2] == (137, 1)  # before the first checkpoint
    for step in (10, 20):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        assert sbatch(1, *run)[2] == step // 10 + 1
    assert sbatch(1, *run)[2] == 4
    code, output, times = sbatch(1, *run)
    assert (code, times) == (1, 4)
    assert "slurm.sh: error: crashed (1) 3 times after checkpoint step-00000020" in output


def test_crashes_of_the_config_s_own_folder(sbatch, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"out: {tmp_path / 'own'}  # and no other\n")
    assert "crashed (9) after checkpoint none, 1 of 3 times" in sbatch(9, str(config))[1]
    assert (tmp_path / "own" / "slurm-crashes.txt").read_text() == "none\n"


def test_mistakes_in_the_command(sbatch, tmp_path):
    for arguments, environment, message in [
        (["nowhere.yaml"], {}, f"there is no config nowhere.yaml in {ROOT}"),
        ([], {"SLURM_SUBMIT_DIR": str(tmp_path)}, f"{tmp_path} is no checkout of zoetrope"),
        ([], {"PYTHON": "nowhere/python"}, "there is no nowhere/python; run make setup"),
    ]:
        code, output, _ = sbatch(0, *arguments, **environment)
        assert code == 2
        assert f"slurm.sh: error: {message}" in output
    assert not (tmp_path / "srun").exists()
