"""The forward of a network whose pipeline evaluates both halves of guidance in one call.

The pipeline passes 2B samples: B with the condition and B with its negative. The wrapped network
evaluates those that the guidance rule needs, and returns the guided output F in both halves.
If a callback switches the pipeline's guidance off in mid-call, the pipeline passes B samples from
there on, and the network is evaluated for the condition alone, as without attached guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffcore.caches import Cache
from diffcore.caches.cached_network import CachedNetwork
from diffcore.caches.integration import Integration, integration
from diffcore.core.network import network_config
from diffcore.core.prediction import Prediction, target
from diffcore.core.process import Process
from diffcore.guidance import (
    CFG,
    GFCG,
    ClassifierGuidance,
    Guidance,
    GuidanceInput,
    Step,
    Unconditional,
)
from diffcore.integrations.diffusers.families import ModelFamily
from diffcore.integrations.diffusers.guidance.pipeline_denoiser import PipelineDenoiser, split_input
from diffcore.integrations.diffusers.scheduler.call import CallPlan, PipelineCall
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.samplers import Knots
from diffcore.sampling.loop import check_guidance, current_step, evaluate_references

__all__ = ["CallState", "GuidedForward", "check_rule", "guided_output"]


@dataclass
class CallState:
    """State of guidance during one call of a pipeline.

    Args:
        process: the process without classes.
        knots: levels between which the sampler steps, from the start of the call.
        has_both: whether the call began with both halves.
        count: number of rows of x at the first evaluation.
        guidance_argument: argument of the pipeline's call that makes it prepare the negative half.
        memory: the rule's memory.
        step: the step that holds the latest evaluation.
        evaluation: what the pipeline's first network call of this evaluation left; None before it.
        waiting_rule: the rule whose negative half is still to come, or None.
        expected_batch: number of samples that the scheduler must step, if two equal halves of x
            were taken for the halves of guidance; None: not checked.
    """

    process: Process
    knots: Knots
    has_both: bool
    count: int
    guidance_argument: str
    memory: Any = None
    step: Step | None = None
    evaluation: Any = None
    waiting_rule: Guidance | None = None
    expected_batch: int | None = None

    @cached_property
    def process_of_halves(self) -> Process:
        """The process of an evaluation with both halves, which is looked up once in a call."""
        return _process_of_halves(self.process)

    def finish_evaluation(self, count: int) -> None:
        """End the evaluation, as the scheduler makes its step.

        Args:
            count: number of samples that the scheduler steps.

        Raises:
            ValueError: the negative half is missing, or the two halves were no halves of guidance.
        """
        if self.expected_batch not in (None, count):
            raise ValueError(
                f"the {count} samples begin with equal noise in both halves, so they were taken "
                f"for the two halves of guidance: call the pipeline with {self.guidance_argument} "
                f"above 1, or pass a different seed for each sample"
            )
        if self.waiting_rule is not None:
            raise ValueError(_missing_negative(self.waiting_rule, self.guidance_argument))
        self.evaluation = None


class _AcceptedCall(NamedTuple):
    """A kind of call that the rule can guide, which is then not checked again.

    Args:
        plan: plan of the call; equal calls share it.
        begin: index of the first evaluation.
        has_both: whether the call begins with both halves.
        knots: levels between which the sampler steps, from the start of the call.
    """

    plan: CallPlan
    begin: int
    has_both: bool
    knots: Knots

    def holds(self, plan: CallPlan, begin: int, has_both: bool) -> bool:
        """Whether a call is of this kind."""
        return self.plan is plan and (self.begin, self.has_both) == (begin, has_both)


class GuidedForward:
    """A network's forward with a guidance rule, for pipelines that pass both halves in one call.

    Args:
        network: the network.
        forward: the network's original forward.
        scheduler: the pipeline's DiffcoreScheduler, which knows the noise level.
        guidance: the rule.
        family: the record of the pipeline's family.
        pipeline: the pipeline, whose options of the call in progress are read.
        detach: function that restores the network's forward and the pipeline's scheduler.
        cache: rule by which features of the network are reused in a call; None: none.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[..., Any],
        scheduler: DiffcoreScheduler,
        guidance: Guidance,
        family: ModelFamily,
        pipeline: Any,
        detach: Callable[[], None],
        cache: Cache | None = None,
    ) -> None:
        self.network = network
        self.forward = forward
        self.scheduler = scheduler
        self.guidance = guidance
        self.family = family
        self.pipeline = pipeline
        self.detach = detach
        self._accepted: _AcceptedCall | None = None
        self.channels: int | None = network_config(network).get("out_channels")
        self.cached = None if cache is None else CachedNetwork(network, cache)
        self._integration = Integration()

    def close(self) -> None:
        """Release what the cache holds for the last call."""
        self._integration.resources.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The guided output, in the form of the network's own."""
        x, args, kwargs = split_input(args, kwargs)
        call = self.scheduler.call
        sampler_state = call.state or call.state_at(self._timestep(args, kwargs))
        if call.guidance_state is None:
            call.guidance_state = self._begin(call, x, kwargs.get("class_labels"))
            self._open_integration(call)
        state: CallState = call.guidance_state
        has_both = self._still_has_both_halves(state, len(x))
        process = state.process_of_halves if has_both else state.process
        conditional_first = self.family.guidance_batching == "condition first"
        denoiser = PipelineDenoiser(
            self.network,
            self.forward,
            process,
            x,
            args,
            kwargs,
            conditional_first,
            self.channels,
            self.cached,
        )
        if state.evaluation is None or state.step is None:
            sampler = call.plan.sampler
            state.step = current_step(process, sampler, state.knots, sampler_state, state.step)
        is_guided = call.plan.sampler.uses_guidance(sampler_state)
        is_guided = is_guided and has_both == state.has_both  # else a callback has switched it off
        rule = self.guidance if is_guided else CFG(1.0)
        with integration(self._integration):
            return self._evaluate(rule, denoiser, state.step, state)

    def _evaluate(
        self, rule: Guidance, denoiser: PipelineDenoiser, step: Step, state: CallState
    ) -> Any:
        """The output for the pipeline."""
        if state.evaluation:
            raise ValueError(
                "the pipeline calls its network twice at one noise level: leave out the option "
                "that makes it, such as skip_guidance_layers"
            )
        state.evaluation = True
        x = denoiser.sample(step.level)
        condition = (
            torch.zeros(len(x), dtype=torch.int64, device=x.device)
            if denoiser.process.classes
            else None
        )
        given = evaluate_references(denoiser, rule, x, condition, state.memory, step)
        return denoiser.pipeline_output(guided_output(rule, given, state))

    def _open_integration(self, call: PipelineCall) -> None:
        """Open an integration for a call, in which a cache keeps nothing of the last one."""
        self.close()
        states = call.plan.states[call.begin or 0 :]
        self._integration = Integration(lambda: [state.level for state in states])

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The scheduler's timestep, from the network's time input."""
        t = args[0] if args else kwargs["timestep"]
        t = t.flatten()[0] if isinstance(t, Tensor) else t
        return t / self.family.time_scale(self.network)

    def _begin(self, call: PipelineCall, x: Tensor, labels: Tensor | None) -> CallState:
        """The state before the first evaluation of a call.

        Raises:
            ValueError: the rule cannot guide this call.
        """
        has_both = self._has_both_halves(x, labels)
        if has_both:
            self._check_options()
        accepted, begin = self._accepted, call.begin or 0
        if accepted is None or not accepted.holds(call.plan, begin, has_both):
            knots = call.knots
            self._check_guidance(call, knots, has_both)
            accepted = self._accepted = _AcceptedCall(call.plan, begin, has_both, knots)
        is_guessed = has_both and labels is None and self._exposed_half() is None
        return CallState(
            call.plan.process,
            accepted.knots,
            has_both,
            len(x),
            self.family.guidance_argument,
            expected_batch=len(x) // 2 if is_guessed else None,
        )

    def _check_guidance(self, call: PipelineCall, knots: Knots, has_both: bool) -> None:
        plan, process = call.plan, call.plan.process
        steps = (current_step(process, plan.sampler, knots, state) for state in plan.states)
        if not has_both and any(
            isinstance(reference, Unconditional)
            for step in steps
            for reference in self.guidance.required_references(step, None)
        ):
            raise ValueError(_missing_negative(self.guidance, self.family.guidance_argument))
        process = _process_of_halves(process) if has_both else process
        condition = torch.zeros(1, dtype=torch.int64) if has_both else None
        check_guidance(process, knots, condition, self.guidance, call.plan.sampler)

    def _check_options(self) -> None:
        """Raise ValueError if an option of the call would have no effect on equal halves."""
        if phi := getattr(self.pipeline, "_guidance_rescale", 0.0):
            raise ValueError(
                f"guidance_rescale is {phi:g}, which has no effect on attached guidance: leave it "
                f"out, and attach Rescale({self.guidance}, phi={phi:g})"
            )

    def _exposed_half(self) -> bool | None:
        """Whether the pipeline passes both halves at this moment; None if it does not expose it."""
        return getattr(self.pipeline, "do_classifier_free_guidance", None)

    def _still_has_both_halves(self, state: CallState, count: int) -> bool:
        """Whether x, of `count` rows, holds each sample twice; a callback may have changed it."""
        if count == state.count:
            return state.has_both
        exposed = self._exposed_half()
        return not state.has_both if exposed is None else exposed

    def _has_both_halves(self, x: Tensor, labels: Tensor | None) -> bool:
        """Whether x holds each sample twice.

        If the pipeline does not expose it, the two halves of x, and their labels, are compared:
        once in a call, since the comparison waits for the device.
        """
        exposed = self._exposed_half()
        if exposed is not None:
            return exposed
        null = self.family.null_label
        if labels is not None and null is not None and bool(labels[len(x) // 2 :].ne(null).any()):
            return False
        return len(x) % 2 == 0 and torch.equal(*x.chunk(2))


@lru_cache(8)
def _process_of_halves(process: Process) -> Process:
    """The process of a call with both halves: one class, and a null label."""
    return replace(process, classes=1, dropout=0.1)


def _missing_negative(rule: Guidance, guidance_argument: str) -> str:
    """The error message for a pipeline that passes no negative half."""
    return (
        f"{rule} needs the negative half, which the pipeline leaves out: call it with "
        f"{guidance_argument} above 1, whose value is not used, and with a negative prompt if it "
        f"has none by default; or attach CFG(1.0)"
    )


def guided_output(rule: Guidance, given: GuidanceInput, state: CallState) -> Tensor:
    """The output F of the network that corresponds to the guided prediction.

    Args:
        rule: the rule.
        given: the predictions that it combines, of B samples.
        state: state of the call, whose memory of the rule is updated.

    Returns:
        F (B, ...), in the network's prediction type.
    """
    prediction, state.memory = rule.combine(given, state.memory)
    step = given.step
    if not rule.is_consistent:
        prediction = _same_first_order_step(prediction, given.x, step)
    return target(step.process.prediction, *prediction.pair, step.level, step.process.sigma_data)


def _same_first_order_step(prediction: Prediction, x: Tensor, step: Step) -> Prediction:
    """The pair (x_0, ε) with x = α x_0 + σ ε whose first-order step ends where this one's ends.

    It solves α x_0 + σ ε = x and α' x_0 + σ' ε = y, with y the result of the step from a pair with
    x ≠ α x_0 + σ ε (CFG++).
    """
    t, s = step.level, step.end
    y, det = prediction.at(s), t.alpha * s.sigma - t.sigma * s.alpha
    return Prediction((s.sigma * x - t.sigma * y) / det, (t.alpha * y - s.alpha * x) / det)


def check_rule(rule: Guidance) -> None:
    """Raise ValueError if a rule reads class labels, which a pipeline's condition is not."""
    if any(isinstance(part, (ClassifierGuidance, GFCG)) for part in rule.parts()):
        raise ValueError(
            f"{rule} reads class labels, which a pipeline's condition is not: use CFG, APG or "
            f"Interval"
        )
