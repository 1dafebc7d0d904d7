"""Balls in a volume, and balls that move through a video."""

import torch
from torch import Tensor

from diffcore.training.data.generated.generated import GeneratedData

__all__ = ["Balls", "MovingBalls"]

RADII = (0.2, 0.4)
"""Smallest and largest radius of a ball in a volume, as shares of its size."""
RADIUS = 0.2
"""Radius of a ball in a video, as a share of its size."""


class Balls(GeneratedData):
    """Volumes (1, size, size, size) with one ball of random centre and radius.

        x_0(p) = tanh(r - |p - c|)

    Distances are in voxels: the surface is one voxel wide. The radius r is uniform in (0.2, 0.4)
    size, and the centre c uniform where the whole ball is inside.

    Args:
        count: number of volumes.
        size: number of voxels along each axis, at least 4.
        seed: 64-bit seed; another one gives independent volumes.

    Raises:
        ValueError: there are no volumes, or they are too small.

    Example:
        >>> x0, label = Balls(2, size=8)[0]
        >>> x0.shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, count: int = 2000, size: int = 16, seed: int = 0) -> None:
        super().__init__(count, seed, size)
        _check_size(size)
        numbers = self._uniform(4)
        radius = size * (RADII[0] + (RADII[1] - RADII[0]) * numbers[:, :1])
        centre = radius + (size - 2 * radius) * numbers[:, 1:]
        self.x0 = draw_balls(centre.float(), radius[:, 0].float(), size)[:, None]


class MovingBalls(GeneratedData):
    """Videos (1, frames, size, size) of one ball that moves straight at constant speed.

        x_0(t, p) = tanh(r - |p - c_t|),   c_t = (1 - s) c_first + s c_last,   s = t/(frames - 1)

    Distances are in pixels, and r = size/5. Both ends of the path are uniform where the whole ball
    is inside.

    Args:
        count: number of videos.
        frames: number of frames, at least 2.
        size: height and width in pixels, at least 4.
        seed: 64-bit seed; another one gives independent videos.

    Raises:
        ValueError: there are no videos, or they are too small.

    Example:
        >>> x0, label = MovingBalls(2, frames=4, size=8)[0]
        >>> x0.shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(self, count: int = 2000, frames: int = 8, size: int = 16, seed: int = 0) -> None:
        super().__init__(count, seed, frames, size)
        _check_size(size)
        if frames < 2:
            raise ValueError(f"frames is {frames}, expected at least 2")
        radius = RADIUS * size
        first, last = (
            (radius + (size - 2 * radius) * self._uniform(4)).unflatten(1, (2, 2)).unbind(1)
        )
        time = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None]
        centre = first[:, None] * (1 - time) + last[:, None] * time
        radii = torch.full((count * frames,), radius)
        balls = draw_balls(centre.flatten(0, 1).float(), radii, size)
        self.x0 = balls.unflatten(0, (count, 1, frames))


def draw_balls(centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Soft balls on a grid, tanh(r - |p - c|) at the midpoints p = ½, 3/2, ... of the voxels.

    Args:
        centre: (N, axes) centres in voxels.
        radius: (N,) radii in voxels.
        size: number of voxels along each axis.

    Returns:
        (N, size, ...) one axis for each coordinate, in (-1, 1).
    """
    axes = centre.shape[1]
    middle = torch.arange(size) + 0.5
    square = torch.zeros(len(centre), *[1] * axes)
    for axis in range(axes):
        offset = middle - centre[:, axis, None]
        square = square + offset.square().view(
            len(centre), *[size if a == axis else 1 for a in range(axes)]
        )
    return (radius.view(-1, *[1] * axes) - square.sqrt()).tanh()


def _check_size(size: int) -> None:
    if size < 4:
        raise ValueError(f"size is {size}, expected at least 4")
