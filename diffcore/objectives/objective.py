"""The training loss: the weighted squared error of the network's target at a random noise level.

    L_i = w_F(λ_i) mean |F(x_i, λ_i) - F_i|²
    x_i = α x_0 + σ ε,  λ_i = λ(t_i),  w_F = w |∂x_0/∂F|²

Its expectation is E w(λ) |x̂_0 - x_0|² with λ of density p: the effective weight is w(λ) p(λ).
`corrected` divides by p, so that the effective weight is w(λ). A resampler draws t from another
density and divides by it, which changes the variance and not the expectation.
"""

import math
from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from diffcore.core.condition_values import draw_seeds
from diffcore.core.conditions import LABEL, BatchCondition, drop, labels_of
from diffcore.core.denoiser import Denoiser
from diffcore.core.estimate import refuse_point_of_flow
from diffcore.core.network import LabelWrapper
from diffcore.core.prediction import Prediction, at_least_float32, predict, target
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.objectives.coupling import Coupling, IndependentCoupling
from diffcore.objectives.draw import Draw, SampleKey, condition_mask
from diffcore.objectives.encoded_mean import training_pair
from diffcore.objectives.learned_levels import check_learned_process, spread_draw
from diffcore.objectives.level_sampling import Resampler, ResamplerState
from diffcore.objectives.losses import Loss, SquaredError
from diffcore.objectives.networks import Networks
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.variational import Variational
from diffcore.objectives.weighting import MSE, Weight
from diffcore.schedules import Schedule, Shifted

__all__ = ["Objective", "TimeSampling"]

TimeSampling = Literal["stratified", "independent"]
"""Rule by which the times of a batch are drawn."""


@dataclass(frozen=True)
class Objective(ABC):  # noqa: B024  settings name its subclasses as components
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
        reference_size: side √(height · width) of x_0 for which the schedule is meant. A batch of
            side d is trained at λ + 2 ln(reference_size / d) (`Shifted.by_resolution`), with the
            time conditioning of that λ; 0 shifts nothing.
        variational: variational bound that is added to the error and trains the variance of a
            process whose variance is learned (the hybrid objective of iDDPM); None for a fixed
            variance.

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
    reference_size: float = 0.0
    variational: Variational | None = None

    is_surrogate: ClassVar[bool] = False
    """Whether only the gradient of the loss has a meaning: it need not fall as the network learns,
    and there is no held-out loss."""

    def __post_init__(self) -> None:
        if self.levels not in get_args(TimeSampling):
            raise ValueError(f"levels is {self.levels!r}, expected stratified or independent")
        for name in ("perturbation", "offset", "reference_size"):
            if not 0 <= getattr(self, name) < torch.inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a finite number of at least 0"
                )
        if self.resampler and self.uncertainty:
            raise ValueError(
                "resampler and uncertainty both even out the losses of the levels: choose one"
            )

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if a drawn level has no finite loss, or an option does not fit.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        conditions = [*process.conditions, *inputs]
        if conditions and self.coupling.group > 1:
            raise ValueError(
                f"{self.coupling} exchanges noise among samples of different conditions, from "
                "which the noise would then not be independent: use IndependentCoupling with "
                f"the conditions {', '.join(conditions)}"
            )
        schedule, level = process.schedule, process.schedule.level(_extremes(process.schedule))
        if schedule.steps is not None:
            self._check_table(schedule, schedule.steps)
        if self.reference_size:
            _check_shift(process)
        self._check_variance(process)
        refuse_point_of_flow(process, type(self).__name__)
        check_learned_process(self, process)
        assert isinstance(level.logsnr, Tensor)
        weight = self.weight.target_weight(process.prediction, level.logsnr, process.sigma_data)
        if infinite := level.logsnr[weight.float().isinf()].tolist():
            raise ValueError(
                f"{self.weight} is infinite at λ = {infinite[-1]:g} for {process.prediction}, and "
                f"{schedule} draws that level: use a bounded weight (MinSNR) or a schedule that "
                "ends at a finite λ (Truncated)"
            )
        if torch.as_tensor(level.sigma).float().isinf().any():
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

    def _check_variance(self, process: Process) -> None:
        """Raise ValueError if a learned variance is not trained, or not by the process's noise."""
        if self.variational is None:
            if process.variance == "learned":
                raise ValueError(
                    "the variance of the process is learned, and the objective does not train it: "
                    "set objective.variational to Variational, or process.variance to fixed"
                )
            return
        self.variational.check(process)
        if self.perturbation or self.offset or self.coupling != IndependentCoupling():
            raise ValueError(
                "variational is the bound of a process with independent Gaussian noise: leave "
                "perturbation, offset and coupling at their defaults, or variational out"
            )

    def check_paired_noise(self) -> None:
        """Raise ValueError if an option changes the noise that the data pairs with x_0."""
        if self.perturbation or self.offset or self.coupling != IndependentCoupling():
            raise ValueError(
                "the data pairs each x_0 with its own noise: leave perturbation, offset and "
                "coupling at their defaults"
            )

    @property
    def content_hash(self) -> str:
        """Hash of the frozen weights that the loss depends on, such as a teacher's; "" if none.

        Training is resumed only if this hash is unchanged.
        """
        return ""

    @property
    def needs_average(self) -> bool:
        """Whether the loss evaluates the averaged weights of the run (`Networks.averaged`)."""
        return False

    def networks(
        self, denoiser: Denoiser, device: torch.device, label_wrapper: LabelWrapper
    ) -> Networks:
        """Build the networks of the objective beside the one that it trains; by default none.

        Random initial weights are those of torch's generator, which the trainer seeds.

        Args:
            denoiser: network that is trained, with its initial weights, on the host. It does not
                accept the labels of the data yet.
            device: device of the run.
            label_wrapper: wraps a network so that it accepts the labels of the data. The teacher
                needs it, the further networks do not (`Networks.denoiser`).

        Returns:
            The teacher on the device, and the further networks on the host.
        """
        return Networks()

    def network_losses(
        self,
        name: str,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        """The loss of each sample that trains a further network, of shape (B,).

        Args:
            name: name of the network in `networks.trained`.
            denoiser: network of the run; it is not trained by this loss.
            x0: clean samples (B, *shape).
            condition: class labels (B,), or `Conditions`; None for no condition.
            draw: random numbers of the samples.
            networks: networks of the objective.
        """
        raise NotImplementedError(f"{self} trains no further network, and so not {name}")

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
        schedule = self.schedule(process)
        times = schedule.training_times(self.times(key, state))
        level = schedule.level(times.view(-1, *[1] * len(process.shape)))
        if schedule is not process.schedule:  # the time conditioning is that of the process's t
            level = process.schedule.at(level.logsnr)
        importance = 1 / self.oversampling(process, times, state)
        if self.corrected:
            importance = importance / schedule.density(schedule.logsnr(times))
        noise = normal(key.seed, Stream.NOISE, key.position, process.shape, device)
        if self.offset:
            flat = (process.shape[0], *[1] * (len(process.shape) - 1))
            noise += self.offset * normal(key.seed, Stream.OFFSET, key.position, flat, device)
        extra = None
        if self.perturbation:
            z = normal(key.seed, Stream.PERTURBATION, key.position, process.shape, device)
            extra = self.perturbation * z
        dropout_mask = uniform(key.seed, Stream.DROPOUT, key.position)[:, 0] < process.dropout
        masks = {
            name: condition_mask(key, name, record.dropout).to(device)
            for name, record in process.conditions.items()
        }
        given = draw_seeds(process, key.seed, key.position)
        return Draw(level, noise, dropout_mask.to(device), importance, extra, masks, key, given)

    def schedule(self, process: Process) -> Schedule:
        """The schedule of the training levels for samples of the shape of a process.

        Args:
            process: process of the network, with the shape (C, H, W) of the batch.

        Returns:
            The schedule of the process, shifted by resolution if `reference_size` is set.
        """
        if not self.reference_size:
            return process.schedule
        size = math.sqrt(math.prod(process.shape[1:]))
        return Shifted.by_resolution(process.schedule, size, self.reference_size)

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

    def inputs(
        self, process: Process, x0: Tensor, condition: BatchCondition | None, draw: Draw
    ) -> tuple[Tensor, BatchCondition | None]:
        """The noise (B, *shape) and the condition, after the coupling and the dropout of a loss."""
        noise = self.coupling(x0, draw.noise, labels_of(condition))
        if condition is not None:
            masks = {LABEL: draw.dropout_mask, **draw.condition_masks}
            condition = drop(process, condition, masks)
        return noise, condition

    def reduce(
        self,
        errors: Tensor,
        draw: Draw,
        log_variance: nn.Module | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, of shape (B,), from the weighted loss of its elements.

        Args:
            errors: weighted loss of each element, of the shape of x_0.
            draw: random numbers of the samples.
            log_variance: module u(λ) of the loss, or None.
            sample_weight: factor m of the loss, or None.
        """
        if sample_weight is not None:
            errors = errors * sample_weight.to(errors)
        losses = errors.flatten(1).mean(1) * draw.importance.to(errors)
        if log_variance is None:
            return losses
        assert isinstance(draw.level.logsnr, Tensor)
        u = log_variance(draw.level.logsnr.flatten(1).mean(1).to(errors))
        share = 1 if sample_weight is None else sample_weight.to(u).flatten(1).mean(1)
        return losses / u.exp() + share * u

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        log_variance: nn.Module | None = None,
        sample_weight: Tensor | None = None,
        networks: Networks | None = None,
    ) -> Tensor:
        """The loss of each sample at α x_0 + σ ε, of shape (B,).

            L = mean of m (w_F ρ(F̂ - F)),   with u(λ): mean of m (w_F ρ(F̂ - F) e^-u + u)

        `variational` adds the mean of m times its terms. Learned levels add KL(q(z | x_0) || p(z)),
        and an encoder replaces x_0 and adds the divergence at the noisiest level (`training_pair`).

        The mean is over all elements of x_0, also where m is 0: the gradient of such an element is
        exactly zero, and images with a small mask contribute in proportion to its area.

        Args:
            denoiser: network with its process.
            x0: clean samples (B, *shape).
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for no condition.
            draw: random numbers of the samples, from `draw`.
            log_variance: module u(λ) of `uncertainty`; None gives the loss without it.
            sample_weight: m ≥ 0, which broadcasts against x_0: (B, 1, H, W), a mask of each image,
                or (B, 1, 1, 1), a weight of each sample; None for 1.
            networks: networks of the objective, of which this one has none.
        """
        # Levels and errors of half-precision data are computed in float32.
        x0 = at_least_float32(x0)
        draw, sample_weight, divergence = spread_draw(denoiser, x0, draw, sample_weight)
        process, level = denoiser.process, draw.level.to(x0)
        noise, condition = self.inputs(process, x0, condition, draw)
        noisy = noise if draw.perturbation is None else noise + draw.perturbation
        pair = training_pair(denoiser, x0, noise, level)
        x = level.alpha * pair.mean + level.sigma * noisy
        output, v = denoiser.outputs(x, draw.level, condition)
        truth = target(process.prediction, pair.x0, pair.eps, level, process.sigma_data)
        logsnr = torch.as_tensor(draw.level.logsnr)
        weight = self.weight.target_weight(process.prediction, logsnr, process.sigma_data).to(x0)
        errors = pair.weight * weight * self.loss(output - truth)
        losses = self.reduce(errors, draw, log_variance, sample_weight) + divergence + pair.prior
        if self.variational is None:
            return losses
        estimate = predict(process.prediction, output.detach(), x, level, process.sigma_data)
        estimate = replace(estimate, variance=v)
        bound = self.variational(process, estimate, Prediction(x0, noise), draw.level)
        return losses + self.reduce(bound, draw, None, sample_weight)


def _check_shift(process: Process) -> None:
    """Raise ValueError if levels shifted by resolution have no time conditioning."""
    schedule = process.schedule
    if len(process.shape) != 3:
        raise ValueError(
            f"reference_size shifts the levels of images, but the shape of x_0 is {process.shape}: "
            "set reference_size: 0"
        )
    is_bounded = schedule.logsnr(1.0) > -math.inf or schedule.logsnr(0.0) < math.inf
    if schedule.steps is not None or (is_bounded and process.time.variable in ("index", "t")):
        raise ValueError(
            f"reference_size shifts λ beyond the levels of {schedule}, for which time conditioning "
            f"by {process.time.variable} has no number: use a schedule of all λ (Cosine, Flow), "
            "condition on blend, logsnr or sigma, or set reference_size: 0"
        )


def _extremes(schedule: Schedule) -> Tensor:
    """All times of a table; else the two quantiles that one draw in 10^9 exceeds."""
    if schedule.steps is not None:
        return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    return torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
