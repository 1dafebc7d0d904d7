"""Evaluation: metrics of samples, and benchmarks of the code."""
