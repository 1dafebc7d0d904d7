"""Data sets of arrays: points, signals, volumes, video, latents, decoded images."""

from diffcore.training.data.arrays.arrays import Arrays
from diffcore.training.data.arrays.tensors import Tensors

__all__ = ["Arrays", "Tensors"]
