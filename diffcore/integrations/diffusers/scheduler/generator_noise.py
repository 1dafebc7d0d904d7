"""Noise from the torch.Generator of a diffusers pipeline, which replaces the seeds of diffcore."""

from collections.abc import Sequence
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
    def of(
        cls,
        count: int,
        shape: Sequence[int],
        device: torch.device,
        generator: Generators,
        draw_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> "GeneratorNoise":
        """Noise for a number of samples.

        Args:
            count: number of samples.
            shape: shape of one sample, channels first.
            device: device of the noise.
            generator: one generator, one for each sample, or None for torch's global generator.
            draw_dtype: dtype in which the normals are drawn, that of the network's output.
            dtype: dtype of the noise, that of x.

        Returns:
            The noise.
        """
        unused_seeds = torch.zeros(count, dtype=torch.int64)
        return cls(
            unused_seeds, tuple(shape), device, dtype, generator=generator, draw_dtype=draw_dtype
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
