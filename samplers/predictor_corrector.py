"""Predictor-corrector: a sampler takes each step, and Langevin steps at the level it reached mend the marginal."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, fresh, renoised
from diffcore.samplers.ddim import DDIM
from diffcore.schedules import Level


class Memory(NamedTuple):
    """The predictor's memory, the knot that its step left, and the corrections still to make at the knot it reached."""

    predictor: Any
    left: Level
    corrections: int = 0


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """After each step of `predictor`, K times x ← α x_0 + σ (ρ ε + √(1-ρ²) z) at the level reached.

    Song et al. 2020 (2011.13456, Algorithms 2 to 5). With the score s = -ε/σ this is Langevin's step x + τ σ² s + √(2τ) σ z to
    first order in τ = 1 - ρ. Its noise is cut from 2τ to 1 - ρ² = 2τ - τ², so that the step is stable at any size and exact
    where ε is standard normal. Two step sizes:

    - by `snr`: τ = 2 snr², the published rule τ = 2 snr² |z|²/|ε|² with both norms at their expectation √D, so that a step is
      affine, and no sample's depends on another's or on the batch. It does not shrink with the grid's steps, and the bias of
      the corrector, a variance of at least (1+ρ)/2 of the right one, stays.
    - without: ρ = u_s/u_t, u = σ/α; the corrector draws as much noise as the reverse SDE does in the step from t to s, and
      marginals are right in the limit of small steps.

    Predictor-corrector guidance (Bradley & Nakkiran 2408.09000) guides the corrector alone: with a predictor of the flow, no
    snr and K = 1, CFG(2w-1) samples as CFG(w) does with DDIM(1) as steps shrink, and large K the density p^γ p_ref^(1-γ).

    The first knot and the last are not corrected: the one was just drawn, at the other no network is asked.

    Args:
        predictor: takes the steps, itself at one knot after each.
        corrections: K ≥ 0, at one evaluation each.
        snr: the ratio of score to noise that sets the corrector's step, 0.16 for VE and 0.01 for VP in the paper.
        guides: whether guidance acts on predictor and corrector both, or on the corrector alone.
    """

    predictor: Sampler = DDIM()
    corrections: int = 1
    snr: float | None = None
    guides: Literal["both", "corrector"] = "both"

    def __post_init__(self) -> None:
        if self.corrections < 0:
            raise ValueError(
                f"corrections is {self.corrections}, expected at least 0 Langevin steps a knot"
            )
        if self.snr is not None and not 0 < self.snr <= 0.5**0.5:
            raise ValueError(
                f"snr is {self.snr}, expected within (0, 0.707], where the step 2 snr² is at most 1"
            )
        if self.guides not in ("both", "corrector"):
            raise ValueError(f"guides is {self.guides!r}, expected both or corrector")

    @property
    def order(self) -> int:
        return (
            min(self.predictor.order, 1 if self.snr is None else 0)
            if self.corrections
            else self.predictor.order
        )

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.predictor.adaptive

    @property
    def direct(self) -> bool:
        """Only without corrections: one whose x_0 and ε do not make x would move it however small its step."""
        return not self.corrections and self.predictor.direct

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        state = self.predictor.start(x, knots, noise)
        return replace(state, memory=Memory(state.memory, state.level))

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        predictor, left, corrections = state.memory
        if corrections:
            x = self._corrected(state, prediction, noise.branch(corrections))
            before = left if corrections > 1 else state.level
            return replace(state, x=x, memory=Memory(predictor, before, corrections - 1))
        after = self.predictor.advance(
            replace(state, memory=predictor), prediction, noise.branch(0)
        )
        if after.step == state.step or after.done:
            return replace(after, memory=Memory(after.memory, left))
        return replace(
            after,
            memory=Memory(
                after.memory, left if self.corrections else after.level, self.corrections
            ),
        )

    def forget(self, state: State) -> State:
        predictor = self.predictor.forget(replace(state, memory=state.memory.predictor))
        return replace(state, memory=state.memory._replace(predictor=predictor.memory))

    def _corrected(self, state: State, prediction: Prediction, noise: Noise) -> Tensor:
        t, s = state.memory.left, state.level
        share = fresh(t, s) if self.snr is None else 1 - (1 - 2 * self.snr**2) ** 2
        return renoised(prediction, share, noise.between(t, s, state.step)).at(s)

    def uses_guidance(self, state: State) -> bool:
        predictor, _, corrections = state.memory
        if corrections:
            return True
        return self.guides == "both" and self.predictor.uses_guidance(
            replace(state, memory=predictor)
        )

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return self.predictor.evaluations(knots) + self.corrections * (len(knots) - 2)
