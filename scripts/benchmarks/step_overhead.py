"""The cost of a step without its network: 50 DDIM steps by diffcore and by diffusers.

Both sides call the same network in the same order and make equal samples to rounding; knots and
timesteps are computed before the measurement, which is in seconds of the processor.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from benchmarks.comparison import Comparison, check_pairs, processor_clock, time_pairs
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
"""Number of elements up to which the bound holds; larger samples measure memory transfer only."""


class IdentityNetwork(nn.Module):
    """A network without cost: its output is x."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x


def measure_steps(
    pairs: int = 100, shapes: Sequence[tuple[int, ...]] = SHAPES, sampler: Sampler = DDIM()
) -> list[Comparison]:
    """Compare 50 steps for each shape, with ε and with v as the network output.

    Args:
        pairs: measured pairs of each comparison, at least 30.
        shapes: shapes of the samples, with the batch.
        sampler: sampler of diffcore that equals DDIM.

    Returns:
        The comparisons.

    Raises:
        ValueError: there are too few pairs.
    """
    check_pairs(pairs)
    predictions: tuple[PredictionType, ...] = ("epsilon", "v_prediction")
    return [
        _compare(shape, prediction, pairs, sampler)
        for shape in shapes
        for prediction in predictions
    ]


def _compare(
    shape: tuple[int, ...], prediction: PredictionType, pairs: int, sampler: Sampler
) -> Comparison:
    name = f"{'x'.join(map(str, shape))}, {'ε' if prediction == 'epsilon' else 'v'}"
    bound = 0.5 if prod(shape) <= LARGE else float("inf")
    sides = diffcore_loop(shape, prediction, sampler), diffusers_loop(shape, prediction)
    return Comparison(name, bound, *time_pairs(*sides, pairs, clock=processor_clock()))


def diffcore_loop(
    shape: tuple[int, ...], prediction: PredictionType, sampler: Sampler = DDIM()
) -> Callable[[], Tensor]:
    """Create diffcore's loop over 50 entries of DDPM's linear table.

    Args:
        shape: shape of the samples, with the batch.
        prediction: output of the network.
        sampler: the sampler.

    Returns:
        A function that draws the samples.
    """
    denoiser = Denoiser(IdentityNetwork(), Process(Discrete(), prediction, shape=shape[1:]))
    noise = Noise(torch.arange(shape[0]), shape[1:])
    x, knots = noise.start(), Trailing().knots(Discrete(), STEPS)

    @torch.no_grad()
    def loop() -> Tensor:
        return integrate(denoiser, sampler, x, knots, noise)[0]

    return loop


def diffusers_loop(shape: tuple[int, ...], prediction: PredictionType) -> Callable[[], Tensor]:
    """Create the documented loop of diffusers over the same entries.

    Args:
        shape: shape of the samples, with the batch.
        prediction: output of the network.

    Returns:
        A function that draws the samples.
    """
    scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        prediction_type=prediction, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    network, start = IdentityNetwork(), Noise(torch.arange(shape[0]), shape[1:]).start()

    @torch.no_grad()
    def loop() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x).prev_sample
        return x

    return loop
