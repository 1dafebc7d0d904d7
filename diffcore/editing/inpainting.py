"""Inpainting by replacement: what is known of an image is put back at every knot, noised to its level."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import Sampler, SamplerWrapper, State
from diffcore.samplers.base import noisier
from diffcore.schedules import Level, check_falling

Run = tuple[Level, ...]


class Memory(NamedTuple):
    """Where the inner sampler is, how many runs it has ended, and the runs that follow."""

    inner: State
    ended: int
    later: tuple[Run, ...]


@dataclass(frozen=True, eq=False)
class RePaint(SamplerWrapper):
    """x ← mask (α x_known + σ z) + (1 - mask) x at each knot; and back: x ← (α'/α) x + √(σ'² - (α'/α)² σ²) z to a noisier knot.

    Lugmayr et al. 2022 (2201.09865, Algorithm 1 and its jumps): from each knot `jump` steps apart the run goes back by `jump`
    steps, resamplings - 1 times, so that the unknown part is harmonised with the known one. resamplings = 1 is replacement
    alone. z is fresh each time. Where the last knot is clean, the result has the known pixels exactly.

    Any sampler may integrate between: it begins anew after each jump, and a multistep one remembers, within a run,
    predictions from before the last replacement; a stage between two knots sees no replacement. The paper's is DDIM(1).

    Args:
        inner: the sampler between two jumps.
        image: x_0 where it is known, (*shape) or a row for each of the batch; with `sample`, one for all.
        mask: True where the image is known; booleans that broadcast against it.
        jump: steps of a jump, j; the paper has 10 of 250.
        resamplings: how often each jump's steps are taken, r.
    """

    inner: Sampler
    image: Tensor
    mask: Tensor
    jump: int = 10
    resamplings: int = 10
    order = 1

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask holds {self.mask.dtype}, expected booleans, True where the image is known"
            )
        if torch.broadcast_shapes(self.mask.shape, self.image.shape) != self.image.shape:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, expected to fit {tuple(self.image.shape)}"
            )
        if self.jump < 1 or self.resamplings < 1:
            raise ValueError(
                f"jump and resamplings are {self.jump} and {self.resamplings}, expected at least 1 of each"
            )

    def start(self, x: Tensor, knots: Run, noise: Noise) -> State:
        check_falling(knots)
        first, *later = self._runs(knots)
        x = self._replaced(x, first[0], _branch(noise, 0, 1).start())
        return _outer(self.inner.start(x, first, _branch(noise, 0, 0)), 0, 0, tuple(later))

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        before, ended, later = state.memory
        inner = self.inner.advance(before, prediction, _branch(noise, ended, 0))
        passed = len(inner.left) < len(before.left)
        if passed:
            z = _branch(noise, ended, 1).step(inner.step)
            inner = replace(inner, x=self._replaced(inner.x, inner.level, z))
        if inner.done and later:
            run, *rest = later
            x = noisier(inner.x, inner.level, run[0], _branch(noise, ended, 2).step(0))
            ended, later = ended + 1, tuple(rest)
            inner = self.inner.start(x, run, _branch(noise, ended, 0))
        return _outer(inner, state.step + passed, ended, later)

    def forget(self, state: State) -> State:
        return replace(
            state, memory=state.memory._replace(inner=self.inner.forget(state.memory.inner))
        )

    def uses_guidance(self, state: State) -> bool:
        return self.inner.uses_guidance(state.memory.inner)

    def evaluations(self, knots: Run) -> int:
        return sum(self.inner.evaluations(run) for run in self._runs(knots))

    def _replaced(self, x: Tensor, level: Level, z: Tensor) -> Tensor:
        known = (
            level.alpha * self.image.to(x) + level.sigma * z if level.sigma else self.image.to(x)
        )
        return torch.where(self.mask.to(x.device), known, x)

    def _runs(self, knots: Run) -> list[Run]:
        """The falling parts of the way, each after the first one `jump` knots back up from where the one before it ended."""
        runs, begin, last = (
            [],
            0,
            len(knots) - 2,
        )  # the last noisy knot: the clean one is not left again
        for end in range(self.jump + last % self.jump, last + 1, self.jump):
            for _ in range(self.resamplings - 1):
                runs.append(knots[begin : end + 1])
                begin = end - self.jump
        return [*runs, knots[begin:]]


def _outer(inner: State, step: int, ended: int, later: tuple[Run, ...]) -> State:
    left = inner.left + tuple(knot for run in later for knot in run[1:])
    return State(inner.x, inner.level, left, step, Memory(inner, ended, later))


def _branch(noise: Noise, run: int, use: int) -> Noise:
    """A noise of its own for each run and use: 0 the inner sampler's, 1 what is known, 2 the way back."""
    return noise.branch(3 * run + use)
