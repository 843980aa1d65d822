"""torchrun for a scheduler: `python -m train.launch [torchrun's options] -m train CONFIG ...` (Linux).

torchrun ends with 1 however its processes ended, and kills them 30 seconds after a SIGTERM. A
scheduler has to know whether a run was stopped and wants to be started again (75), is done (0), or
was a mistake (2), and gives a grace period of its own. So this is torchrun with two differences: it
ends as its processes did, and SIGTERM and SIGUSR1 only tell them to stop, however long their last
checkpoint takes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from train.stopping import EXIT_REQUEUE, PREEMPTIONS, leave_on_preemptions

if __name__ == "__main__":
    leave_on_preemptions()  # while torch is imported, which takes seconds

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

_TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Runs what torchrun would, and exits as it ended."""
    arguments = parse_args(None)
    if arguments.max_restarts:  # which would start anew what was told to stop
        print("zoetrope: error: --max-restarts is the scheduler's here; use 0", file=sys.stderr)
        sys.exit(2)
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # of torchrun's own, which we leave to it
    for number in PREEMPTIONS:
        signal.signal(number, _pass_on)
    try:
        run(arguments)
    except ChildFailedError as error:
        sys.exit(exit_code(error.failures.values()))
    except RendezvousError as error:
        print(
            f"zoetrope: error: this node and the first one lost each other: {error}",
            file=sys.stderr,
        )
        sys.exit(1)


def exit_code(failures: Iterable[ProcessFailure]) -> int:
    """How a node's processes ended, as a shell counts: 128 + its number for a signal.

    That is how the first one failed of its own accord. torchrun tells the others to stop once one has
    ended, so that their 75 means something only where no process says otherwise.
    """
    codes = [
        failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        for failure in sorted(failures, key=lambda failure: failure.timestamp)
    ]
    causes = [code for code in codes if code not in (EXIT_REQUEUE, _TERMINATED)]
    return causes[0] if causes else min(codes)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Tells every process."""
    if "SLURM_STEP_ID" in os.environ:  # Slurm signals all processes of a step by itself
        return
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    if not children:  # still waiting for other nodes
        sys.exit(EXIT_REQUEUE)
    for child in children:
        os.kill(int(child), number)


if __name__ == "__main__":
    main()
