"""Measurements of speed and accuracy; `python scripts/benchmark.py` prints their tables."""
