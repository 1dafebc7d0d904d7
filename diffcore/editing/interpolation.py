"""Interpolation: between two seeds, and between two images that were inverted or noised to one level."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import hypot
from diffcore.schedules import Level

PARALLEL = 1e-4
"""Sine of the angle below which two rows are interpolated along the chord, which is the arc to 1e-9."""


@dataclass(frozen=True, eq=False)
class Blend(Noise):
    """cos(πw/2) z_a + sin(πw/2) z_b, z of two independent seeds: standard normal, norm and all, for every w.

    It is a Noise, so what a stochastic sampler draws in its steps is interpolated with what it starts from:
    run(denoiser, sampler, blend.first_sample(knots[0], sigma_data), knots, blend).

    Args:
        seeds: of w = 0, one a row.
        shape: of one row.
        device: where the noise is made.
        dtype: of the noise.
        others: seeds of w = 1, one a row; each another than its row has at w = 0, or the two would not be independent.
        weight: w within [0, 1], for all rows or one a row.
    """

    others: Tensor = field(kw_only=True)
    weight: float | Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.others.shape != self.seeds.shape or bool((self.others == self.seeds).any()):
            raise ValueError(
                f"seeds and others are {self.seeds.tolist()} and {self.others.tolist()}, expected two different ones a row"
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
        angle = _rows(self.weight, a) * (math.pi / 2)
        return angle.cos() * a + angle.sin() * b


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """(sin((1-w)Ω) a + sin(wΩ) b) / sin Ω, Ω the angle between the rows: the arc from a to b.

    For two x at one level, such as two inverted images: where |a| = |b|, every point between has that norm, which a
    straight line would lose. For the noises of two seeds, see Blend.

    Args:
        a: at w = 0, (B, *shape).
        b: at w = 1.
        weight: w within [0, 1], for all rows or one a row.
    """
    _check_weight(weight)
    w, (one, other) = _rows(weight, a), (value.flatten(1) for value in (a, b))
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    angle = _rows(cosine.clamp(-1, 1).acos(), a)
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
    """Clip(p clip(a) + q clip(b) + (μ-p) α x_a + (ν-q) α x_b + γ σ z) in the vp scaling, with p² + q² + γ² = 1.

    Zheng et al. 2024, "NoiseDiffusion" (2403.08840). For a = α x_a + σ ε_a and b likewise it is, but for the clipping,
    α (μ x_a + ν x_b) + σ (p ε_a + q ε_b + γ z): the noise keeps the variance that belongs to the level, whatever the images,
    where a spherical interpolation also rotates the images. p : q = cos(πw/2) : sin(πw/2), and μ : ν = p : q with
    μ + ν = `image`. Clipping takes away values that noise of unit variance hardly has.

    The combination and its constants (μ + ν = 1.2, bound 2, γ = 0) are those of the authors' code as other repositories
    quote it; not checked against the paper's text.

    Args:
        a: the first image inverted or noised to the level, (B, *shape).
        b: the second one.
        image_a: x_0 of the first.
        image_b: x_0 of the second.
        level: where a and b are.
        weight: w within [0, 1], for all rows or one a row.
        noise: z of `gamma`, of the shape of a.
        gamma: share of fresh noise within [0, 1]; more leaves less of both images.
        image: μ + ν, how much of the images' mean there is; 1 is the level's own.
        bound: values of a, b and the result are cut at ±bound, in the vp scaling; inf cuts nothing.
    """
    _check_weight(weight)
    if not 0 <= gamma <= 1 or (gamma > 0 and noise is None):
        raise ValueError(
            f"gamma is {gamma}, expected a share within [0, 1], and with one above 0 the noise to share"
        )
    if not bound > 0:
        raise ValueError(f"bound is {bound}, expected a positive one, or inf to cut nothing")
    n, angle = hypot(level.alpha, level.sigma), _rows(weight, a) * (math.pi / 2)
    p, q = ((1 - gamma**2) ** 0.5 * side for side in (angle.cos(), angle.sin()))
    mu, nu = (image * side / (angle.cos() + angle.sin()) for side in (angle.cos(), angle.sin()))
    mixed = p * (a / n).clamp(-bound, bound) + q * (b / n).clamp(-bound, bound)
    mixed = mixed + (level.alpha / n) * ((mu - p) * image_a + (nu - q) * image_b)
    if noise is not None:
        mixed = mixed + gamma * (level.sigma / n) * noise
    return n * mixed.clamp(-bound, bound)


def _rows(value: float | Tensor, x: Tensor) -> Tensor:
    """One number for each row of x, to broadcast against it."""
    return (
        torch.as_tensor(value, dtype=x.dtype, device=x.device)
        .expand(len(x))
        .view(-1, *[1] * (x.ndim - 1))
    )


def _check_weight(weight: float | Tensor) -> None:
    values = torch.as_tensor(weight)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"weight is {weight}, expected values within [0, 1]: 0 is the first, 1 the second"
        )
