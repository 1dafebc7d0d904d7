"""Guidance rules of diffcore as a guider of Modular Diffusers.

A guider receives the timestep, prepares a batch for each network output that it needs, and combines
the outputs. It receives neither x nor the scheduler: a hook on the network reads x of the
conditional batch, and λ follows from the timestep and the process. So rules act on exact x_0 and ε
with every scheduler.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from diffcore.core.prediction import (
    Prediction,
    at_least_float32,
    predict,
    target,
    unscale_input,
)
from diffcore.core.process import Process
from diffcore.guidance import (
    AlteredNetwork,
    Guidance,
    GuidanceInput,
    Reference,
    Step,
    Unconditional,
)
from diffcore.integrations.diffusers.guidance.joint_forward import check_rule
from diffcore.integrations.diffusers.guidance.pipeline_denoiser import split_input
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import read_scheduler_config
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import DDIM
from diffcore.schedules import Level, Trailing

__all__ = ["DiffcoreGuider", "Evaluation", "GuiderSettings"]


@dataclass(frozen=True)
class GuiderSettings:
    """The content of a guider's config.

    Args:
        rule: the guidance rule.
        process: process of the network.

    Raises:
        ValueError: the rule depends on what a guider does not receive.
    """

    rule: Guidance
    process: Process

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not self.rule.is_consistent or self.rule.requires_one_evaluation_per_step:
            raise ValueError(
                f"{self.rule} depends on the sampler's steps, which a guider does not receive: use "
                f"CFG, APG or Interval, or `attach` in a pipeline with CFG of its own"
            )
        for level in map(self.process.schedule.level, (0.9, 0.5, 0.1)):
            self.references(Step(self.process, level, level, level, index=1), None)

    def references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        """The references that the rule needs.

        Args:
            step: the step of the evaluation.
            memory: the rule's memory.

        Returns:
            Unconditional, or altered layers, in the rule's order.

        Raises:
            ValueError: a pipeline has no such reference.
        """
        references = self.rule.required_references(step, memory)
        for reference in references:
            if not isinstance(reference, (Unconditional, AlteredNetwork)):
                raise ValueError(
                    f"{self.rule} needs {reference}, and a pipeline has only its negative prompt "
                    f"and altered layers: use Unconditional() or PerturbedAttention(), or the "
                    f"sampling loop of diffcore (`sample`)"
                )
        return references


@dataclass
class Evaluation:
    """State of the evaluation that is in progress.

    Args:
        step: step from the level to itself, as a guider does not receive the next level.
        references: references that the rule needs.
        x: input of the network in the conditional batch; None before it.
        changes: hooks and altered layers of the network, which are undone after its next forward.
    """

    step: Step
    references: tuple[Reference, ...]
    x: Tensor | None = None
    changes: ExitStack = field(default_factory=ExitStack)

    def begin_batch(self, network: nn.Module, index: int) -> None:
        """Prepare the network for a batch: a hook that reads x, or the reference's altered layers.

        All is undone after the forward, also if it fails, when no pipeline cleans up.

        Args:
            network: the network.
            index: number of the batch; 0 is the conditional one.
        """
        if index == 0:
            hook = network.register_forward_pre_hook(self._read, with_kwargs=True)
            self.changes.callback(hook.remove)
        elif isinstance(altered := self.references[index - 1], AlteredNetwork):
            self.changes.enter_context(altered.apply(network))
        done = network.register_forward_hook(lambda *_: self.changes.close(), always_call=True)
        self.changes.callback(done.remove)

    def _read(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = split_input(args, kwargs)[0]


class DiffcoreGuider(BaseGuidance):
    """A guidance rule of diffcore with the interface of diffusers' guiders.

        pipe.update_components(guider=DiffcoreGuider.of(APG(4.0), pipe.scheduler))

    It works with every scheduler, of diffcore or diffusers. If the rule needs no reference, one
    batch runs. It is saved as JSON with its pipeline, and loaded without remote code if diffcore is
    installed. As other guiders, it serves one call at a time; each evaluation reads one number from
    the device.

    It receives the noise level and not the step. So `Interval` decides by the evaluated level,
    which is the step's level for samplers with one evaluation in each step; its bounds are knots
    only if the scheduler is given them: `levels=guider.levels`.

    Args:
        rule: the rule, or its spec. Its references are `Unconditional`, the pipeline's negative
            prompt, and altered layers (`PerturbedAttention`, `SkippedLayers`).
        process: process of the network (schedule, prediction type, time conditioning), or its spec.

    Raises:
        ValueError: the rule needs what a guider does not receive; the message has the remedy.
    """

    # BaseGuidance demands a list.
    _input_predictions = ["pred_cond"]  # type: ignore[assignment]  # noqa: RUF012
    # A modular pipeline saves a component only if it takes it for one loaded from a subfolder.
    _diffusers_load_id = "null|guider|null|null"

    def __init__(
        self, rule: Guidance | Mapping[str, Any], process: Process | Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.settings = from_spec(GuiderSettings, {"rule": rule, "process": process})
        self.register_to_config(**to_spec(self.settings))  # type: ignore[no-untyped-call]
        self._memory: Any = None
        self._evaluation: Evaluation | None = None

    @classmethod
    def of(cls, rule: Guidance, scheduler: Any) -> Self:
        """A guider for the network of a scheduler.

        Args:
            rule: the rule.
            scheduler: scheduler of diffcore or diffusers, or its config.

        Returns:
            The guider, with the process that the scheduler describes.
        """
        # Only the process is read: a scheduler whose levels cannot be expressed is accepted.
        unused: dict[str, Any] = {"sampler": DDIM(), "grid": Trailing(), "last": None, "clip": None}
        config = read_scheduler_config(scheduler)
        return cls(rule, DiffcoreScheduler.from_config(config, **unused).settings.process)

    @property
    def levels(self) -> tuple[float, ...]:
        """λ at which the rule switches on or off, for `DiffcoreScheduler(levels=...)`."""
        return self.settings.rule.levels(self.settings.process)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin an evaluation; one whose step does not follow the latest begins another call.

        Args:
            step: number of the evaluation in the pipeline's loop.
            num_inference_steps: number of evaluations in the loop.
            timestep: the scheduler's timestep, a number or a tensor of one.
        """
        latest = self.get_state()
        if latest["step"] is None or step <= latest["step"]:
            self._memory = None
        super().set_state(step, num_inference_steps, timestep)
        process = self.settings.process
        level = self._level(float(timestep))
        process.check_level(level, f"timestep {float(timestep):g}")
        here = Step(process, level, level, level, step, num_inference_steps)
        references = self.settings.references(here, self._memory) if latest["enabled"] else ()
        self._evaluation = Evaluation(here, references)

    def _level(self, timestep: float) -> Level:
        """The level of a timestep: exactly a bound of the rule if it is that bound's in float32."""
        schedule, time = self.settings.process.schedule, self.settings.process.time
        for bound in map(schedule.at, self.levels):
            if np.float32(time(bound)) == timestep:
                return bound
        return time.level(schedule, timestep)

    @property
    def num_conditions(self) -> int:
        """Number of batches in this evaluation.

        Between evaluations it is 2 if the guider is enabled, so that a pipeline encodes its
        negative prompt.
        """
        if self._evaluation is None:
            return 1 + int(self._enabled)  # get_state would call this property
        return 1 + len(self._evaluation.references)

    @property
    def is_conditional(self) -> bool:
        """Whether the batch in progress has the condition."""
        return self._halves()[max(self.get_state()["count_prepared"] - 1, 0)] == 0

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The batches of an evaluation.

        Args:
            data: argument of the network -> (conditional, negative) pair.

        Returns:
            A batch for the condition, and one for each reference.

        Raises:
            ValueError: the rule needs the negative half, and the pipeline has none.
        """
        if any(
            isinstance(pair, tuple) and pair[0] is not None and pair[1] is None
            for pair in data.values()
        ):
            self._check_negative()
        return [self._prepare_batch(data, *named) for named in self._named_halves()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The batches of an evaluation, from a block's state.

        Args:
            data: state that holds the values.
            input_fields: argument of the network -> names of the (conditional, negative) values.

        Returns:
            A batch for the condition, and one for each reference.

        Raises:
            ValueError: the rule needs the negative half, and the pipeline has none.
        """
        pairs = {name: value for name, value in input_fields.items() if isinstance(value, tuple)}
        if any(
            getattr(data, a, None) is not None and getattr(data, b, None) is None
            for a, b in pairs.values()
        ):
            self._check_negative()
        return [
            self._prepare_batch_from_block_state(input_fields, data, *named)
            for named in self._named_halves()
        ]

    def _halves(self) -> tuple[int, ...]:
        """The half of each batch: 0 for the condition, 1 for the negative prompt."""
        references = () if self._evaluation is None else self._evaluation.references
        return (0, *(int(isinstance(reference, Unconditional)) for reference in references))

    def _named_halves(self) -> Iterator[tuple[int, str]]:
        """Half and name of each batch."""
        for index, half in enumerate(self._halves()):
            yield half, f"reference_{index}" if index else "pred_cond"

    def _check_negative(self) -> None:
        if 1 in self._halves():
            raise ValueError(
                f"{self.settings.rule} needs the negative half, which the pipeline leaves out: "
                f"pass negative_prompt"
            )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Prepare the network for the next batch."""
        if self._evaluation is not None:
            self._evaluation.begin_batch(denoiser, self.get_state()["count_prepared"])
        super().prepare_models(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Restore the network after a batch."""
        if self._evaluation is not None:
            self._evaluation.changes.close()

    def forward(self, pred_cond: Tensor, **references: Tensor) -> GuiderOutput:
        """The guided output of the network.

        Args:
            pred_cond: output for the condition (B, ...).
            references: output for each reference, in the rule's order.

        Returns:
            The guided output, the conditional one, and the first reference's.
        """
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is None or evaluation.x is None:
            raise ValueError(
                "the guider has not seen the network's input: a pipeline calls set_state and "
                "prepare_models before the network"
            )
        guided = self._guided(evaluation, evaluation.x, [pred_cond, *references.values()])
        variance = pred_cond[:, guided.shape[1] :]
        return GuiderOutput(
            pred=torch.cat([guided.to(pred_cond.dtype), variance], 1),
            pred_cond=pred_cond,
            pred_uncond=next(iter(references.values()), None),
        )

    def _guided(self, evaluation: Evaluation, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The output of the network that corresponds to the guided prediction."""
        process, level = self.settings.process, evaluation.step.level
        kind, sigma_data = process.prediction, process.sigma_data
        channels = min(x.shape[1], outputs[0].shape[1])
        x = unscale_input(kind, at_least_float32(x[:, :channels]), level, sigma_data)
        predictions: list[Prediction] = [
            predict(kind, o[:, :channels].to(x.dtype), x, level, sigma_data) for o in outputs
        ]
        given = GuidanceInput(x, evaluation.step, predictions[0], tuple(predictions[1:]))
        if self.get_state()["enabled"]:
            prediction, self._memory = self.settings.rule.combine(given, self._memory)
        else:
            prediction, self._memory = predictions[0], None
        return target(kind, *prediction.pair, level, sigma_data)
