"""Transitions from a noise level t to a cleaner level s of a Gaussian process.

    q(x_s | x_t, x_0) = N(α_s x_0 + σ_s r ε, β̃),   r = u_s/u_t of u = σ/α
    β̃ = σ_s² (1 - r²),   β = n_s² σ_t² (1 - r²)/n_t²,   n² = α² + σ²

In the vp scaling, where n = 1, β̃ and β are those of Ho et al. 2020 (2006.11239, eq. 7), for levels
any distance apart: β = 1 - ᾱ_t/ᾱ_s. Given x_t alone, x_s has a variance between the two for data of
at most unit variance; iDDPM learns it as β̃^(1-v) β^v (Nichol & Dhariwal 2021, 2102.09672, eq. 15).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffcore.core.prediction import Prediction, hypot
from diffcore.schedules import Level, Real

__all__ = [
    "fresh_noise_share",
    "last_log_variance_bounds",
    "log_variance_bounds",
    "posterior_mean",
]


def fresh_noise_share(t: Level, s: Level) -> Real:
    """1 - u_s²/u_t² = 1 - e^(λ_t - λ_s), u = σ/α: the share of fresh noise in DDPM's step t -> s.

    Returns:
        The share of the variance of the noise at s, within [0, 1]: 1 from pure noise and at the
        clean level. For maps of levels, 0 where both levels are clean.

    Raises:
        ValueError: Noise increases from t to s, so the step has no noise to replace.
    """
    gap = t.logsnr - s.logsnr
    if isinstance(gap, Tensor):
        gap = gap.masked_fill(gap.isnan(), 0.0)  # inf - inf
        _check_decreasing(bool((gap <= 0).all()))
        return -gap.expm1()
    _check_decreasing(gap <= 0)
    return -math.expm1(gap)


def _check_decreasing(decreasing: bool) -> None:
    if not decreasing:
        raise ValueError(
            "fresh noise needs knots that fall in noise: to invert or to add noise, use a sampler "
            "without fresh noise (eta = 0)"
        )


def posterior_mean(prediction: Prediction, t: Level, s: Level) -> Tensor:
    """The mean of q(x_s | x_t, x_0), of the shape of x: α_s x_0 + σ_s r ε.

    Args:
        prediction: x_0 and ε of x_t = α_t x_0 + σ_t ε.
        t: level of x_t.
        s: cleaner level of x_s.

    Raises:
        ValueError: Noise increases from t to s. Exchange the two levels.
    """
    share = fresh_noise_share(t, s)
    share = share.to(prediction.eps) if isinstance(share, Tensor) else share
    return replace(prediction, eps=(1 - share) ** 0.5 * prediction.eps).at(s)


def log_variance_bounds(t: Level, s: Level) -> tuple[Tensor, Tensor]:
    """ln β̃ and ln β of the transition from t to s, in the coordinates of x_s.

    Args:
        t: level of x_t.
        s: cleaner level of x_s.

    Returns:
        Two float64 tensors on the host, of the shape of the levels. At a clean s, ln β̃ is -inf.

    Raises:
        ValueError: Noise increases from t to s. Exchange the two levels.
    """
    share = _float64(fresh_noise_share(t, s)).log()
    noise_t, noise_s = (logsigmoid(-_float64(level.logsnr)) for level in (t, s))
    norm = _log_square_norm(s)
    return norm + noise_s + share, norm + noise_t + share


def last_log_variance_bounds(before: Level, t: Level) -> tuple[Tensor, Tensor]:
    """The bounds of the last step, from t to x_0, in the coordinates of x_0.

    Its own β̃ is 0, so that the lower bound is the β̃ of the step before, from `before` to t, as in
    iDDPM. The coordinates of x_0 are those of the vp process at the clean level, where n = 1.

    Args:
        before: level before t.
        t: last level with noise.

    Returns:
        Two float64 tensors on the host, of the shape of the levels.

    Raises:
        ValueError: Noise increases from `before` to t. Exchange the two levels.
    """
    lower = log_variance_bounds(before, t)[0] - _log_square_norm(t)
    return lower, logsigmoid(-_float64(t.logsnr))


def _log_square_norm(level: Level) -> Tensor:
    """ln n², n² = α² + σ²."""
    return 2 * _float64(hypot(level.alpha, level.sigma)).log()


def _float64(value: Real) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
