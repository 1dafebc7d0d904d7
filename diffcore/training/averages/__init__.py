"""Averages of the weights over the training."""
