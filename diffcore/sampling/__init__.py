"""Sampling: from seeds to samples, the loop under it, and image output."""

from diffcore.sampling.generation import GRID, SAMPLER, Samples, sample

__all__ = ["GRID", "SAMPLER", "Samples", "sample"]
