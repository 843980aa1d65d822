"""Python processes that start in no time: forked from one that has imported the project already.

`Nursery.start("-m", "train", CONFIG)` is `python -m train CONFIG`; with `processes=2` it is torchrun
with its agent, rendezvous and monitoring (torch.distributed.launcher), whose workers are forks as well.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path


def list_children(pid):
    """Pids, in the order in which they were started: of torchrun, the ranks."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill_family(pid):
    """Of torchrun, as when a node dies: the agent first, so that it cannot end the ranks itself."""
    for member in (pid, *list_children(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


class Nursery:
    """The side of the tests."""

    list_children, kill_family = staticmethod(list_children), staticmethod(kill_family)

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, processes=0, restarts=0, port=0, cwd=None):
        """`python ARGUMENTS`, or `torchrun --nproc-per-node PROCESSES --max-restarts RESTARTS`; with
        a port, of which one or two meet there: `--nnodes 1:2 --rdzv-endpoint localhost:PORT`."""
        handle, log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        request = {"processes": processes, "restarts": restarts, "port": port, "log": log}
        request["cwd"] = None if cwd is None else str(cwd)
        pid = self.ask(start=list(map(str, arguments)), **request)
        return Child(self, pid, Path(log))

    def run(self, *arguments, **options):
        """The same until it ends; returns (exit code, all output)."""
        child = self.start(*arguments, **options)
        output = child.communicate()[0]
        return child.returncode, output

    def close(self):
        self.server.kill()  # to unload all that it has imported would take seconds
        self.server.wait()


class Child:
    """A process of the nursery, to be handled like a subprocess.Popen."""

    def __init__(self, nursery, pid, log):
        self.nursery, self.pid, self.log = nursery, pid, log
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.nursery.ask(poll=self.pid)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=300):
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                kill_family(self.pid)
                raise subprocess.TimeoutExpired(
                    f"process {self.pid}", timeout, self.log.read_text()
                )
            time.sleep(0.01)
        output = self.log.read_text(errors="replace")
        self.log.unlink(missing_ok=True)
        return output, None


def serve():
    """Forks for every request on stdin; returns in the child alone, with its request."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    sys.exit()


def run(arguments):
    """As the interpreter does with its arguments."""
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def launch(arguments, processes, restarts, port):
    """As torchrun does."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if port:  # see docs/clusters.md
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=2 if port else 1,
        nproc_per_node=processes,
        run_id=str(port or uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        # For how long one waits for a second, and how soon one that is gone is missed.
        rdzv_configs={"last_call_timeout": 4, "keep_alive_interval": 3} if port else {},
        max_restarts=restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, run)(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def main():
    sys.path.insert(0, str(Path(__file__).parents[2]))
    for name in ("torch.distributed.launcher.api", "train.cli", "train.loop", "open_clip"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    request = serve()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    if request["processes"]:
        launch(request["start"], request["processes"], request["restarts"], request["port"])
    else:
        run(request["start"])


if __name__ == "__main__":
    main()
