"""One call of a pipeline: the levels of its network evaluations, and its progress.

The levels depend only on the knots, so a dry run on an empty batch lists them before the call. A
pipeline may start at any of them (image-to-image, a refiner). If the first evaluation is at the
start of a step, the sampler starts there. Otherwise a first-order step goes to the next knot, and
the sampler starts at that knot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.samplers import Knots, Sampler, State
from diffcore.sampling.loop import check_levels
from diffcore.sampling.mode_changes import find_mode_changes, forget_at_mode_change
from diffcore.schedules import Level

__all__ = ["CallPlan", "PipelineCall"]


@dataclass(frozen=True)
class CallPlan:
    """The states of a call on an empty batch, one for each evaluation of the network, in order.

    Args:
        process: process of the network.
        sampler: numerical integrator.
        all_knots: knots of a call that starts at the first evaluation.
        states: state before each evaluation.
        mode_changes: λ of the knots at which guidance changes its mode.
    """

    process: Process
    sampler: Sampler
    all_knots: Knots
    states: tuple[State, ...]
    mode_changes: frozenset[float] = frozenset()

    @classmethod
    def of(
        cls, process: Process, sampler: Sampler, knots: Knots, levels: Sequence[float] = ()
    ) -> "CallPlan":
        """The plan of a call over given knots.

        Args:
            process: process of the network.
            sampler: numerical integrator.
            knots: levels between which the sampler steps.
            levels: λ at which guidance changes its mode.

        Returns:
            The plan.

        Raises:
            ValueError: The network cannot be evaluated at a knot, or the sampler adds noise before
                its first evaluation.
        """
        check_levels(process, knots)
        plan = cls(
            process, sampler, knots, tuple(sampler.dry_run(knots)), find_mode_changes(knots, levels)
        )
        if plan.states[0].level != knots[0]:
            raise ValueError(
                f"{sampler} adds noise before its first evaluation, but a pipeline evaluates the "
                f"network before it calls the scheduler: set churn_max below σ/α = "
                f"{knots[0].ratio:.4g}, that of the first knot"
            )
        return plan

    def times(self) -> Tensor:
        """The time input of each evaluation, of shape (E,): int64 if all are indices of a table,
        else float32.
        """
        times = torch.tensor(
            [float(self.process.time(state.level)) for state in self.states], dtype=torch.float64
        )
        are_indices = self.process.time.variable == "index" and bool(
            ((times - times.round()).abs() < 1e-6).all()
        )
        return times.round().long() if are_indices else times.float()

    def sigmas(self) -> Tensor:
        """σ/α at each evaluation and at the last knot, (E + 1,), as diffusers keeps them; of a flow
        σ/(α+σ).
        """
        is_flow = self.process.time.variable == "blend"
        levels = [*(state.level for state in self.states), self.all_knots[-1]]
        return torch.tensor([float(knot.blend if is_flow else knot.ratio) for knot in levels])

    def starts_step(self, position: int) -> bool:
        """True if evaluation number `position` (from 0) is the first of its step."""
        return position == 0 or self.states[position].step != self.states[position - 1].step

    def knots(self, position: int) -> Knots:
        """The knots of a call that starts at evaluation number `position` (from 0).

        Returns:
            The level of this evaluation, and the knots after it.

        Raises:
            ValueError: A sampler that starts there would evaluate other levels than the plan, which
                the pipeline has already read.
        """
        if position == 0:
            return self.all_knots
        state = self.states[position]
        knots = (state.level, *state.remaining)
        if self._levels(position, knots) != [state.level for state in self.states[position:]]:
            raise ValueError(
                f"{self.sampler} cannot start at evaluation {position} of {len(self.states)}: from "
                "there it evaluates other levels than in the whole call; use another strength, or "
                "a sampler such as DDIM()"
            )
        return knots

    def _levels(self, position: int, knots: Knots) -> list[Level]:
        if self.starts_step(position):
            return list(self.sampler.evaluation_levels(knots))
        return [knots[0], *self.sampler.evaluation_levels(knots[1:])]


@dataclass
class PipelineCall:
    """The progress of one call of a pipeline.

    Args:
        plan: levels of its evaluations.
        timesteps: (E,) time input of each evaluation, on the device of the pipeline.
        host_timesteps: the time inputs as Python numbers.
        begin: index of the first evaluation; None before it is known.
        state: state of the sampler; None before the first step.
        finishes_step: True if the call started within a step and has not left it: a first-order
            step then goes to the next knot.
        guidance_state: state of attached guidance in this call; None without guidance.
    """

    plan: CallPlan
    timesteps: Tensor
    host_timesteps: list[float]
    begin: int | None = None
    state: State | None = None
    finishes_step: bool = False
    guidance_state: Any = None

    @classmethod
    def of(cls, plan: CallPlan, device: Any) -> "PipelineCall":
        """A call before its first evaluation.

        Args:
            plan: plan of the call.
            device: device of the time inputs.

        Returns:
            The call.
        """
        times = plan.times()
        return cls(plan, times.to(device), times.tolist())

    @cached_property
    def sigmas(self) -> Tensor:
        """(E + 1,) σ/α at each evaluation and after the last, on the CPU as in diffusers."""
        return self.plan.sigmas()

    @property
    def knots(self) -> Knots:
        """The knots from the start of the call."""
        return self.plan.knots(self.begin or 0)

    def state_at(self, t: Any) -> State:
        """The state of the sampler at the evaluation with time input `t`.

        Returns:
            The state. Before the first step it is that of the dry run, whose x is empty.
        """
        if self.state is not None:
            return self.state
        position = self._position(t)
        state = self.plan.states[position]
        return replace(state, step=0, memory=None) if position else state

    def start(self, t: Any, x: Tensor, noise: Noise) -> State:
        """Start an evaluation: the state of the sampler with the pipeline's x.

        Args:
            t: time input of the network.
            x: (B, *shape) samples, which the pipeline may have changed since the last step.
            noise: noise of the sampler.

        Returns:
            The state of this evaluation.

        Raises:
            ValueError: The call is over, or `t` is not one of its time inputs.
        """
        if self.guidance_state is not None:
            self.guidance_state.finish_evaluation(len(x))
        if self.state is not None:
            if self.state.done:
                raise ValueError(
                    f"the call of {len(self.host_timesteps)} evaluations is over: call "
                    "set_timesteps for another"
                )
            return replace(self.state, x=x)
        position = self._position(t)
        self.finishes_step, knots = not self.plan.starts_step(position), self.plan.knots(position)
        return (
            State(x, knots[0], knots[1:])
            if self.finishes_step
            else self.plan.sampler.start(x, knots, noise)
        )

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        """Advance the sampler.

        Args:
            state: state that `start` returned.
            prediction: prediction at this state.
            noise: noise of the sampler.

        Returns:
            The next state, which the call keeps.
        """
        sampler = self.plan.sampler
        if self.finishes_step:
            self.finishes_step, state = False, state.at_next_knot(prediction.at(state.remaining[0]))
            self.state = (
                state
                if state.done
                else sampler.start(state.x, (state.level, *state.remaining), noise)
            )
        else:
            self.state = forget_at_mode_change(
                sampler, sampler.advance(state, prediction, noise), self.plan.mode_changes
            )
        return self.state

    def _position(self, t: Any) -> int:
        """Index of the first evaluation: `begin` if it is set, else the one with time input `t`.

        Of several evaluations with this time input, it is the one at the start of a step.
        """
        if self.begin is not None:
            return self.begin
        number = float(t)
        matches = [
            i
            for i, time in enumerate(self.host_timesteps)
            if abs(time - number) <= 1e-6 * max(1.0, abs(time))
        ]
        if not matches:
            raise ValueError(
                f"timestep is {number:g}, expected one of those of set_timesteps: "
                f"{self.host_timesteps}"
            )
        self.begin = next((i for i in matches if self.plan.starts_step(i)), matches[0])
        return self.begin
