"""Predictor-corrector sampling: after each step, Langevin steps at the new level correct the
marginal.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.transition import fresh_noise_share
from diffcore.samplers.base import (
    Knots,
    Sampler,
    SamplerWrapper,
    State,
    renoise_prediction,
)
from diffcore.samplers.ddim import DDIM
from diffcore.samplers.segments import SegmentSampler
from diffcore.schedules import Level

__all__ = ["PredictorCorrector"]


class _CorrectorMemory(NamedTuple):
    """Memory of `PredictorCorrector`.

    Args:
        inner: memory of the predictor.
        start: level at which the predictor's last step began.
        corrections: number of corrections that remain at the current knot.
    """

    inner: Any
    start: Level
    corrections: int = 0


@dataclass(frozen=True)
class PredictorCorrector(SamplerWrapper[_CorrectorMemory]):
    """After each step of `inner`, apply x ← α x_0 + σ (ρ ε + √(1-ρ²) z) K times at the new level.

    With the score s = -ε/σ this is Langevin's step x + τ σ² s + √(2τ) σ z to first order in
    τ = 1 - ρ. The variance of its noise is 1 - ρ² = 2τ - τ² instead of 2τ, so that the step is
    stable at every size and exact if ε is standard normal. There are two rules for the step size:

    - With `snr`: τ = 2 snr². This is the published rule τ = 2 snr² |z|²/|ε|² with both norms
      replaced by their expectation √D, so that a step is affine and each sample is independent of
      the others. τ does not shrink with the steps of the grid, so a bias remains: the variance is
      at least (1+ρ)/2 of the correct one.
    - Without: ρ = u_s/u_t, u = σ/α. The corrector adds as much noise as the reverse SDE adds in the
      step from t to s, and marginals are correct in the limit of small steps.

    Predictor-corrector guidance applies guidance to the corrector alone. With a deterministic
    predictor, no snr and K = 1, CFG(2w-1) has the limit of CFG(w) with DDIM(1) for small steps;
    large K samples the density p^γ p_ref^(1-γ) (Bradley & Nakkiran, 2408.09000).

    The first knot needs no correction, and at the last knot the network is not evaluated.

    Song et al. 2020 (2011.13456, Algorithms 2 to 5).

    Args:
        inner: the predictor, a sampler whose state is at a knot after each step; not one that
            returns to noisier levels (Restart, RePaint), which takes the corrector as its own inner
            sampler.
        corrections: K ≥ 0, the number of Langevin steps at each knot, with one evaluation each.
        snr: ratio of score to noise that determines the corrector's step, 0.16 for VE and 0.01 for
            VP in the paper; without it ρ = u_s/u_t.
        guides: predictions on which guidance acts: both (predictor and corrector) or corrector.
    """

    inner: Sampler = DDIM()
    corrections: int = 1
    snr: float | None = None
    guides: Literal["both", "corrector"] = "both"

    def __post_init__(self) -> None:
        if self.corrections < 0:
            raise ValueError(
                f"corrections is {self.corrections}, expected at least 0 Langevin steps per knot"
            )
        if self.snr is not None and not 0 < self.snr <= 0.5**0.5:
            raise ValueError(
                f"snr is {self.snr}, expected within (0, 0.707], where the step 2 snr² is at most 1"
            )
        if _returns_to_noise(self.inner):
            raise ValueError(
                f"inner is {self.inner}, which returns to noisier levels: put the corrector inside "
                f"it, {type(self.inner).__name__}(PredictorCorrector(...), ...)"
            )
        if self.guides not in ("both", "corrector"):
            raise ValueError(f"guides is {self.guides!r}, expected both or corrector")

    @property
    def order(self) -> int:
        if not self.corrections:
            return self.inner.order
        return min(self.inner.order, 1 if self.snr is None else 0)

    @property
    def is_direct(self) -> bool:
        """True if K = 0; a correction moves x even for small steps if x ≠ α x_0 + σ ε."""
        return not self.corrections and self.inner.is_direct

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[_CorrectorMemory]:
        state = self.inner.start(x, knots, noise)
        return replace(state, memory=_CorrectorMemory(state.memory, state.level))

    def advance(
        self, state: State[_CorrectorMemory], prediction: Prediction, noise: Noise
    ) -> State[_CorrectorMemory]:
        memory = state.require_memory()
        if memory.corrections:
            return self._correct(state, prediction, noise.branch(memory.corrections))
        inner_state = _inner_state(state)
        after = self.inner.advance(inner_state, prediction, noise.branch(0))
        if after.step == state.step or after.done:
            return replace(after, memory=_CorrectorMemory(after.memory, memory.start))
        start = memory.start if self.corrections else after.level
        return replace(after, memory=_CorrectorMemory(after.memory, start, self.corrections))

    def forget(self, state: State[_CorrectorMemory]) -> State[_CorrectorMemory]:
        inner = self.inner.forget(_inner_state(state))
        return replace(state, memory=state.require_memory()._replace(inner=inner.memory))

    def uses_guidance(self, state: State[_CorrectorMemory]) -> bool:
        if state.require_memory().corrections:
            return True
        return self.guides == "both" and self.inner.uses_guidance(_inner_state(state))

    def _correct(
        self, state: State[_CorrectorMemory], prediction: Prediction, noise: Noise
    ) -> State[_CorrectorMemory]:
        """The state after one Langevin step at the current level.

        Args:
            state: the current state.
            prediction: x_0 and ε at the current level.
            noise: noise of this correction.
        """
        memory, s = state.require_memory(), state.level
        t = memory.start
        share = fresh_noise_share(t, s) if self.snr is None else 1 - (1 - 2 * self.snr**2) ** 2
        x = renoise_prediction(prediction, share, noise.between(t, s, state.step)).at(s)
        # The next step of the predictor begins at this level.
        start = t if memory.corrections > 1 else s
        memory = _CorrectorMemory(memory.inner, start, memory.corrections - 1)
        return replace(state, x=x, memory=memory)


def _inner_state(state: State[_CorrectorMemory]) -> State:
    """The state of the predictor, with the predictor's memory."""
    return replace(state, memory=state.require_memory().inner)


def _returns_to_noise(sampler: Sampler) -> bool:
    """Whether a sampler, or one inside it, returns to noisier levels."""
    if isinstance(sampler, SamplerWrapper):
        return isinstance(sampler, SegmentSampler) or _returns_to_noise(sampler.inner)
    return False
