"""Two hosts, made of network namespaces with one cable between them, train as one process does."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from train.logs import read_log

FIRST, SECOND = "10.213.7.1", "10.213.7.2"


def ip(*arguments):
    """`ip ...`; what it printed."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return result.stdout


@pytest.fixture
def hosts():
    """Names of two network namespaces, reached as FIRST and SECOND through their eth0."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts are made with `ip netns`, and there is no ip here (iproute2)")
    names = [f"zoetrope-{os.getpid()}-{number}" for number in (1, 2)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ends = ["netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]]
            ip("link", "add", "eth0", *ends)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for name, address in zip(names, (FIRST, SECOND)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in made:
            for process in ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", name)


def start(host, address, config):
    """torchrun on one of the hosts, as docs/clusters.md shows it."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    first = int(address == FIRST)
    command += ["--nnodes", "2", "--node-rank", str(1 - first), "--nproc-per-node", "1"]
    command += ["--rdzv-id", "two-hosts", "--rdzv-backend", "c10d", "--local-addr", address]
    # By itself torchrun sees whether it is the first host from its host name, which both share.
    command += ["--rdzv-endpoint", f"{FIRST}:29400", "--rdzv-conf", f"is_host={first}"]
    return subprocess.Popen(
        [*command, "-m", "train", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_rendezvous_between_two_hosts(room, hosts, tmp_path):
    changes = {"logging": {"interval": 1}}
    config = room.write(tmp_path / "two", "dit", **changes)
    runs = [start(host, address, config) for host, address in zip(hosts, (FIRST, SECOND))]
    one = room.train(tmp_path / "one", "dit", **changes)
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert "batch 4 = 2 x 1 x 2" in outputs[0] + outputs[1]
    single, double = (
        [row["loss"] for row in read_log(out / "log.jsonl")] for out in (one, tmp_path / "two")
    )
    assert len(single) == 12
    assert double == pytest.approx(single, abs=1e-5)
