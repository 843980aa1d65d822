"""`torchrun --nproc-per-node N -m train CONFIG.yaml [section.key=value ...] [--dry-run]`."""

import sys

from train.stopping import leave_on_preemptions

if __name__ == "__main__":
    leave_on_preemptions()  # while everything is imported, which takes seconds

from train.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
