"""A sampler whose steps are observed, for the progress bars and callbacks of pipelines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import Sampler, SamplerWrapper, State
from diffcore.schedules import Level

__all__ = ["ObservedSampler"]


@dataclass(frozen=True)
class ObservedSampler(SamplerWrapper):
    """The inner sampler with a function that observes each of its steps.

    Args:
        inner: numerical integrator.
        observe: called after each step with the states before its last evaluation and after it; it
            returns the state from which sampling continues.
    """

    inner: Sampler
    observe: Callable[[State, State], State]

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        return self.inner.start(x, knots, noise)

    def forget(self, state: State) -> State:
        return self.inner.forget(state)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        after = self.inner.advance(state, prediction, noise)
        return after if after.step == state.step else self.observe(state, after)

    def uses_guidance(self, state: State) -> bool:
        return self.inner.uses_guidance(state)

    def dry_run(self, knots: tuple[Level, ...], noise: Noise | None = None) -> Iterator[State]:
        return self.inner.dry_run(knots, noise)  # the steps of a dry run are not observed
