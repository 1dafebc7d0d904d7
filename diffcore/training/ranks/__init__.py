"""Ranks, precision and sharding of a training run."""
