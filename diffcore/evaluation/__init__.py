"""Evaluation: metrics of samples, one module each, the features in which they are measured, and the
likelihood of data.

A metric is a function, or the method of an object that holds what it learned from real data. It
receives samples (N, *shape) or their features as tensors on the CPU, and returns a float computed
in float64. Random subsets and directions are keyed by a seed. Its docstring states the formula, the
source, which direction is better, and how the value depends on N.
"""
