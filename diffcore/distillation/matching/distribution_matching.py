"""Distribution matching: the student's samples, noised, are to be distributed as the teacher's.

    ∇_θ L = E[w(λ) h(r) (x̂_0^fake - x̂_0^teacher)(x_t) ∂x_0/∂θ],   x_t = α x_0 + σ ε, x_0 = G_θ(z)

A second network, the fake, is trained by denoising on samples of the student, so that it estimates
the score of their distribution: s_fake - s_teacher = α (x̂_0^fake - x̂_0^teacher) / σ². With
w = SNR and h = 1 the gradient is that of the expected KL(q_t‖p_t) of noised distributions.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import LabelWrapper
from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.distillation.guided_denoiser import predict_guided
from diffcore.distillation.matching.discriminator import (
    DISCRIMINATOR,
    Discriminator,
    generator_losses,
)
from diffcore.distillation.matching.divergence import Divergence, MeanDivergenceWeight
from diffcore.distillation.matching.network_training import NetworkTraining
from diffcore.distillation.matching.student import (
    StudentObjective,
    denoising_process,
    drop_conditions,
    key_of,
    noised,
)
from diffcore.distillation.teacher import Teacher, check_teacher
from diffcore.guidance import CFG
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE, Weight

__all__ = ["FAKE", "DistributionMatching", "ScoreIdentity"]

FAKE = "fake"
"""Name of the network that is trained on samples of the student."""


class _WeightedDiscriminator(nn.Module):
    """A discriminator's module with the running means of the divergence's weight."""

    def __init__(self, module: nn.Module, divergence: Divergence) -> None:
        super().__init__()
        self.module, self.mean_weight = module, MeanDivergenceWeight(divergence)

    def forward(self, *arguments: Tensor, **named: Tensor) -> Tensor:
        output: Tensor = self.module(*arguments, **named)
        return output


@dataclass(frozen=True)
class DistributionMatching(StudentObjective):
    """DMD2: the difference of two scores as the gradient of a student of one to four steps.

    The loss of a sample is ½ mean |x_0 - sg(x_0 - g)|², whose gradient in x_0 is g / D for D
    numbers: g = w h (x̂_0^fake - x̂_0^teacher), divided by the mean of |x_0 - x̂_0^teacher| if
    `normalised` is set (Yin et al. 2023, DMD, 2311.18828). Its value is ½ mean g².

    The inherited `weight`, `levels` and `corrected` are those of the fake network's denoising loss,
    whose levels are those of the comparison too. The fake network begins with the teacher's weights
    if it has the student's network and process, else with those of the student.

    Start from the defaults: 5 updates of the fake network, the student's learning rate for both
    networks, and, if the teacher is a network, a student with its weights (`init`).

    Sources: Yin et al. 2024 (DMD2, 2405.14867); Xu et al. 2025 (f-distill, 2502.15681) for the
    weight h(r); Nguyen et al. 2024 (SNOOPI, 2412.02687, PG-SB) for random guidance scales.

    Args:
        teacher: frozen denoiser whose distribution is matched.
        student_weight: w(λ) of the student's gradient, a weight on x_0.
        normalised: whether the gradient of a sample is divided by mean |x_0 - x̂_0^teacher|.
        time_range: interval of t of the levels at which samples are compared, in the time of the
            student's schedule.
        fake: optimizer and number of updates of the fake network.
        divergence: divergence of the distributions; any other than rkl needs a discriminator.
        discriminator: estimates ln p/q of noisy data and samples; None for none.
        adversarial: factor of the loss softplus(-D) in the student's loss.
        guidance_range: the teacher's scale of classifier-free guidance is drawn uniformly from this
            interval for each sample (PG-SB, here for the teacher alone); None for the guidance of
            the teacher.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    _: KW_ONLY
    teacher: Teacher
    student_weight: Weight = field(default_factory=lambda: MSE("sample"))
    normalised: bool = True
    time_range: tuple[float, float] = (0.02, 0.98)
    fake: NetworkTraining = field(default_factory=lambda: NetworkTraining(updates=5))
    divergence: Divergence = field(default_factory=Divergence)
    discriminator: Discriminator | None = None
    adversarial: float = 0.0
    guidance_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher(self.teacher)
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"time_range is {self.time_range}, expected 0 <= low < high <= 1")
        if self.divergence.needs_ratio and self.discriminator is None:
            raise ValueError(
                f"divergence.name is {self.divergence.name}, whose weight depends on p/q, which no "
                "discriminator estimates: set discriminator, or divergence.name rkl"
            )
        if not self.adversarial >= 0 or (self.adversarial and self.discriminator is None):
            raise ValueError(
                f"adversarial is {self.adversarial}, expected at least 0, or 0 if there is no "
                "discriminator"
            )
        if self.discriminator and not (self.adversarial or self.divergence.needs_ratio):
            raise ValueError(
                "the discriminator is not used: set adversarial above 0 or another divergence than "
                "rkl, or leave discriminator out"
            )
        if self.guidance_range is not None:
            self._check_guidance_range(*self.guidance_range)

    def _check_guidance_range(self, low: float, high: float) -> None:
        if not 0 <= low <= high < math.inf:
            raise ValueError(
                f"guidance_range is {self.guidance_range}, expected finite w with 0 <= low <= high"
            )
        if self.teacher.guidance != CFG(1.0):
            raise ValueError(
                f"guidance_range is {self.guidance_range}, and teacher.guidance is "
                f"{self.teacher.guidance}: leave one of them out"
            )

    @property
    def content_hash(self) -> str:
        return self.teacher.content_hash

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the process does not fit the student, the teacher or the levels.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        super().check(process, inputs)
        self.teacher.check(process)
        if self.guidance_range is not None and not process.dropouts:
            raise ValueError(
                f"guidance_range is {self.guidance_range}, but the process has no condition that "
                "the teacher could be guided by: leave guidance_range out"
            )

    def times(self, key: SampleKey, state: ResamplerState | None = None) -> Tensor:
        low, high = self.time_range
        return low + (high - low) * super().times(key, state)

    def networks(
        self, denoiser: Denoiser, device: torch.device, label_wrapper: LabelWrapper
    ) -> Networks:
        process = denoising_process(denoiser.process)
        teacher = self.teacher.denoiser(device, denoiser.process, label_wrapper)
        fake = self._initial_fake(denoiser, device)
        has_penalty = self.discriminator is not None and self.discriminator.r1 > 0
        reads_fake = self.discriminator is not None and self.discriminator.reads_fake
        trained = {FAKE: self.fake.network(fake, has_penalty and reads_fake)}
        if self.discriminator is not None:
            backbones = {"teacher": teacher, FAKE: Denoiser(label_wrapper(fake), process)}
            module = self.discriminator.module(backbones, process)
            weighted = _WeightedDiscriminator(module, self.divergence)
            trained[DISCRIMINATOR] = self.discriminator.training.network(weighted, has_penalty)
        return Networks(teacher, trained)

    def _initial_fake(self, denoiser: Denoiser, device: torch.device) -> nn.Module:
        """A copy of the student, with the weights of the teacher if they fit."""
        fake, process = copy.deepcopy(denoiser.network), denoiser.process
        network = self.teacher.denoiser(device).network
        own, other = process, self.teacher.process_for(process)
        names = ("prediction", "schedule", "time", "sigma_data", "variance")
        if network is None or any(getattr(own, name) != getattr(other, name) for name in names):
            return fake
        weights, needed = network.state_dict(), fake.state_dict()
        if {n: v.shape for n, v in weights.items()} == {n: v.shape for n, v in needed.items()}:
            fake.load_state_dict(weights)
        return fake

    def network_losses(
        self,
        name: str,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        condition = drop_conditions(denoiser.process, condition, draw)
        process = denoising_process(denoiser.process)
        with torch.no_grad():
            sample = self.student.sample(denoiser, condition, draw)
        if name == FAKE:
            fake = networks.denoiser(FAKE, process)
            losses = Objective.__call__(self, fake, sample, condition, draw)
            weight = 0.0 if self.discriminator is None else self.discriminator.fake_weight
            if not weight:
                return losses
            return losses + weight * self._comparison(
                networks, process, x0, sample, condition, draw
            )
        return self._comparison(networks, process, x0, sample, condition, draw)

    def _comparison(
        self,
        networks: Networks,
        process: Process,
        x0: Tensor,
        sample: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
    ) -> Tensor:
        """The losses (B,) of the discriminator on noisy data and noisy samples of the student."""
        assert self.discriminator is not None
        x = (noised(x0.to(sample), draw), noised(sample, draw))
        return self.discriminator.losses(networks, process, x, draw.level, condition)

    def student_losses(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        process = denoising_process(denoiser.process)
        sample = self.student.sample(denoiser, condition, draw)
        if self.discriminator is None:
            return self._matching(networks, process, sample, condition, draw, None)
        x = noised(sample, draw)
        logits = self.discriminator.logits(networks, process, x, draw.level, condition)
        weighted, t = networks.module(DISCRIMINATOR), draw.level.t
        assert isinstance(weighted, _WeightedDiscriminator)
        assert isinstance(t, Tensor)
        ratio_weight = weighted.mean_weight(logits.detach(), t.flatten(1)[:, 0])
        losses = self._matching(networks, process, sample, condition, draw, ratio_weight)
        return losses + self.adversarial * generator_losses(logits)

    def _matching(
        self,
        networks: Networks,
        process: Process,
        sample: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        ratio_weight: Tensor | None,
    ) -> Tensor:
        """The loss (B,) whose gradient is that of the divergence."""
        with torch.no_grad():
            x = noised(sample, draw)
            fake = networks.denoiser(FAKE, process)(x, draw.level, condition).x0
            teacher = self._teacher_x0(networks, x, condition, draw)
            g = self._weights(sample, teacher, process, draw, ratio_weight) * (fake - teacher)
        return (sample - (sample - g).detach()).square().flatten(1).mean(1) / 2

    def _teacher_x0(
        self, networks: Networks, x: Tensor, condition: BatchCondition | None, draw: Draw
    ) -> Tensor:
        """x̂_0 of the guided teacher, with the scale of each sample if it is drawn."""
        assert networks.teacher is not None
        if self.guidance_range is None:
            return networks.teacher(x, draw.level, condition).x0
        (low, high), key = self.guidance_range, key_of(draw)
        u = uniform(key.seed, Stream.GUIDANCE_SCALE, key.position)[:, 0]
        scale = low + (high - low) * u
        return predict_guided(networks.teacher, x, draw.level, condition, scale).x0

    def _weights(
        self,
        sample: Tensor,
        teacher: Tensor,
        process: Process,
        draw: Draw,
        ratio_weight: Tensor | None,
    ) -> Tensor:
        """w h and the normalisation, (B, 1, ...)."""
        assert isinstance(draw.level.logsnr, Tensor)
        weight = self.student_weight.target_weight(
            "sample", draw.level.logsnr, process.sigma_data
        ).to(sample)
        weight = weight * _per_sample(draw.importance.to(sample), sample)
        if ratio_weight is not None:
            weight = weight * _per_sample(ratio_weight.to(sample), sample)
        if self.normalised:
            scale = (sample - teacher).detach().abs().flatten(1).mean(1)
            weight = weight / _per_sample(scale.clamp(min=1e-8), sample)
        return weight


@dataclass(frozen=True)
class ScoreIdentity(DistributionMatching):
    """Score identity distillation (SiD): the gradient passes through teacher and fake network.

        L = w [(x̂^teacher - x̂^fake)·(x̂^fake - x_0) + (1-α) |x̂^teacher - x̂^fake|²],  mean over x_0

    The loss may be negative. The source updates the fake network once in a step. With 5 updates, as
    here, and learning rate 1e-3 a one-step student of a mixture in the plane was at energy distance
    0.002 after 600 steps; with one update and 5e-4 at 0.66 after 1000.

    Source: Zhou et al. 2024 (SiD, 2404.04057), α = 1 or 1.2.

    Args:
        alpha: α.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}, expected a finite factor, such as 1 or 1.2")
        if self.divergence.needs_ratio:
            raise ValueError(
                f"divergence.name is {self.divergence.name}, but ScoreIdentity minimises Fisher's "
                "divergence: leave it at rkl, or use DistributionMatching"
            )

    def _matching(
        self,
        networks: Networks,
        process: Process,
        sample: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        ratio_weight: Tensor | None,
    ) -> Tensor:
        x = noised(sample, draw)
        fake = networks.denoiser(FAKE, process)(x, draw.level, condition).x0
        teacher = self._teacher_x0(networks, x, condition, draw)
        weight = self._weights(sample, teacher, process, draw, None)
        error = teacher - fake
        terms = error * (fake - sample) + (1 - self.alpha) * error.square()
        return (weight * terms).flatten(1).mean(1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in the shape (B, 1, ...) that broadcasts against `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
