"""Noise that is consumed from a pipeline's generators: there the caller's torch.Generator is the seed."""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.schedules import Level

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Drawn(Noise):
    """The next normals of the generator at each request, in the order and dtype in which diffusers' own schedulers draw.

    A list has one generator a row, so that a row depends on its own alone; None is torch's global one.

    Args:
        generator: one, one a row, or None.
        drawn: dtype in which it is drawn.
    """

    generator: Generators = None
    drawn: torch.dtype = torch.float32

    @classmethod
    def like(cls, output: Tensor, x: Tensor, generator: Generators) -> "Drawn":
        """Noise for x, drawn in the dtype of a network's output."""
        seeds = torch.zeros(len(x), dtype=torch.int64)
        return cls(
            seeds, tuple(x.shape[1:]), x.device, x.dtype, generator=generator, drawn=output.dtype
        )

    def start(self) -> Tensor:
        return self._draw()

    def step(self, index: int) -> Tensor:
        return self._draw()

    def between(self, t: Level, s: Level, step: int) -> Tensor:
        return self._draw()

    def branch(self, index: int) -> Noise:
        return self

    def _draw(self) -> Tensor:
        shape = (len(self.seeds), *self.shape)
        return randn_tensor(
            shape, generator=self.generator, device=self.device, dtype=self.drawn
        ).to(self.dtype)
