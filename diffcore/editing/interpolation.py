"""Interpolation between two seeds, and between two images at one noise level."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import expand_per_sample, hypot
from diffcore.schedules import Level

__all__ = ["Blend", "noise_diffusion", "slerp"]

PARALLEL = 1e-4
"""Sine of the angle below which the chord replaces the arc; the difference is 1e-9."""


@dataclass(frozen=True, eq=False)
class Blend(Noise):
    """Interpolated noise of two independent seeds: cos(πw/2) z_a + sin(πw/2) z_b.

    It is standard normal for every w. The noise of the steps of a stochastic sampler is
    interpolated together with the initial noise:
    integrate(denoiser, sampler, blend.first_sample(knots[0], sigma_data), knots, blend).

    Args:
        seeds: (B,) seeds at w = 0.
        shape: shape of one sample.
        device: device of the noise.
        dtype: dtype of the noise.
        others: (B,) seeds at w = 1; each differs from the seed at w = 0, so that the two are
            independent.
        weight: w within [0, 1], a number or (B,).
    """

    others: Tensor = field(kw_only=True)
    weight: float | Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.others.shape != self.seeds.shape or bool((self.others == self.seeds).any()):
            raise ValueError(
                f"seeds and others are {self.seeds.tolist()} and {self.others.tolist()}, expected "
                "two different seeds for each sample"
            )
        _check_weight(self.weight)

    def start(self) -> Tensor:
        return self._both(lambda noise: noise.start())

    def step(self, index: int) -> Tensor:
        return self._both(lambda noise: noise.step(index))

    def between(self, t: Level, s: Level, step: int) -> Tensor:
        return self._both(lambda noise: noise.between(t, s, step))

    def _both(self, draw: Callable[[Noise], Tensor]) -> Tensor:
        same = {f.name: getattr(self, f.name) for f in fields(Noise)}
        a, b = draw(Noise(**same)), draw(Noise(**same | {"seeds": self.others}))
        angle = _per_sample(self.weight, a) * (math.pi / 2)
        return angle.cos() * a + angle.sin() * b


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation (sin((1-w)Ω) a + sin(wΩ) b) / sin Ω, Ω the angle between a and b.

    It interpolates between two x at one level, such as two inverted images. If |a| = |b|, each
    point of the arc has that norm. To interpolate between the noise of two seeds, use `Blend`.

    Args:
        a: (B, *shape) result at w = 0.
        b: (B, *shape) result at w = 1.
        weight: w within [0, 1], a number or (B,).

    Returns:
        (B, *shape) points of the arcs.
    """
    _check_weight(weight)
    w, (one, other) = _per_sample(weight, a), (value.flatten(1) for value in (a, b))
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    angle = _per_sample(cosine.clamp(-1, 1).acos(), a)
    sine = angle.sin()
    arc = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / sine
    return torch.where(sine < PARALLEL, (1 - w) * a + w * b, arc)


def noise_diffusion(
    a: Tensor,
    b: Tensor,
    image_a: Tensor,
    image_b: Tensor,
    level: Level,
    weight: float | Tensor,
    noise: Tensor | None = None,
    gamma: float = 0.0,
    image: float = 1.2,
    bound: float = 2.0,
) -> Tensor:
    """Interpolate two images and their noise at one level, in the vp scaling:

        clip(p clip(a) + q clip(b) + (μ-p) α x_a + (ν-q) α x_b + γ σ z),   p² + q² + γ² = 1.

    Zheng et al. 2024, "NoiseDiffusion" (2403.08840). For a = α x_a + σ ε_a and b = α x_b + σ ε_b it
    is, without the clipping, α (μ x_a + ν x_b) + σ (p ε_a + q ε_b + γ z): the noise keeps the
    variance of the level for all images, whereas a spherical interpolation also rotates the images.
    p : q = cos(πw/2) : sin(πw/2), and μ : ν = p : q with μ + ν = `image`. Clipping removes values
    that are rare for noise of unit variance.

    The combination and its constants (μ + ν = 1.2, bound 2, γ = 0) are those of the authors' code
    as other repositories quote it; they were not checked against the paper.

    Args:
        a: (B, *shape) first image at the level, inverted or with noise added.
        b: (B, *shape) second image at the level.
        image_a: (B, *shape) x_0 of the first image.
        image_b: (B, *shape) x_0 of the second image.
        level: level of a and b.
        weight: w within [0, 1], a number or (B,).
        noise: (B, *shape) z of `gamma`; None if gamma is 0.
        gamma: share of fresh noise within [0, 1]; a larger share keeps less of both images.
        image: μ + ν, weight of the images; 1 is that of the level.
        bound: values of a, b and the result are clipped to ±bound, in the vp scaling; inf does not
            clip.

    Returns:
        (B, *shape) samples at the level.

    Raises:
        ValueError: A weight, `gamma` or `bound` is out of range, or `noise` is missing.
    """
    _check_weight(weight)
    if not 0 <= gamma <= 1 or (gamma > 0 and noise is None):
        raise ValueError(
            f"gamma is {gamma}, expected a share within [0, 1], and a `noise` if it is above 0"
        )
    if not bound > 0:
        raise ValueError(f"bound is {bound}, expected a positive number, or inf for no clipping")
    n, angle = hypot(level.alpha, level.sigma), _per_sample(weight, a) * (math.pi / 2)
    p, q = ((1 - gamma**2) ** 0.5 * side for side in (angle.cos(), angle.sin()))
    mu, nu = (image * side / (angle.cos() + angle.sin()) for side in (angle.cos(), angle.sin()))
    mixed = p * (a / n).clamp(-bound, bound) + q * (b / n).clamp(-bound, bound)
    mixed = mixed + (level.alpha / n) * ((mu - p) * image_a + (nu - q) * image_b)
    if noise is not None:
        mixed = mixed + gamma * (level.sigma / n) * noise
    return n * mixed.clamp(-bound, bound)


def _per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """One number for each sample of x, in a shape that broadcasts against x."""
    return expand_per_sample(
        torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x)), x
    )


def _check_weight(weight: float | Tensor) -> None:
    values = torch.as_tensor(weight)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"weight is {weight}, expected values within [0, 1]: 0 is the first end, 1 the second"
        )
