"""The interface of samplers: pure state machines that integrate from knot to knot, without access
to the network.

    state = sampler.start(x, knots, noise)
    while not state.done:
        state = sampler.advance(state, denoise(state.x, state.level), noise)

In y = x/α, u = σ/α the probability flow is dy/du = ε; in z = x/(α+σ), a = σ/(α+σ) it is
dz/da = ε - x_0. The first-order step is the same in all of them, x_s = α_s x_0 + σ_s ε, and
`Prediction.at` computes it in this form.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, overload

import torch
from torch import Tensor

from diffcore.core.estimate import Estimate
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.transition import fresh_noise_share
from diffcore.schedules import Level, Real

if TYPE_CHECKING:
    # The default permits the annotation `Sampler` without a type argument, which the command-line
    # parser can read.
    from typing_extensions import TypeVar

    Memory = TypeVar("Memory", default=Any)
else:
    from typing import TypeVar

    Memory = TypeVar("Memory")

__all__ = [
    "Knots",
    "Memory",
    "Sampler",
    "SamplerWrapper",
    "State",
    "is_clean",
    "is_falling",
    "is_interior",
    "is_noisier",
    "multiply",
    "raise_noise",
    "renoise_prediction",
    "require_number",
]

Knots = tuple[Level, ...]
"""The levels that a sampler visits, n+1 for n steps."""


@dataclass(frozen=True)
class State(Generic[Memory]):
    """The immutable state of a sampler, which contains everything that it needs to continue.

    A state can be stored, copied and resumed.

    Args:
        x: input of the next network evaluation, (B, *shape); the result once `done`.
        level: noise level of x, at which the network is evaluated next; the last knot once `done`.
        remaining: the knots that are not reached yet, in order.
        step: number of steps completed, from 0; it is the key of a step's noise.
        memory: values that a multistep or multistage method keeps between evaluations; None before
            the first one.
    """

    x: Tensor
    level: Level
    remaining: Knots
    step: int = 0
    memory: Memory | None = None

    @property
    def done(self) -> bool:
        """Whether no knot remains, so that x is the result."""
        return not self.remaining

    @property
    def is_first_order(self) -> bool:
        """Whether the next step touches α = 0 or σ = 0, or ends beyond the levels of training.

        Methods that interpolate in u or λ, which are infinite at α = 0 or σ = 0, take the
        first-order step there. Beyond the cleanest level of training no network is evaluated.
        """
        knot = self.remaining[0]
        return not (is_interior(self.level) and is_interior(knot)) or knot.is_beyond_training

    def at_next_knot(self, x: Tensor, memory: Memory | None = None) -> "State[Memory]":
        """The state at the next knot.

        Args:
            x: (B, *shape) samples at the next knot.
            memory: memory of the sampler after the step.

        Returns:
            The state.
        """
        return State(x, self.remaining[0], self.remaining[1:], self.step + 1, memory)

    def require_memory(self) -> Memory:
        """The memory, of the type that `start` sets.

        Returns:
            The memory.

        Raises:
            ValueError: The memory is None: the state does not come from the sampler's `start`.
        """
        if self.memory is None:
            raise ValueError("the state has no memory: begin with sampler.start(x, knots, noise)")
        return self.memory


class Sampler(ABC, Generic[Memory]):
    """A numerical integrator of the reverse process; `Memory` is the type of its `State.memory`.

    Samplers are immutable: one object serves any number of runs and threads.
    """

    @property
    @abstractmethod
    def order(self) -> int:
        """Order of convergence on a smooth flow; for a stochastic sampler, the weak order."""

    @property
    def is_adaptive(self) -> bool:
        """Whether the levels that are evaluated, and their number, depend on the samples."""
        return False

    @property
    def is_direct(self) -> bool:
        """Whether a step is exactly α_s x_0 + σ_s ε of its one prediction, plus fresh noise.

        Only such samplers accept predictions with x ≠ α x_0 + σ ε (CFG++).
        """
        return self.order == 1

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """What the pair of the network may be (`Process.estimate`) for the result to be right.

        By default posterior_mean alone: solvers of the flow read its slope from the pair.
        """
        return ("posterior_mean",)

    def end(self, state: State[Memory]) -> Level:
        """The level to which a step uses the pair of a network of two times.

        Args:
            state: state before the evaluation.

        Returns:
            By default the next knot.
        """
        return state.remaining[0]

    def uses_guidance(self, state: State[Memory]) -> bool:
        """Whether guidance acts on the prediction at this state; if not, w = 1 is used there."""
        return True

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[Memory]:
        """The state at the first knot.

        Args:
            x: sample at the first knot, (B, *shape).
            knots: n+1 levels, strictly monotone in λ, with any first and last level.
            noise: noise of the run.

        Returns:
            The state whose `x` and `level` the network is evaluated at first.
        """
        return State(x, knots[0], knots[1:])

    @abstractmethod
    def advance(self, state: State[Memory], prediction: Prediction, noise: Noise) -> State[Memory]:
        """The state after one network evaluation.

        Args:
            state: the current state, which is not changed.
            prediction: x_0 and ε at (state.x, state.level).
            noise: noise of the run, the same object in each call.

        Returns:
            The state to evaluate next: at the next knot, or at a stage before it.
        """

    def forget(self, state: State[Memory]) -> State[Memory]:
        """The state without memory of earlier steps.

        The sampling loop calls it at a knot where the slope of the flow jumps, because no
        polynomial should be fitted through both sides.

        Returns:
            The state with an empty memory.
        """
        return replace(state, memory=None)

    def dry_run(self, knots: Knots, noise: Noise | None = None) -> Iterator[State[Memory]]:
        """Run the sampler on an empty batch.

        The evaluated levels depend only on the knots, so that these are the levels of any batch.

        Args:
            knots: levels between which the sampler steps.
            noise: noise of no seeds; None: a new one.

        Yields:
            Each state at which the network is evaluated, in order.
        """
        self._check_not_adaptive()
        if len(knots) < 2:
            return
        # A batch axis of length 0 broadcasts against maps of levels if x has an axis for each of
        # theirs.
        axes = max(1, *(torch.as_tensor(knot.logsnr).ndim for knot in knots))
        noise = replace(noise or Noise(torch.zeros(0, dtype=torch.int64), ()), shape=(1,) * axes)
        state = self.start(noise.start(), knots, noise)
        while not state.done:
            yield state
            state = self.advance(state, Prediction(state.x, state.x), noise)

    def evaluation_levels(self, knots: Knots) -> tuple[Level, ...]:
        """The levels at which the network is evaluated between these knots.

        Returns:
            One level for each evaluation, in order.

        Raises:
            ValueError: The sampler is adaptive, so the levels depend on the samples.
        """
        return tuple(state.level for state in self.dry_run(knots))

    def evaluations(self, knots: Knots) -> int:
        """The number of network evaluations for each sample in a run over these knots.

        Raises:
            ValueError: The sampler is adaptive, so the number depends on the samples.
        """
        return len(self.evaluation_levels(knots))

    def draws_noise(self, knots: Knots) -> bool:
        """Whether a run over these knots draws noise beside that of its first x.

        Raises:
            ValueError: The sampler is adaptive, so the run depends on the samples.
        """
        noise = _CountedNoise(torch.zeros(0, dtype=torch.int64), ())
        for _ in self.dry_run(knots, noise):
            pass
        return bool(noise.draws)

    def _check_not_adaptive(self) -> None:
        if self.is_adaptive:
            raise ValueError(
                f"the evaluations of {self} depend on the samples, so they are not known in "
                "advance: run it and read the number of evaluations from the result"
            )


@dataclass(frozen=True)
class _CountedNoise(Noise):
    """Noise that lists the steps at which it, or a branch of it, is drawn.

    Args:
        draws: numbers of these steps.
    """

    draws: list[int] = field(default_factory=list)

    def step(self, index: int) -> Tensor:
        self.draws.append(index)
        return super().step(index)


class SamplerWrapper(Sampler[Memory]):
    """Base of samplers that modify another sampler, `inner`, and have its capabilities.

    Subclasses are dataclasses with a field `inner`.
    """

    inner: Sampler

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def is_adaptive(self) -> bool:
        return self.inner.is_adaptive

    @property
    def is_direct(self) -> bool:
        return self.inner.is_direct


def renoise_prediction(prediction: Prediction, share: Real, z: Tensor) -> Prediction:
    """(x_0, √(1-share) ε + √share z): replace this share of the noise's variance by fresh noise.

    Args:
        prediction: x_0 and ε.
        share: share of the variance, within [0, 1]; a number or a map that broadcasts against ε.
        z: fresh standard normal noise, of the shape of ε.

    Returns:
        The prediction with the same x_0.
    """
    share = share.to(z) if isinstance(share, Tensor) else share
    return replace(prediction, eps=(1 - share) ** 0.5 * prediction.eps + share**0.5 * z)


def raise_noise(x: Tensor, level: Level, noisier: Level, z: Tensor) -> Tensor:
    """Raise the noise of x from one level to a noisier one: (α'/α) x + √(σ'² - (σ α'/α)²) z.

    The result has exactly the marginal of the noisier level.

    Args:
        x: sample at `level`.
        level: noise level of x, (α, σ).
        noisier: noise level of the result, (α', σ').
        z: standard normal noise, of the shape of x.

    Returns:
        The sample at the noisier level.
    """
    share = fresh_noise_share(noisier, level)
    kept = multiply(noisier.alpha / level.alpha, x)
    return kept + multiply(noisier.sigma * share**0.5, z)


def is_clean(level: Level) -> bool:
    """Whether σ = 0 for the whole batch; a step to such a level is x_0 and adds no noise."""
    return isinstance(level.sigma, float) and level.sigma == 0


def is_interior(level: Level) -> bool:
    """Whether α and σ are nonzero everywhere in a map of levels, so that u and λ are finite.

    For a map of levels, the comparison is on the host.
    """
    logsnr = level.logsnr
    return bool(logsnr.isfinite().all()) if isinstance(logsnr, Tensor) else math.isfinite(logsnr)


def is_falling(knots: Knots) -> bool:
    """Whether noise decreases from the first knot to the last, everywhere in maps of levels."""
    return is_noisier(knots[0], knots[-1])


def is_noisier(level: Level, other: Level) -> bool:
    """Whether a level is noisier than another, everywhere in maps of levels."""
    return bool(torch.as_tensor(level.logsnr < other.logsnr).all())


def require_number(value: Real, subject: str, remedy: str) -> float:
    """A value of a level that is the same for the whole batch, as a float.

    Args:
        value: λ, u or a of a level.
        subject: what needs one level; it begins the message.
        remedy: what to do instead.

    Returns:
        The value.

    Raises:
        TypeError: The level is a map. Follow the remedy.
    """
    if isinstance(value, Tensor):
        raise TypeError(
            f"{subject} needs one level for the whole batch, not a map of levels: {remedy}"
        )
    return float(value)


@overload
def multiply(coefficient: Real, x: Tensor) -> Tensor: ...
@overload
def multiply(coefficient: Real, x: Tensor | float) -> Tensor | float: ...
def multiply(coefficient: Real, x: Tensor | float) -> Tensor | float:
    """coefficient · x, where the coefficient is a number or a float64 map of levels on the host."""
    if isinstance(coefficient, Tensor) and isinstance(x, Tensor):
        coefficient = coefficient.to(x)
    return coefficient * x
