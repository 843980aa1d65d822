"""`torchrun --nproc-per-node N -m train CONFIG.yaml [section.key=value ...] [--dry-run]`."""

import signal
import sys

from train.stopping import EXIT_REQUEUE, PREEMPTIONS

if __name__ == "__main__":
    for _number in PREEMPTIONS:  # while everything is imported, which takes seconds
        signal.signal(_number, lambda *_: sys.exit(EXIT_REQUEUE))

from train.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
