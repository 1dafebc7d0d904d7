"""DDIM: the first-order step, with as much fresh noise as eta asks for."""

from dataclasses import dataclass

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, clean, fresh, renoised
from diffcore.schedules import Level


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = α_s x_0 + σ_s (√(1 - η²(1-r²)) ε + η √(1-r²) z), r = u_s/u_t the ratio of σ/α: scaling-free.

    Song et al. 2020 (2010.02502, eq. 12 and 16) in the vp scaling; η = 0 is the probability flow, η = 1 the ancestral
    sampler of DDPM. From α = 0, r = 0: at η = 1 the step renoises in full. Knots may be maps of levels.

    Args:
        eta: η within [0, 1]; above 0 the knots must fall in noise.
    """

    eta: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        t, s = state.level, state.left[0]
        if self.eta == 0 or clean(s):
            return state.reached(prediction.at(s))
        share = self.eta**2 * fresh(t, s)
        return state.reached(renoised(prediction, share, noise.between(t, s, state.step)).at(s))

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1


def check_eta(eta: float) -> None:
    """Raise where eta is no share."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a share of fresh noise within [0, 1]")
