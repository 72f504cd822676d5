"""Comparisons, sweeps and the results page: ``python -m experiments.reproduce --help``."""
