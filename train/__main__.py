"""`torchrun --nproc-per-node N -m train CONFIG.yaml [section.key=value ...] [--dry-run]`."""

import sys

from train.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
