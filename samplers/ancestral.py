"""Ancestral sampling under its two other names: DDPM, with a choice of the posterior's variance, and Euler ancestral."""

from dataclasses import dataclass

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, hypot
from diffcore.samplers.base import Sampler, State, clean, fresh, renoised
from diffcore.samplers.ddim import DDIM
from diffcore.schedules import Level, Real


@dataclass(frozen=True)
class DDPM(Sampler):
    """x_s = α_s x_0 + σ_s r ε + √V z, r = u_s/u_t of u = σ/α; V = β̃^(1-v) β^v, the variance of the posterior.

    In the vp scaling β̃ = σ_s² (1-r²) and β = σ_t² (1-r²) = 1 - ᾱ_t/ᾱ_s, whichever levels lie between the knots; another
    scaling multiplies both by α_s² + σ_s². Ho et al. 2020 (2006.11239, eq. 7 and section 3.2); iDDPM (2102.09672, eq. 15)
    learns v for each pixel, here it is one number. v = 0 is DDIM(1). β is right for data of unit variance, β̃ for data that
    is one point. The step to the clean level is x_0, whatever v.

    Args:
        variance: v within [0, 1]: 0 is β̃ (diffusers' fixed_small), 1 is β (fixed_large), between are geometric means.
    """

    variance: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise ValueError(
                f"variance is {self.variance}, expected v within [0, 1]: 0 is β̃ (small), 1 is β (large)"
            )

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        t, s = state.level, state.left[0]
        if clean(s):
            return state.reached(prediction.at(s))
        z = (_vp_sigma(t) / _vp_sigma(s)) ** self.variance * noise.between(t, s, state.step)
        return state.reached(renoised(prediction, fresh(t, s), z).at(s))

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """In y = x/α, u = σ/α: Euler's step y + (u_down - u) ε, then noise u_up z, with u_down² + u_up² = u_s².

    u_up = η u_s √(1 - u_s²/u_t²), as in k-diffusion and diffusers. Written out, y_s = x_0 + u_down ε + u_up z, so it is
    DDIM(η), whose default η is 0 where this one's is 1.

    Args:
        eta: η within [0, 1]; above 0 the knots must fall in noise.
    """

    eta: float = 1.0


def _vp_sigma(level: Level) -> Real:
    return level.sigma / hypot(level.alpha, level.sigma)
