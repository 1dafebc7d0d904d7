"""Training on accelerate.

A run gives the same weights for every number of ranks and micro-batches, and if it is interrupted.
"""
