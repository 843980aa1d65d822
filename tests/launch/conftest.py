"""The tiny world and configs of tests/train, and a Slurm cluster of the tests' own making."""

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "tiny_training_room", Path(__file__).parents[1] / "train" / "conftest.py"
)
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
one_thread, room, nursery = _tiny.one_thread, _tiny.room, _tiny.nursery

# A requeued job waits for as long as credentials hold (5 seconds at least), then for the scheduler.
SLURM_CONF = """
ClusterName=zoetrope
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
SlurmdParameters=config_overrides
FirstJobId={first_job}
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=node1,node2 Default=YES
"""


class Cluster:
    """One controller and two nodes, all on this machine."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons = []

    def start(self):
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        text = SLURM_CONF.format(
            folder=folder, ports=free_ports(3), first_job=random.randrange(1000, 9000)
        )
        (folder / "slurm.conf").write_text(text)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        # force: of a folder that others may enter, it only warns
        self.daemon("munged", "--foreground", "--force", f"--seed-file={folder}/seed", *munge)
        self.until(lambda: (folder / "munge.socket").exists(), "munged has no socket")
        self.daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self.daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "no idle nodes")

    def daemon(self, *command):
        log = (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("w")
        daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.daemons.append(daemon)

    def __call__(self, *command, **environment):
        """A command of Slurm's; what it printed."""
        result = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        return result.stdout + result.stderr

    def until(self, condition, failure, seconds=240):
        """Waits; fails with what `failure` is or returns, and the ends of all logs."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                said = failure() if callable(failure) else failure
                logs = [f"{path}:\n{path.read_text()[-1500:]}" for path in self.logs()]
                pytest.fail("\n".join([said, *logs]))
            time.sleep(0.05)

    def logs(self):
        return [path for path in self.folder.iterdir() if path.suffix in (".log", ".out")]

    def processes(self, **variables):
        """Ids of all processes that run in this cluster and have these environment variables."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                has = path.read_bytes().split(b"\0")
                if all(f"{key}={value}".encode() in has for key, value in wanted.items()):
                    found.append(int(path.parent.name))
        return found

    def kill(self, **variables):
        for process in self.processes(**variables):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self):
        self("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        self.kill()


def free_ports(count):
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def cluster(tmp_path):
    commands = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"Slurm is not installed here: no {', '.join(missing)}; see .ci/run")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons want root, and this is another user")
    folder = tmp_path / "slurm"
    folder.mkdir(mode=0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
