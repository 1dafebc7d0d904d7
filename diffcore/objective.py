"""The training loss: per sample, the weighted squared error of the network's own target at a drawn noise level.

    L_i = w_F(λ_i) mean |F(x_i, λ_i) - F_i|²,   x_i = α x_0 + σ ε,   λ_i = λ(t_i),   w_F = w |∂x_0/∂F|²

Averaged over the batch this is E w(λ) |x̂_0 - x_0|² with λ of density p: the effective weight is w(λ) p(λ).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffcore.denoiser import Denoiser
from diffcore.noise import Stream, normal, uniform
from diffcore.prediction import target
from diffcore.process import Process
from diffcore.schedules import Level
from diffcore.weighting import MSE, Weight

Levels = Literal["stratified", "independent"]


@dataclass(frozen=True)
class Place:
    """Where samples stand in a run: the key of everything random about them.

    Args:
        seed: of the run.
        step: the optimizer step.
        index: int64 host tensor (B,), each sample's place in the step's global batch.
        batch: size of the global batch, over ranks and accumulation.
    """

    seed: int
    step: int
    index: Tensor
    batch: int

    @property
    def position(self) -> Tensor:
        """(B,) place of each sample in the whole run."""
        return self.step * self.batch + self.index


class Draw(NamedTuple):
    """What a training step draws for its samples: noise levels (on the host), noise, and who loses the condition."""

    level: Level
    noise: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Objective:
    """The weighted squared error, one value a sample.

    Args:
        weight: w(λ) on the squared x_0 error.
        levels: stratified, t_i = U + i/B mod 1 over the global batch (Kingma et al. 2021, 2107.00630, I.1: each t is
            uniform, the batch even), or independent.
    """

    weight: Weight = field(default_factory=MSE)
    levels: Levels = "stratified"

    def __post_init__(self) -> None:
        if self.levels not in get_args(Levels):
            raise ValueError(f"levels is {self.levels!r}, expected stratified or independent")

    def check(self, process: Process) -> None:
        """Raise where the weight is infinite at a level that training draws (a table draws its last entry)."""
        if process.schedule.steps is None:
            return
        last = torch.tensor([process.schedule.logsnr(1.0)], dtype=torch.float64)
        if self.weight.on(process.prediction, last, process.sigma_data).isinf().any():
            raise ValueError(
                f"{self.weight} is infinite at λ = {float(last):g} for {process.prediction}, and {process.schedule} "
                f"draws that level: use a bounded weight (MinSNR) or a schedule that ends at a finite λ"
            )

    def times(self, place: Place) -> Tensor:
        """(B,) float64 times in (0, 1] for the samples at `place`."""
        if self.levels == "stratified":
            u = (uniform(place.seed, Stream.LEVEL, place.step)[0] + place.index.double() / place.batch) % 1
        else:
            u = uniform(place.seed, Stream.LEVEL, place.position)[:, 0]
        return u.clamp(min=2.0**-53)

    def draw(self, process: Process, place: Place, device: torch.device | None = None) -> Draw:
        """Levels, noise and condition dropout of the samples at `place`: a function of the place alone."""
        times = process.schedule.drawn(self.times(place))
        level = process.schedule.level(times.view(-1, *[1] * len(process.shape)))
        noise = normal(place.seed, Stream.NOISE, place.position, process.shape, device)
        dropped = uniform(place.seed, Stream.DROPOUT, place.position)[:, 0] < process.dropout
        return Draw(level, noise, dropped.to(device))

    def __call__(self, denoiser: Denoiser, x0: Tensor, condition: Tensor | None, draw: Draw) -> Tensor:
        """(B,) losses of the denoiser's network at α x_0 + σ ε."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))  # levels and errors of half-precision data too
        process, level = denoiser.process, draw.level.to(x0)
        if condition is not None:
            condition = condition.masked_fill(draw.dropped, process.classes)
        output = denoiser.output(level.alpha * x0 + level.sigma * draw.noise, draw.level, condition)
        error = output - target(process.prediction, x0, draw.noise, level, process.sigma_data)
        assert isinstance(draw.level.logsnr, Tensor)
        weight = self.weight.on(process.prediction, draw.level.logsnr, process.sigma_data).to(x0)
        return (weight * error**2).flatten(1).mean(1)
