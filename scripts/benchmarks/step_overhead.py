"""What a step costs beside the network: 50 steps of DDIM with a network that does nothing, by this library and by diffusers.

Both ask the same network in the same order and make the same samples to rounding; knots and timesteps are made beforehand.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from benchmarks.training_speed import Comparison, check_pairs, interleaved
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.samplers import DDIM, Sampler
from diffcore.sampling.loop import integrate
from diffcore.schedules import Discrete, Trailing

STEPS = 50
SHAPES = ((1, 1, 8, 8), (1, 4, 64, 64), (8, 4, 64, 64))
LARGE = 16_384
"""Elements up to which the bound holds: beyond, both only move memory."""


class Nothing(nn.Module):
    """Answers x itself."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x


def steps(
    pairs: int = 100, shapes: Sequence[tuple[int, ...]] = SHAPES, sampler: Sampler = DDIM()
) -> list[Comparison]:
    """Fifty steps of each shape, for a network of ε and one of v.

    Raises:
        ValueError: too few pairs.
    """
    check_pairs(pairs)
    kinds: tuple[PredictionType, ...] = ("epsilon", "v_prediction")
    return [_compared(shape, kind, pairs, sampler) for shape in shapes for kind in kinds]


def _compared(
    shape: tuple[int, ...], kind: PredictionType, pairs: int, sampler: Sampler
) -> Comparison:
    name = f"{'x'.join(map(str, shape))}, {'ε' if kind == 'epsilon' else 'v'}"
    bound = 0.5 if prod(shape) <= LARGE else float("inf")
    return Comparison(
        name, bound, *interleaved(ours(shape, kind, sampler), theirs(shape, kind), pairs)
    )


def ours(
    shape: tuple[int, ...], kind: PredictionType, sampler: Sampler = DDIM()
) -> Callable[[], Tensor]:
    """The loop over knots at the entries of DDPM's linear table."""
    denoiser = Denoiser(Nothing(), Process(Discrete(), kind, shape=shape[1:]))
    noise = Noise(torch.arange(shape[0]), shape[1:])
    x, knots = noise.start(), Trailing().knots(Discrete(), STEPS)

    @torch.no_grad()
    def loop() -> Tensor:
        return integrate(denoiser, sampler, x, knots, noise)[0]

    return loop


def theirs(shape: tuple[int, ...], kind: PredictionType) -> Callable[[], Tensor]:
    """Diffusers' documented loop, over the same entries."""
    scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        prediction_type=kind, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    network, start = Nothing(), Noise(torch.arange(shape[0]), shape[1:]).start()

    @torch.no_grad()
    def loop() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x).prev_sample
        return x

    return loop
