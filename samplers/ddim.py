"""The first-order step with fresh noise: DDIM, and ancestral sampling in the parametrisations of
DDPM and k-diffusion.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.estimate import Estimate
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, hypot
from diffcore.core.transition import fresh_noise_share
from diffcore.samplers.base import (
    Sampler,
    State,
    is_clean,
    multiply,
    renoise_prediction,
)
from diffcore.schedules import Level, Real

__all__ = ["DDIM", "DDPM", "EulerAncestral", "check_eta"]


@dataclass(frozen=True)
class DDIM(Sampler[None]):
    """x_s = α_s x_0 + σ_s (√(1 - η²(1-r²)) ε + η √(1-r²) z), with r = u_s/u_t the ratio of u = σ/α.

    The step is the same in every scaling; in the vp scaling it is eq. 12 and 16 of Song et al. 2020
    (2010.02502). η = 0 is the probability flow, η = 1 the ancestral sampler of DDPM. From α = 0,
    r = 0, so at η = 1 the step replaces all noise. Knots may be maps of levels.

    With a network of two times (`Process.estimate` mean_velocity) and η = 0 it is the sampler of
    MeanFlow (Geng et al. 2025, 2505.13447, Algorithm 2), z_s = z + (a_s - a) U, and of Shortcut
    models. With a learned encoder of x_0 (encoded_mean) η must be 1.

    Args:
        eta: η within [0, 1], the amount of fresh noise; above 0 the knots must fall in noise.
    """

    eta: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        if self.eta == 1:
            return ("posterior_mean", "encoded_mean")
        return ("posterior_mean",) if self.eta else ("posterior_mean", "mean_velocity")

    def advance(self, state: State[None], prediction: Prediction, noise: Noise) -> State[None]:
        t, s = state.level, state.remaining[0]
        if self.eta == 0 or is_clean(s):
            return state.at_next_knot(prediction.at(s))
        share = self.eta**2 * fresh_noise_share(t, s)
        z = noise.between(t, s, state.step)
        return state.at_next_knot(renoise_prediction(prediction, share, z).at(s))


@dataclass(frozen=True)
class DDPM(Sampler[None]):
    """x_s = α_s x_0 + σ_s r ε + √V z, r = u_s/u_t of u = σ/α, with the posterior variance

        V = β̃^(1-v) β^v

    In the vp scaling β̃ = σ_s² (1-r²) and β = σ_t² (1-r²) = 1 - ᾱ_t/ᾱ_s, for knots any distance
    apart; another scaling multiplies both by α_s² + σ_s². v = 0 is DDIM(1). β is exact
    for data of unit variance, β̃ for data that is one point. The step to the clean level is x_0
    for every v.

    Ho et al. 2020 (2006.11239, eq. 7 and section 3.2). A network whose process has a learned
    variance predicts v for each element (iDDPM, 2102.09672, eq. 15). β̃ and β are those of the step,
    however long it is, as with the respaced steps of iDDPM.

    Args:
        variance: v within [0, 1], for all elements: 0 is β̃ (diffusers' fixed_small), 1 is β
            (fixed_large), and values between are geometric means of the two. None is the v that the
            network predicts (learned_range), or 0 if the variance of its process is fixed.
    """

    variance: float | None = None
    order = 1

    def __post_init__(self) -> None:
        if self.variance is not None and not 0 <= self.variance <= 1:
            raise ValueError(
                f"variance is {self.variance}, expected v within [0, 1]: 0 is β̃ (small), 1 is β "
                "(large)"
            )

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        return ("posterior_mean", "encoded_mean")

    def advance(self, state: State[None], prediction: Prediction, noise: Noise) -> State[None]:
        t, s = state.level, state.remaining[0]
        if is_clean(s):
            return state.at_next_knot(prediction.at(s))
        v = prediction.variance if self.variance is None else self.variance
        z = noise.between(t, s, state.step)
        z = z if v is None else multiply(_gain(t, s, v), z)
        share = fresh_noise_share(t, s)
        return state.at_next_knot(renoise_prediction(prediction, share, z).at(s))


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """In y = x/α, u = σ/α: y_s = y + (u_down - u) ε + u_up z, with u_down² + u_up² = u_s².

    u_up = η u_s √(1 - u_s²/u_t²), as in k-diffusion and diffusers. Inserting y = x_0 + u ε gives
    y_s = x_0 + u_down ε + u_up z, so this is DDIM(η) with another default.

    Args:
        eta: η within [0, 1], the amount of fresh noise; above 0 the knots must fall in noise.
    """

    eta: float = 1.0


def check_eta(eta: float) -> None:
    """Raise ValueError if η is not within [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected an amount of fresh noise within [0, 1]")


def _gain(t: Level, s: Level, v: Real) -> Real:
    """(β/β̃)^(v/2), the factor of the noise; 1 where s is clean, since no noise is added there."""
    ratio = _vp_sigma(t) / _vp_sigma(s)
    if isinstance(ratio, Tensor):
        ratio = ratio.masked_fill(torch.as_tensor(s.sigma == 0), 1.0)
        ratio = ratio.to(v) if isinstance(v, Tensor) else ratio
    return ratio**v


def _vp_sigma(level: Level) -> Real:
    """σ of the level in the vp scaling."""
    return level.sigma / hypot(level.alpha, level.sigma)
