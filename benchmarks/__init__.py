"""Measurements behind the figures in docs/benchmarks.md; ratios within one run are what counts."""
