"""The training loss: per sample, the weighted squared error of the network's own target at a drawn
noise level.

    L_i = w_F(λ_i) mean |F(x_i, λ_i) - F_i|²,   x_i = α x_0 + σ ε,   λ_i = λ(t_i),   w_F = w
    |∂x_0/∂F|²

Averaged over the batch this is E w(λ) |x̂_0 - x_0|² with λ of density p: the effective weight is
w(λ) p(λ). `corrected` divides by p, so that it is w(λ) alone; a resampler draws t by another
density and divides by it, which changes the variance and no expectation.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.objectives.coupling import Coupling, IndependentCoupling
from diffcore.objectives.level_sampling import Resampler, ResamplerState
from diffcore.objectives.losses import Loss, SquaredError
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.weighting import MSE, Weight
from diffcore.schedules import Level, Schedule

TimeSampling = Literal["stratified", "independent"]


@dataclass(frozen=True)
class SampleKey:
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
    """What a training step draws for its samples.

    Args:
        level: noise levels, on the host: one a sample, or a map of levels of the shape of x_0.
        noise: ε, the network's target.
        dropout_mask: (B,) who loses the condition.
        importance: (B,) float64 on the host, 1 over the density of the draw where the objective is
            corrected for it.
        perturbation: what x has in noise beyond ε (DDPM-IP), none by default.
    """

    level: Level
    noise: Tensor
    dropout_mask: Tensor
    importance: Tensor
    perturbation: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The weighted error, one value a sample.

    Args:
        weight: w(λ) on the squared x_0 error.
        levels: stratified, t_i = U + i/B mod 1 over the global batch (Kingma et al. 2021,
            2107.00630, I.1: each t is uniform, the batch even), or independent.
        corrected: whether the loss is divided by p(λ), which makes w the effective weight.
        resampler: draws t where losses are large, and divides by how much more it does.
        loss: what an error of the network's target costs; other than squared, it is not the same
            for every prediction type.
        coupling: which noise meets which sample.
        perturbation: γ of DDPM-IP: x is made with ε + γ ξ, the target stays ε (Ning et al. 2023,
            2301.11706, Algorithm 2; 0.1).
        offset: s of offset noise: ε + s z with one z a channel is the noise and the target
            (Guttenberg 2023; 0.1).
        uncertainty: divides each level's loss by what it is expected to be.
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
                "resampler and uncertainty both even out the losses of the levels: choose one of "
                "them"
            )

    def check(self, process: Process) -> None:
        """Raise where a level that training draws has no finite loss, or the options do not fit the
        levels of a table.
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
                f"{schedule} "
                "draws that level: use a bounded weight (MinSNR) or a schedule that ends at a "
                "finite λ (Truncated)"
            )
        if level.sigma.float().isinf().any():
            raise ValueError(
                f"{schedule} draws levels where the ve scaling has σ = inf: use Truncated, or vp "
                "or flow"
            )

    def _check_table(self, schedule: Schedule, steps: int) -> None:
        if self.corrected:
            raise ValueError(
                "corrected divides by the density of λ, which the levels of a table do not have: "
                f"draw every t of {schedule} "
                f"with Truncated"
            )
        if self.resampler and self.resampler.bins > steps:
            raise ValueError(
                f"{self.resampler} has more bins than {schedule} has levels: use at most {steps}"
            )

    def times(self, key: SampleKey, state: ResamplerState | None = None) -> Tensor:
        """(B,) float64 times in (0, 1] for the samples at `place`, given what the resampler has
        learned.
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
        """TimeSampling, noise and condition dropout of the samples at `place`: a function of the
        place, and of what was learned.
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
        """(B,) q(t): how much more often than uniformly the drawn times come; 1 without a
        resampler.
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
        """(B,) losses of the denoiser's network at α x_0 + σ ε; with `uncertainty`, given its
        module.
        """
        x0 = x0.to(
            torch.promote_types(x0.dtype, torch.float32)
        )  # levels and errors of half-precision data too
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
    """Every time of a table; else the two that one draw in a billion goes beyond."""
    if schedule.steps is not None:
        return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    return torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
