"""The torchrun entry, the loop, parallelism, checkpoints, EMA and logging."""
