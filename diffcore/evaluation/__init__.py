"""Evaluation: metrics of samples, one module each.

A metric is a function, or the method of an object that holds what it learned from real data. It
receives samples (N, *shape) as tensors on the CPU, in the range of the process, and returns a
float. It draws no random numbers, does not depend on the order of the samples, and its docstring
states the formula, the source, which direction is better, and how the value depends on N.
"""
