"""One-off studies; `python scripts/experiment.py NAME` repeats each."""
