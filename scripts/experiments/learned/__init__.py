"""Experiments on processes with a learned part: variances, levels, and the encoder of x_0."""
