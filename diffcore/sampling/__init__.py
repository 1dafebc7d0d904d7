"""Sampling: from seeds to samples, the loop under it, and image output."""

from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, Samples, sample

__all__ = ["DEFAULT_GRID", "DEFAULT_SAMPLER", "Samples", "sample"]
