"""A sampler whose steps are told of as they end: progress bars and callbacks of pipelines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import Sampler, SamplerWrapper, State
from diffcore.schedules import Level


@dataclass(frozen=True)
class Followed(SamplerWrapper):
    """The inner sampler, step for step.

    Args:
        inner: the integrator.
        tell: called at the end of each step with the states before its last evaluation and after it; the run goes on with the
            state that it returns.
    """

    inner: Sampler
    tell: Callable[[State, State], State]

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        return self.inner.start(x, knots, noise)

    def forget(self, state: State) -> State:
        return self.inner.forget(state)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        after = self.inner.advance(state, prediction, noise)
        return after if after.step == state.step else self.tell(state, after)

    def uses_guidance(self, state: State) -> bool:
        return self.inner.uses_guidance(state)

    def dry_run(self, knots: tuple[Level, ...]) -> Iterator[State]:
        return self.inner.dry_run(knots)  # a dry run has no steps to report
