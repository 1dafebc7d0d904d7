"""One call of a pipeline: which levels its network will be asked about, and where it is.

A sampler's questions depend on its knots alone, so a run of no samples tells them beforehand. A pipeline may begin at any of
them (image-to-image, a refiner): at the beginning of a step the sampler starts there; inside a step that step is finished by
the first-order step, and the sampler starts at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.samplers import Knots, Sampler, State
from diffcore.sampling.loop import check_levels, find_mode_changes, forget_at_mode_change
from diffcore.schedules import Level


@dataclass(frozen=True)
class Plan:
    """The states of a run, without samples, in the order in which the network is asked.

    Args:
        process: of the network.
        sampler: the integrator.
        visited: the knots.
        states: one an evaluation.
        corners: λ of the knots at which guidance changes its mode.
    """

    process: Process
    sampler: Sampler
    visited: Knots
    states: tuple[State, ...]
    corners: frozenset[float] = frozenset()

    @classmethod
    def of(
        cls, process: Process, sampler: Sampler, knots: Knots, levels: Sequence[float] = ()
    ) -> "Plan":
        """The plan of a run over these knots, with corners of the flow at these levels.

        Raises:
            ValueError: the network cannot be asked at one of them, or the sampler changes x before it asks.
        """
        check_levels(process, knots)
        plan = cls(
            process, sampler, knots, tuple(sampler.dry_run(knots)), find_mode_changes(knots, levels)
        )
        if plan.states[0].level != knots[0]:
            raise ValueError(
                f"{sampler} adds noise before its first question, which a pipeline has asked by then: set churn_max below "
                f"σ/α = {knots[0].ratio:.4g}, that of the first knot"
            )
        return plan

    def times(self) -> Tensor:
        """What the network is told: int64 where all are indices of a table's entries, else float32."""
        numbers = torch.tensor(
            [float(self.process.time(state.level)) for state in self.states], dtype=torch.float64
        )
        entries = self.process.time.variable == "index" and bool(
            ((numbers - numbers.round()).abs() < 1e-6).all()
        )
        return numbers.round().long() if entries else numbers.float()

    def aligned(self, position: int) -> bool:
        """Whether this evaluation is the first of a step."""
        return position == 0 or self.states[position].step != self.states[position - 1].step

    def knots(self, position: int) -> Knots:
        """The level of this evaluation, and the knots still to reach.

        Raises:
            ValueError: from there the sampler would ask about other levels than those planned.
        """
        if position == 0:
            return self.visited
        state = self.states[position]
        knots = (state.level, *state.remaining)
        if self._levels(position, knots) != [state.level for state in self.states[position:]]:
            raise ValueError(
                f"{self.sampler} cannot begin at evaluation {position} of {len(self.states)}, it would ask about other levels "
                f"than the pipeline was told: use another strength, or a sampler such as DDIM()"
            )
        return knots

    def _levels(self, position: int, knots: Knots) -> list[Level]:
        if self.aligned(position):
            return list(self.sampler.evaluation_levels(knots))
        return [knots[0], *self.sampler.evaluation_levels(knots[1:])]


@dataclass
class Call:
    """Where one call of a pipeline is.

    Args:
        plan: what it will ask.
        timesteps: what the network is told, on the pipeline's device.
        numbers: the same on the host.
        begin: the evaluation that it begins with, if it has said so.
        state: of the sampler, once it has begun.
        finishing: whether it began inside a step, which the first-order step is to finish.
        guided: what attached guidance remembers of this call.
    """

    plan: Plan
    timesteps: Tensor
    numbers: list[float]
    begin: int | None = None
    state: State | None = None
    finishing: bool = False
    guided: Any = None

    @classmethod
    def of(cls, plan: Plan, device: Any) -> "Call":
        """A call that has not begun."""
        times = plan.times()
        return cls(plan, times.to(device), times.tolist())

    @property
    def knots(self) -> Knots:
        """Those from where the call has begun."""
        return self.plan.knots(self.begin or 0)

    def now(self, t: Any) -> State:
        """The state that the network is asked about, before the first step without x."""
        if self.state is not None:
            return self.state
        position = self._position(t)
        state = self.plan.states[position]
        return replace(state, step=0, memory=None) if position else state

    def start(self, t: Any, x: Tensor, noise: Noise) -> State:
        """The state of the sampler with this x: the first, or the one under way, whose x a pipeline may have changed."""
        if self.guided is not None:
            self.guided.finish_evaluation(len(x))
        if self.state is not None:
            if self.state.done:
                raise ValueError(
                    f"the run of {len(self.numbers)} evaluations is over: call set_timesteps for another"
                )
            return replace(self.state, x=x)
        position = self._position(t)
        self.finishing, knots = not self.plan.aligned(position), self.plan.knots(position)
        return (
            State(x, knots[0], knots[1:])
            if self.finishing
            else self.plan.sampler.start(x, knots, noise)
        )

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        """The next state, which is kept."""
        sampler = self.plan.sampler
        if self.finishing:
            self.finishing, state = False, state.at_next_knot(prediction.at(state.remaining[0]))
            self.state = (
                state
                if state.done
                else sampler.start(state.x, (state.level, *state.remaining), noise)
            )
        else:
            self.state = forget_at_mode_change(
                sampler, sampler.advance(state, prediction, noise), self.plan.corners
            )
        return self.state

    def _position(self, t: Any) -> int:
        """The evaluation to begin with: as said, or the one that is told t, at the beginning of a step if there are two."""
        if self.begin is not None:
            return self.begin
        number = float(t)
        found = [
            i
            for i, own in enumerate(self.numbers)
            if abs(own - number) <= 1e-6 * max(1.0, abs(own))
        ]
        if not found:
            raise ValueError(
                f"timestep is {number:g}, expected one of those of set_timesteps: {self.numbers}"
            )
        self.begin = next((i for i in found if self.plan.aligned(i)), found[0])
        return self.begin
