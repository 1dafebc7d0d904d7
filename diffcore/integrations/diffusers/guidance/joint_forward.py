"""The forward of a network whose pipeline evaluates both halves of guidance in one call.

The pipeline passes 2B samples: B with the condition and B with its negative. The wrapped network
evaluates those that the guidance rule needs, and returns the guided output F in both halves.

The halves are two labels of one network, 0 for the condition and 1, the null label, for its
negative. So rules and references are used as in the sampling loop of diffcore. Every argument with
2B entries is indexed with its samples: embeddings, ControlNet residuals, image embeddings of
IP-adapters, also inside lists and dictionaries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffcore.core.denoiser import extract_tensor
from diffcore.core.prediction import Prediction, predict, scale_input, target, unscale_input
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
from diffcore.integrations.diffusers.scheduler.call import PipelineCall
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.sampling.loop import check_guidance, current_step, evaluate_references
from diffcore.schedules import Level

__all__ = [
    "CallState",
    "GuidedForward",
    "PipelineDenoiser",
    "check_rule",
    "guided_output",
    "missing_negative",
    "same_first_order_step",
    "split_input",
]

INPUT_NAMES = ("sample", "hidden_states")
"""Names of x in the forward of diffusers' networks."""


@dataclass
class PipelineDenoiser:
    """A pipeline's call of its network (2B samples) as a denoiser of B samples.

    Label 0 is the condition, and label 1, the null label, its negative.

    Args:
        network: the network, whose layers a reference may alter.
        forward: the network's original forward.
        process: the process, of one class; of none if the pipeline passes no negative half.
        x: the pipeline's input, 2B samples, or B if the process has no class.
        args: the forward's other positional arguments.
        kwargs: the forward's other keyword arguments.
        conditional_first: whether the first B samples are those with the condition.
        output: the network's first output, which has the type that the pipeline expects.
    """

    network: nn.Module
    forward: Callable[..., Any]
    process: Process
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditional_first: bool
    output: Any = None

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's input."""
        return self.x.device

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return len(self.x) // (2 if self.process.classes else 1)

    def sample(self, level: Level) -> Tensor:
        """The noisy samples x (B, ...) in float32 or better.

        EDM's input scaling is undone, and channels that are no part of x, such as a mask and a
        masked image, are left out.
        """
        channels = getattr(getattr(self.network, "config", None), "out_channels", None)
        x = self.x[: self.batch_size, : channels if self.x.ndim > 3 else None]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return unscale_input(self.process.prediction, x, level, self.process.sigma_data)

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """Predictions for any number of these samples, under label 0 or 1."""
        process = self.process
        indices = self._indices(condition, len(x), x.device)
        args, kwargs = self._arguments(indices)
        scaled = scale_input(process.prediction, x, level, process.sigma_data)
        full = torch.cat([scaled.to(self.x.dtype), self.x[indices, x.shape[1] :]], 1)
        output = self.forward(full, *args, **kwargs)
        self.output = output if self.output is None else self.output
        mean = extract_tensor(output)[:, : x.shape[1]].to(x.dtype)
        return predict(process.prediction, mean, x, level, process.sigma_data)

    def pipeline_output(self, guided: Tensor) -> Any:
        """The guided output in the form that the pipeline expects.

        Args:
            guided: guided output of the network (B, ...).

        Returns:
            An object of the type of the network's output, with the guided output in both halves,
            in its dtype, and with its variance channels.
        """
        output = extract_tensor(self.output)
        variance = output[: self.batch_size, guided.shape[1] :]
        full = torch.cat([guided.to(output.dtype), variance], 1)
        full = torch.cat([full] * (len(self.x) // self.batch_size))
        return (full,) if isinstance(self.output, tuple) else type(self.output)(sample=full)

    def _indices(self, condition: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Indices into the pipeline's 2B samples, of `count` samples under their labels."""
        within_half = torch.arange(count, device=device) % self.batch_size
        if condition is None:
            return within_half
        half = condition if self.conditional_first else 1 - condition
        return within_half + half.to(device) * self.batch_size

    def _arguments(self, indices: Tensor) -> Any:
        """The forward's other arguments for these samples."""
        total = len(self.x)
        return tree_map(
            lambda a: a[indices] if isinstance(a, Tensor) and a.ndim and len(a) == total else a,
            (self.args, self.kwargs),
        )


@dataclass
class CallState:
    """State of guidance during one call of a pipeline.

    Args:
        process: the process, of one class if both halves are present, else of none.
        guidance_argument: argument of the pipeline's call that makes it prepare the negative half.
        memory: the rule's memory.
        step: the step that holds the latest evaluation.
        evaluation: what the pipeline's first network call of this evaluation left; None before it.
        waiting_rule: the rule whose negative half is still to come, or None.
        expected_batch: number of samples that the scheduler must step, if two equal halves of x
            were taken for the halves of guidance; None: not checked.
    """

    process: Process
    guidance_argument: str
    memory: Any = None
    step: Step | None = None
    evaluation: Any = None
    waiting_rule: Guidance | None = None
    expected_batch: int | None = None

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
            raise ValueError(missing_negative(self.waiting_rule, self.guidance_argument))
        self.evaluation = None


class GuidedForward:
    """A network's forward with a guidance rule, for pipelines that pass both halves in one call.

    Args:
        network: the network.
        forward: the network's original forward.
        scheduler: the pipeline's DiffcoreScheduler, which knows the noise level.
        guidance: the rule.
        family: the record of the pipeline's family.
        has_negative_half: function -> whether the pipeline passes both halves in this call; None
            if the pipeline does not expose it.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[..., Any],
        scheduler: DiffcoreScheduler,
        guidance: Guidance,
        family: ModelFamily,
        has_negative_half: Callable[[], bool | None],
    ) -> None:
        self.network = network
        self.forward = forward
        self.scheduler = scheduler
        self.guidance = guidance
        self.family = family
        self.has_negative_half = has_negative_half

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The guided output, in the form of the network's own."""
        x, args, kwargs = split_input(args, kwargs)
        call = self.scheduler.call
        sampler_state = call.state_at(self._timestep(args, kwargs))
        if call.guidance_state is None:
            call.guidance_state = self._begin(call, x, kwargs.get("class_labels"))
        state: CallState = call.guidance_state
        conditional_first = self.family.guidance_batching == "condition first"
        denoiser = PipelineDenoiser(
            self.network, self.forward, state.process, x, args, kwargs, conditional_first
        )
        if state.evaluation is None:
            state.step = current_step(state.process, call.knots, sampler_state, state.step)
        rule = self.guidance if call.plan.sampler.uses_guidance(sampler_state) else CFG(1.0)
        return self._evaluate(rule, denoiser, state)

    def _evaluate(self, rule: Guidance, denoiser: PipelineDenoiser, state: CallState) -> Any:
        """The output for the pipeline."""
        if state.evaluation:
            raise ValueError(
                "the pipeline calls its network twice at one noise level: leave out the option "
                "that makes it, such as skip_guidance_layers"
            )
        assert state.step is not None
        state.evaluation, step = True, state.step
        x = denoiser.sample(step.level)
        condition = (
            torch.zeros(len(x), dtype=torch.int64, device=x.device)
            if state.process.classes
            else None
        )
        given = evaluate_references(denoiser, rule, x, condition, state.memory, step)
        return denoiser.pipeline_output(guided_output(rule, given, state))

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
        steps = (current_step(call.plan.process, call.knots, state) for state in call.plan.states)
        if not has_both and any(
            isinstance(reference, Unconditional)
            for step in steps
            for reference in self.guidance.required_references(step, None)
        ):
            raise ValueError(missing_negative(self.guidance, self.family.guidance_argument))
        is_guessed = has_both and labels is None and self.has_negative_half() is None
        return CallState(
            self._checked_process(call, has_both),
            self.family.guidance_argument,
            expected_batch=len(x) // 2 if is_guessed else None,
        )

    def _checked_process(self, call: PipelineCall, has_both: bool) -> Process:
        """The call's process; with both halves it has one class, and a null label."""
        process = call.plan.process
        process = replace(process, classes=1, dropout=0.1) if has_both else process
        condition = torch.zeros(1, dtype=torch.int64) if has_both else None
        check_guidance(process, call.knots, condition, self.guidance, call.plan.sampler)
        return process

    def _has_both_halves(self, x: Tensor, labels: Tensor | None) -> bool:
        """Whether x holds each sample twice.

        If the pipeline does not expose it, the two halves of x, and their labels, are compared:
        once in a call, since the comparison waits for the device.
        """
        exposed = self.has_negative_half()
        if exposed is not None:
            return exposed
        null = self.family.null_label
        if labels is not None and null is not None and bool(labels[len(x) // 2 :].ne(null).any()):
            return False
        first, *second = x.chunk(2)
        return bool(second) and len(x) % 2 == 0 and torch.equal(first, second[0])


def missing_negative(rule: Guidance, guidance_argument: str) -> str:
    """The error message for a pipeline that passes no negative half.

    Args:
        rule: the rule that needs it.
        guidance_argument: argument of the pipeline's call that makes it prepare the negative half.

    Returns:
        One line, with the remedy.
    """
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
    pair = prediction if rule.is_consistent else same_first_order_step(prediction, given.x, step)
    return target(step.process.prediction, *pair, step.level, step.process.sigma_data)


def same_first_order_step(prediction: Prediction, x: Tensor, step: Step) -> Prediction:
    """The pair (x_0, ε) with x = α x_0 + σ ε whose first-order step ends where this one's ends.

    Args:
        prediction: a pair with x ≠ α x_0 + σ ε (CFG++), of tensors (B, ...).
        x: noisy samples (B, ...).
        step: the step; it gives the levels at its beginning and end.

    Returns:
        The pair that solves α x_0 + σ ε = x and α' x_0 + σ' ε = y, with y the result of the step.
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


def split_input(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """x among the arguments of a network's forward, and the other arguments.

    Args:
        args: positional arguments; x is the first, if there are any.
        kwargs: keyword arguments; else x is `sample` or `hidden_states`.

    Returns:
        x, the other positional arguments, the other keyword arguments.
    """
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in INPUT_NAMES if name in kwargs)
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
