"""The training loss: the weighted squared error of the network's target at a random noise level.

    L_i = w_F(λ_i) mean |F(x_i, λ_i) - F_i|²
    x_i = α x_0 + σ ε,  λ_i = λ(t_i),  w_F = w |∂x_0/∂F|²

Its expectation is E w(λ) |x̂_0 - x_0|² with λ of density p: the effective weight is w(λ) p(λ).
`corrected` divides by p, so that the effective weight is w(λ). A resampler draws t from another
density and divides by it, which changes the variance and not the expectation.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import at_least_float32, target
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.objectives.coupling import Coupling, IndependentCoupling
from diffcore.objectives.level_sampling import Resampler, ResamplerState
from diffcore.objectives.losses import Loss, SquaredError
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.weighting import MSE, Weight
from diffcore.schedules import Level, Schedule

__all__ = ["Draw", "Objective", "SampleKey", "TimeSampling"]

TimeSampling = Literal["stratified", "independent"]
"""Rule by which the times of a batch are drawn."""


@dataclass(frozen=True)
class SampleKey:
    """The position of samples in a training run: the key of all their random numbers.

    Args:
        seed: 64-bit seed of the run.
        step: number of the optimizer step.
        index: index of each sample in the step's global batch, an int64 host tensor (B,).
        batch: size of the global batch, the sum over ranks and accumulation.
    """

    seed: int
    step: int
    index: Tensor
    batch: int

    @property
    def position(self) -> Tensor:
        """The index of each sample in the whole run, of shape (B,)."""
        return self.step * self.batch + self.index


class Draw(NamedTuple):
    """The random numbers of a training step.

    Args:
        level: noise levels on the host: one per sample, or a map of levels of the shape of x_0.
        noise: ε (B, *shape), which the network's target contains.
        dropout_mask: True (B,) for samples whose condition is replaced by the null label.
        importance: factor (B,) of the loss, float64 on the host: 1 over the density of the draw if
            the objective is corrected for it.
        perturbation: further noise (B, *shape) in x that the target lacks (DDPM-IP); None for none.
    """

    level: Level
    noise: Tensor
    dropout_mask: Tensor
    importance: Tensor
    perturbation: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The weighted error, one value per sample.

    Args:
        weight: weight w(λ) of the squared x_0 error.
        levels: sampling of t: stratified, t_i = U + i/B mod 1 over the global batch, which is
            uniform for each i and even over the batch (Kingma et al. 2021, 2107.00630, I.1), or
            independent.
        corrected: whether the loss is divided by p(λ), which makes w the effective weight.
        resampler: adaptive density of t, by which the loss is divided; None draws t uniformly.
        loss: function of the error of the network's target; any other than SquaredError depends on
            the prediction type.
        coupling: pairing of the noise with the samples of a batch.
        perturbation: strength γ of DDPM-IP: x contains ε + γ ξ, the target ε (Ning et al. 2023,
            2301.11706, Algorithm 2, γ = 0.1); 0 is off.
        offset: strength s of offset noise: ε + s z, with one normal z per channel, replaces ε in x
            and in the target (Guttenberg 2023, s = 0.1); 0 is off.
        uncertainty: fitted expected loss of each level, by which its loss is divided; None is off.

    Raises:
        ValueError: a field is out of range, or resampler and uncertainty are combined.
    """

    weight: Weight = field(default_factory=MSE)
    levels: TimeSampling = "stratified"
    corrected: bool = False
    resampler: Resampler | None = None
    loss: Loss = field(default_factory=SquaredError)
    coupling: Coupling = field(default_factory=IndependentCoupling)
    perturbation: float = 0.0
    offset: float = 0.0
    uncertainty: Uncertainty | None = None

    def __post_init__(self) -> None:
        if self.levels not in get_args(TimeSampling):
            raise ValueError(f"levels is {self.levels!r}, expected stratified or independent")
        for name in ("perturbation", "offset"):
            if not 0 <= getattr(self, name) < torch.inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a finite strength of at least 0"
                )
        if self.resampler and self.uncertainty:
            raise ValueError(
                "resampler and uncertainty both even out the losses of the levels: choose one"
            )

    def check(self, process: Process) -> None:
        """Raise ValueError if a drawn level has no finite loss or an option does not fit a table.

        Args:
            process: process of the network.
        """
        schedule, level = process.schedule, process.schedule.level(_extremes(process.schedule))
        if schedule.steps is not None:
            self._check_table(schedule, schedule.steps)
        assert isinstance(level.logsnr, Tensor)
        assert isinstance(level.sigma, Tensor)
        weight = self.weight.target_weight(process.prediction, level.logsnr, process.sigma_data)
        infinite = level.logsnr[weight.float().isinf()].tolist()
        if infinite:
            raise ValueError(
                f"{self.weight} is infinite at λ = {infinite[-1]:g} for {process.prediction}, and "
                f"{schedule} draws that level: use a bounded weight (MinSNR) or a schedule that "
                "ends at a finite λ (Truncated)"
            )
        if level.sigma.float().isinf().any():
            raise ValueError(
                f"{schedule} draws levels where the ve scaling has σ = inf: use Truncated, or vp "
                "or flow"
            )

    def _check_table(self, schedule: Schedule, steps: int) -> None:
        """Raise ValueError if an option does not fit the levels of a table."""
        if self.corrected:
            raise ValueError(
                "corrected divides by the density of λ, which the levels of a table do not have: "
                f"use {schedule} in Truncated, which draws continuous t"
            )
        if self.resampler and self.resampler.bins > steps:
            raise ValueError(
                f"{self.resampler} has more bins than {schedule} has levels: use at most {steps}"
            )

    def times(self, key: SampleKey, state: ResamplerState | None = None) -> Tensor:
        """Times t of shape (B,), float64, in (0, 1].

        Args:
            key: key of the samples.
            state: state of the resampler; None draws t uniformly.
        """
        if self.levels == "stratified":
            u = (uniform(key.seed, Stream.LEVEL, key.step)[0] + key.index.double() / key.batch) % 1
        else:
            u = uniform(key.seed, Stream.LEVEL, key.position)[:, 0]
        return self.resampler.times(state, u) if self.resampler and state else u.clamp(min=2.0**-53)

    def draw(
        self,
        process: Process,
        key: SampleKey,
        device: torch.device | None = None,
        state: ResamplerState | None = None,
    ) -> Draw:
        """Noise levels, noise and dropout of B samples, a function of the key and the state.

        Args:
            process: process of the network.
            key: key of the samples.
            device: device of the noise and the mask; the host by default.
            state: state of the resampler; None draws t uniformly.

        Returns:
            The draw; noise has shape (B, *process.shape).
        """
        schedule = process.schedule
        times = schedule.training_times(self.times(key, state))
        level = schedule.level(times.view(-1, *[1] * len(process.shape)))
        importance = 1 / self.oversampling(process, times, state)
        if self.corrected:
            importance = importance / schedule.density(schedule.logsnr(times))
        noise = normal(key.seed, Stream.NOISE, key.position, process.shape, device)
        if self.offset:
            flat = (process.shape[0], *[1] * (len(process.shape) - 1))
            noise = noise + self.offset * normal(
                key.seed, Stream.OFFSET, key.position, flat, device
            )
        extra = None
        if self.perturbation:
            extra = self.perturbation * normal(
                key.seed, Stream.PERTURBATION, key.position, process.shape, device
            )
        dropout_mask = uniform(key.seed, Stream.DROPOUT, key.position)[:, 0] < process.dropout
        return Draw(level, noise, dropout_mask.to(device), importance, extra)

    def oversampling(self, process: Process, times: Tensor, state: ResamplerState | None) -> Tensor:
        """The density q(t) of the draws relative to uniform ones, of shape (B,).

        Args:
            process: process of the network.
            times: times (B,) of the draws.
            state: state of the resampler; None, or an objective without resampler, gives 1.
        """
        if self.resampler is None or state is None:
            return torch.ones_like(times)
        return self.resampler.density(state, times, process.schedule.steps)

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Tensor | None,
        draw: Draw,
        log_variance: nn.Module | None = None,
    ) -> Tensor:
        """The loss of each sample at α x_0 + σ ε, of shape (B,).

        Args:
            denoiser: network with its process.
            x0: clean samples (B, *shape).
            condition: int64 class labels (B,); None for no condition.
            draw: random numbers of the samples, from `draw`.
            log_variance: module u(λ) of `uncertainty`; None gives the loss without it.
        """
        # Levels and errors of half-precision data are computed in float32.
        x0 = at_least_float32(x0)
        process, level = denoiser.process, draw.level.to(x0)
        noise = self.coupling(x0, draw.noise, condition)
        if condition is not None:
            condition = condition.masked_fill(draw.dropout_mask, process.classes)
        noisy = noise if draw.perturbation is None else noise + draw.perturbation
        output = denoiser.output(level.alpha * x0 + level.sigma * noisy, draw.level, condition)
        error = self.loss(output - target(process.prediction, x0, noise, level, process.sigma_data))
        assert isinstance(draw.level.logsnr, Tensor)
        weight = self.weight.target_weight(
            process.prediction, draw.level.logsnr, process.sigma_data
        ).to(x0)
        losses = (weight * error).flatten(1).mean(1) * draw.importance.to(x0)
        if log_variance is None:
            return losses
        u = log_variance(draw.level.logsnr.flatten(1).mean(1).to(x0))
        return losses / u.exp() + u


def _extremes(schedule: Schedule) -> Tensor:
    """All times of a table; else the two quantiles that one draw in 10^9 exceeds."""
    if schedule.steps is not None:
        return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    return torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
