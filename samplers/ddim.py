"""DDIM: the first-order step, with as much fresh noise as eta asks for."""

from dataclasses import dataclass

from diffcore.noise import Noise
from diffcore.prediction import Prediction
from diffcore.samplers.base import Sampler, State
from diffcore.schedules import Level, Real


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = α_s x_0 + σ_s (√(1 - η²(1-r²)) ε + η √(1-r²) z), r = u_s/u_t the ratio of σ/α: scaling-free.

    Song et al. 2020 (2010.02502, eq. 12 and 16) in the vp scaling; η = 0 is the probability flow, η = 1 the ancestral
    sampler of DDPM. From α = 0, r = 0: at η = 1 the step renoises in full.

    Args:
        eta: η within [0, 1]; above 0 the knots must fall in noise.
    """

    eta: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, expected a share of fresh noise within [0, 1]")

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        knot = state.left[0]
        if self.eta == 0 or knot.sigma == 0:
            return state.reached(prediction.at(knot))
        fresh = self.eta**2 * (1 - _ratio(state.level, knot) ** 2)
        eps = (1 - fresh) ** 0.5 * prediction.eps + fresh**0.5 * noise.step(state.step)
        return state.reached(Prediction(prediction.x0, eps).at(knot))

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1


def _ratio(t: Level, s: Level) -> Real:
    """u_s / u_t, 0 from pure noise."""
    if s.logsnr < t.logsnr:
        raise ValueError("fresh noise (eta > 0) needs knots that fall in noise: invert and renoise with eta = 0")
    return s.sigma * t.alpha / (s.alpha * t.sigma)
