"""The edit-friendly noise space of DDPM: the noise from which a stochastic sampler generates a
specific image.
"""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG, Guidance, find_networks
from diffcore.samplers import DDIM, State
from diffcore.sampling.generation import add_noise, evaluation_mode
from diffcore.sampling.loop import (
    check_guidance,
    check_levels,
    current_step,
    guided_prediction,
    integrate,
)
from diffcore.schedules import Level, check_falling

__all__ = ["FixedNoise", "NoiseMaps", "extract", "replay"]


@dataclass(frozen=True, eq=False)
class FixedNoise(Noise):
    """Noise with fixed draws.

    Args:
        maps: (steps, B, *shape) z of each step.
    """

    maps: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, noise: Noise, maps: Tensor) -> "FixedNoise":
        """Noise with the seeds, shape, device and dtype of another, and fixed draws.

        Args:
            noise: noise whose other fields are copied.
            maps: (steps, B, *shape) z of each step.

        Returns:
            The noise.
        """
        return cls(*(getattr(noise, f.name) for f in fields(Noise)), maps=maps)

    def step(self, index: int) -> Tensor:
        return self.maps[index]

    def between(self, t: Level, s: Level, step: int) -> Tensor:
        return self.maps[step]


@dataclass(frozen=True, eq=False)
class NoiseMaps:
    """The noise of DDIM(eta) that encodes an image, from which `replay` generates it again or edits
    it.

    Args:
        knots: levels between which the sampler steps.
        eta: η of the sampler.
        x: (B, *shape) noisy samples at the first knot.
        noise: z of each step.
        rest: (B, *shape) image minus the result of the sampler: the error of the step to the clean
            level, which adds no noise. It has the size of σ/α at the last noisy knot, and is small
            for grids whose last noisy knot has little noise (Karras, Linspace).
    """

    knots: tuple[Level, ...]
    eta: float
    x: Tensor
    noise: FixedNoise
    rest: Tensor


@torch.no_grad()
def extract(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    eta: float = 1.0,
    guidance: Guidance = CFG(1.0),
    condition: BatchCondition | None = None,
) -> NoiseMaps:
    """Extract z_i = (x_{i+1} - μ(x_i)) / std_i of noisy copies x_i = α_i x_0 + σ_i ε̃_i with
    independent ε̃_i.

    Huberman-Spiegelglas et al. 2023 (2304.06140, Algorithm 1), with μ and std those of DDIM(eta)'s
    step. Because the copies are independent, z has a larger variance than noise and contains the
    layout of the image, which is kept under another condition. Knots that start at less noise
    (Within) keep more of the image.

    Args:
        denoiser: network with its process, or an exact denoiser.
        x0: (B, *shape) images.
        knots: levels of sampling, each less noisy than the one before, the last one clean.
        noise: ε̃ of each knot.
        eta: η of DDIM, above 0.
        guidance: guidance rule.
        condition: (B,) labels or `Conditions` of the images, or None.

    Returns:
        The noise maps.

    Raises:
        ValueError: The arguments do not fit together, or η is 0; raised before the first step.
    """
    sampler = _stochastic_sampler(eta)
    _check_arguments(denoiser, knots, guidance, condition)
    x = add_noise(x0, knots[0], noise)
    x0, state, step, memory, maps = x0.to(x), sampler.start(x, knots, noise), None, None, []
    with evaluation_mode(denoiser, *find_networks(guidance)):
        while not state.done:
            step = current_step(denoiser.process, sampler, knots, state, step)
            prediction, memory, _ = guided_prediction(
                denoiser, guidance, state.x, state.level, condition, memory, step
            )
            maps.append(_step_noise(sampler, state, prediction, x0, noise))
            state = _advance(sampler, state, prediction, noise, maps[-1])
    return NoiseMaps(knots, eta, x, FixedNoise.of(noise, torch.stack(maps)), x0 - state.x)


@torch.no_grad()
def replay(
    denoiser: DenoiserProtocol,
    maps: NoiseMaps,
    guidance: Guidance = CFG(1.0),
    condition: BatchCondition | None = None,
) -> Tensor:
    """Generate an image from noise maps.

    With the condition of the extraction it is the original to rounding, with another an edited
    image.

    Args:
        denoiser: network with its process.
        maps: noise maps of the image.
        guidance: guidance rule.
        condition: (B,) labels or `Conditions`, or None.

    Returns:
        (B, *shape) images.
    """
    with evaluation_mode(denoiser, *find_networks(guidance)):
        x, _ = integrate(
            denoiser,
            _stochastic_sampler(maps.eta),
            maps.x,
            maps.knots,
            maps.noise,
            guidance,
            condition,
        )
    return x + maps.rest


def _step_noise(
    sampler: DDIM, state: State, prediction: Prediction, x0: Tensor, noise: Noise
) -> Tensor:
    """The z with which the step leads to the noisy copy of x_0 at the next knot; 0 at a clean knot.

    Args:
        sampler: the stochastic sampler.
        state: state at the current knot.
        prediction: x_0 and ε there.
        x0: (B, *shape) images.
        noise: ε̃ of each knot.

    Returns:
        z, (B, *shape).
    """
    knot, zero = state.remaining[0], torch.zeros_like(x0)
    if knot.sigma == 0:
        return zero
    mean = _advance(sampler, state, prediction, noise, zero).x
    std = _advance(sampler, state, Prediction(zero, zero), noise, torch.ones_like(zero)).x
    return (knot.alpha * x0 + knot.sigma * noise.step(state.step) - mean) / std


def _advance(sampler: DDIM, state: State, prediction: Prediction, noise: Noise, z: Tensor) -> State:
    """The state after a step whose noise is z (B, *shape)."""
    fixed = FixedNoise.of(noise, z.expand(state.step + 1, *z.shape))
    return sampler.advance(state, prediction, fixed)


def _stochastic_sampler(eta: float) -> DDIM:
    if eta == 0:
        raise ValueError(
            "eta is 0, with which DDIM adds no noise: use an eta within (0, 1], or "
            "diffcore.editing.inversion"
        )
    return DDIM(eta)


def _check_arguments(
    denoiser: DenoiserProtocol,
    knots: tuple[Level, ...],
    guidance: Guidance,
    condition: BatchCondition | None,
) -> None:
    check_falling(knots)
    if knots[-1].sigma != 0:
        raise ValueError(
            f"the last knot is at λ = {knots[-1].logsnr}, expected the clean level (λ = inf)"
        )
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, None)
