"""The units in which distances between digits are stated."""

from torch import Tensor

__all__ = ["to_scan_units"]


def to_scan_units(x0: Tensor) -> Tensor:
    """Convert x_0 to the pixel values of the scans.

    Args:
        x0: samples; values outside [-1, 1] are clamped.

    Returns:
        Values from 0 to 16, in the shape of `x0`.
    """
    return (x0.clamp(-1, 1) + 1) * 8
