"""Noise from the torch.Generator of a diffusers pipeline, which replaces the seeds of diffcore."""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.schedules import Level

__all__ = ["GeneratorNoise", "Generators"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class GeneratorNoise(Noise):
    """Standard normal noise that each draw takes next from a torch.Generator.

    The order and the dtype of the draws are those of diffusers' schedulers.

    Args:
        generator: one generator, a list with one for each sample (which then depends on it alone),
            or None for torch's global generator.
        draw_dtype: dtype in which the normals are drawn, before they are converted to that of x.
    """

    generator: Generators = None
    draw_dtype: torch.dtype = torch.float32

    @classmethod
    def like(cls, output: Tensor, x: Tensor, generator: Generators) -> "GeneratorNoise":
        """Noise for x.

        Args:
            output: output of the network; the normals are drawn in its dtype.
            x: (B, *shape) samples.
            generator: one generator, one for each sample, or None for torch's global generator.

        Returns:
            The noise.
        """
        seeds = torch.zeros(len(x), dtype=torch.int64)
        return cls(
            seeds,
            tuple(x.shape[1:]),
            x.device,
            x.dtype,
            generator=generator,
            draw_dtype=output.dtype,
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
            shape, generator=self.generator, device=self.device, dtype=self.draw_dtype
        ).to(self.dtype)
