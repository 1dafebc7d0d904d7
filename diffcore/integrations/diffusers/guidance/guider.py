"""Our guidance as a guider of Modular Diffusers.

A guider is told the timestep, makes a batch for each answer that it wants, and combines them. It never sees x: a hook on the
network reads it, at the conditional batch alone. λ follows from the timestep and the process, so that rules act on exact x_0
and ε, whatever the scheduler is.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from diffcore.core.prediction import Prediction, edm_norm, predict, target
from diffcore.core.process import Process
from diffcore.guidance import Altered, Guidance, GuidanceInput, Reference, Step, Unconditional
from diffcore.integrations.diffusers.guidance.joint_forward import asked_about, check_rule
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import config_of
from diffcore.io.specs import from_spec, to_spec
from diffcore.schedules import Level


@dataclass(frozen=True)
class Known:
    """What a guider's config holds.

    Args:
        rule: the rule.
        process: of the network.
    """

    rule: Guidance
    process: Process

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not self.rule.consistent or self.rule.once_a_step:
            raise ValueError(
                f"{self.rule} depends on the sampler's steps, which a guider is not told: use CFG, APG or Interval, or "
                f"`attach` in a pipeline with CFG of its own"
            )
        for level in map(self.process.schedule.level, (0.9, 0.5, 0.1)):
            self.asked(Step(self.process, level, level, level, index=1), None)

    def asked(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        """The references at this step.

        Raises:
            ValueError: a pipeline has no such reference.
        """
        references = self.rule.required_references(step, memory)
        for reference in references:
            if not isinstance(reference, (Unconditional, Altered)):
                raise ValueError(
                    f"{self.rule} asks for {reference}, and a pipeline has its negative prompt and altered layers alone: use "
                    f"Unconditional() or PerturbedAttention(), or our own loop (`sample`)"
                )
        return references


@dataclass
class Evaluation:
    """What is known of the evaluation under way.

    Args:
        step: from the level to itself, for the next one is not told.
        references: that the rule asks for.
        x: what the network was asked about, once it was.
        changes: to the network, until the batch is over.
    """

    step: Step
    references: tuple[Reference, ...]
    x: Tensor | None = None
    changes: ExitStack = field(default_factory=ExitStack)

    def begin(self, network: nn.Module, batch: int) -> None:
        """Read x at the first batch, alter layers for a reference that has some altered."""
        if batch == 0:
            hook = network.register_forward_pre_hook(self._read, with_kwargs=True)
            self.changes.callback(hook.remove)
        elif isinstance(altered := self.references[batch - 1], Altered):
            self.changes.enter_context(altered.applied(network))

    def _read(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = asked_about(args, kwargs)[0]


class DiffcoreGuider(BaseGuidance):
    """A rule of ours behind the interface of diffusers' guiders.

        pipe.update_components(guider=DiffcoreGuider.of(APG(4.0), pipe.scheduler))

    Works beside any scheduler, ours or diffusers'. Where the rule needs no reference, one batch runs. Saved as JSON with its
    pipeline, and loaded without remote code where diffcore is installed. As other guiders, it serves one call at a time; an
    evaluation reads one number from the device.

    It is told the level and not the step. So Interval decides by the level that is asked about, which is the step's where a
    sampler asks once a step, and its bounds are knots only if the scheduler was given them: `levels=guider.levels`.

    Args:
        rule: the rule, or its spec; its references are Unconditional, the pipeline's negative prompt, and altered layers.
        process: of the network: schedule, prediction type, how it is told the level; or its spec.

    Raises:
        ValueError: the rule needs what a guider does not see; the message has the remedy.
    """

    _input_predictions = ["pred_cond"]  # type: ignore[assignment]  # noqa: RUF012  # a list, as the base class demands
    _diffusers_load_id = "null|guider|null|null"  # a modular pipeline saves what it takes for loaded from a subfolder

    def __init__(
        self, rule: Guidance | Mapping[str, Any], process: Process | Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.known = from_spec(Known, {"rule": to_spec(rule), "process": to_spec(process)})
        self.register_to_config(**to_spec(self.known))  # type: ignore[no-untyped-call]
        self._memory: Any = None
        self._now: Evaluation | None = None

    @classmethod
    def of(cls, rule: Guidance, scheduler: Any) -> Self:
        """With the process of a scheduler, ours or diffusers', or of its config."""
        return cls(rule, DiffcoreScheduler.from_config(config_of(scheduler)).settings.process)

    @property
    def levels(self) -> tuple[float, ...]:
        """λ at which the rule changes its mode."""
        return self.known.rule.levels(self.known.process)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """An evaluation begins; one that does not follow the last begins another run."""
        if self._step is None or step <= self._step:
            self._memory = None
        super().set_state(step, num_inference_steps, timestep)
        process = self.known.process
        level = self._level(float(timestep))
        process.check_level(level, f"timestep {float(timestep):g}")
        where = Step(process, level, level, level, step, num_inference_steps)
        self._now = Evaluation(
            where, self.known.asked(where, self._memory) if self._enabled else ()
        )

    def _level(self, told: float) -> Level:
        """What the network is told means: a level of the rule's where it is that one's number, rounded to float32."""
        schedule, time = self.known.process.schedule, self.known.process.time
        for bound in map(schedule.at, self.levels):
            if np.float32(time(bound)) == told:
                return bound
        return time.level(schedule, told)

    @property
    def num_conditions(self) -> int:
        """Batches of the evaluation; outside of one 2, so that a pipeline encodes its negative prompt."""
        return 1 + (int(self._enabled) if self._now is None else len(self._now.references))

    @property
    def is_conditional(self) -> bool:
        """Whether the batch under way has the condition."""
        return self._halves()[max(self._count_prepared - 1, 0)] == 0

    def prepare_inputs(self, data: Any) -> list[Any]:
        """A batch for the condition and one for each reference, of pairs (conditional, negative)."""
        if any(
            isinstance(pair, tuple) and pair[0] is not None and pair[1] is None
            for pair in data.values()
        ):
            self._check_negative()
        return [self._prepare_batch(data, *named) for named in self._named()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, of a state's fields."""
        pairs = {name: value for name, value in input_fields.items() if isinstance(value, tuple)}
        if any(
            getattr(data, a, None) is not None and getattr(data, b, None) is None
            for a, b in pairs.values()
        ):
            self._check_negative()
        return [
            self._prepare_batch_from_block_state(input_fields, data, *named)
            for named in self._named()
        ]

    def _halves(self) -> tuple[int, ...]:
        """Of each batch: 0 has the condition, 1 the negative prompt."""
        references = () if self._now is None else self._now.references
        return (0, *(int(isinstance(reference, Unconditional)) for reference in references))

    def _named(self) -> Iterator[tuple[int, str]]:
        """Half and name of each batch."""
        for place, half in enumerate(self._halves()):
            yield half, f"reference_{place}" if place else "pred_cond"

    def _check_negative(self) -> None:
        if 1 in self._halves():
            raise ValueError(
                f"{self.known.rule} needs the negative half, which the pipeline leaves out: pass negative_prompt"
            )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """A batch begins."""
        if self._now is not None:
            self._now.begin(denoiser, self._count_prepared)
        super().prepare_models(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """A batch is over: the network as it was."""
        if self._now is not None:
            self._now.changes.close()

    def forward(self, pred_cond: Tensor, **references: Tensor) -> GuiderOutput:
        """The guided output, and beside it the conditional one and the first reference's."""
        now, self._now = self._now, None
        if now is None or now.x is None:
            raise ValueError(
                "the network's input was not seen: a pipeline calls set_state and prepare_models before it"
            )
        guided = self._guided(now, now.x, [pred_cond, *references.values()])
        pred = torch.cat(
            [guided.to(pred_cond.dtype), pred_cond[:, guided.shape[1] :]], 1
        )  # a variance stays
        return GuiderOutput(
            pred=pred, pred_cond=pred_cond, pred_uncond=next(iter(references.values()), None)
        )

    def _guided(self, now: Evaluation, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The network's output that means the guided prediction."""
        process, level = self.known.process, now.step.level
        kind, sigma_data = process.prediction, process.sigma_data
        channels = min(x.shape[1], outputs[0].shape[1])
        x = x[:, :channels].to(torch.promote_types(x.dtype, torch.float32))
        x = x * edm_norm(level, sigma_data) if kind == "edm" else x
        found: list[Prediction] = [
            predict(kind, o[:, :channels].to(x.dtype), x, level, sigma_data) for o in outputs
        ]
        seen = GuidanceInput(x, now.step, found[0], tuple(found[1:]))
        prediction, self._memory = (
            self.known.rule.combine(seen, self._memory) if self._enabled else (found[0], None)
        )
        return target(kind, *prediction, level, sigma_data)
