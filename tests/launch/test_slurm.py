"""A real Slurm cluster: a job that is stopped, and then loses a node, queues itself again; it ends
equal."""

import sys

from safetensors.torch import load_file

from train.logs import read_log


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl")]


def test_stopped_and_broken_job_ends_equal(cluster, room, nursery, tmp_path):
    changes = {
        "train": {"steps": 120, "checkpoint_interval": 5},
        "logging": {"interval": 1, "val_interval": 1000},
        "data": {"num_workers": 1},  # which Slurm signals too
    }
    config = room.write(tmp_path / "run", "vae", **changes)
    out, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster(
        *("sbatch", "--parsable", "--gpus-per-node=0", f"--output={log}"),
        *("configs/launch/slurm.sh", str(config)),
        PYTHON=sys.executable,
    ).strip()
    assert job.isdigit(), job

    def until(condition):
        cluster.until(condition, lambda: log.read_text() if log.exists() else "no log")

    def said(text):
        return log.exists() and text in log.read_text()

    # As Slurm does when the time is nearly over: only the script itself is told.
    until(lambda: len(losses(out)) > 2)
    cluster("scancel", "--batch", "--signal=USR1", job)
    until(lambda: said("stopped; queued again"))
    assert said("the same command goes on from here")  # which it says after its last checkpoint
    stopped = len(losses(out))
    assert 2 < stopped < 120

    # Meanwhile the same in one go.
    straight = tmp_path / "straight"
    code, output = nursery.run("-m", "train", config, f"out={straight}", processes=2)
    assert code == 0, output

    # One of the nodes loses everything that the job runs there.
    until(lambda: len(losses(out)) > stopped + 2)
    cluster.kill(SLURMD_NODENAME="node2", SLURM_JOB_ID=job)
    until(lambda: said("1 of 3 times; queued again"))
    assert len(losses(out)) < 120

    until(lambda: said("exported after 120 steps") and not cluster("squeue", "-h").strip())
    assert "JobState=COMPLETED" in cluster("scontrol", "show", "job", job)
    assert log.read_text().count("slurm.sh: ") == 5  # three starts, queued again twice
    assert losses(out) == losses(straight)
    weights, others = (
        load_file(folder / "model" / "vae.safetensors") for folder in (out, straight)
    )
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert value.equal(others[name]), name
