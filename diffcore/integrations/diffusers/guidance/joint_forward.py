"""The forward of a network whose pipeline has guidance of ours: asked about 2B rows, it asks its own about those a rule needs.

The pipeline's two halves are two conditions of one network, label 0 and the null label 1, so that rules and references see
what they see in our own loop. Whatever was passed with 2B rows goes with its rows: embeddings, ControlNet residuals, image
embeddings of IP-adapters, nested as they may be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffcore.core.denoiser import tensor_of
from diffcore.core.prediction import Prediction, edm_norm, predict, target
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
from diffcore.integrations.diffusers.scheduler.plan import Call
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.sampling.loop import check_guidance, evaluate_references, step_of
from diffcore.schedules import Level

INPUTS = ("sample", "hidden_states")


@dataclass
class Asked:
    """What a pipeline asked, as a denoiser of one row a sample under its condition (label 0) or its negative (null label 1).

    Args:
        network: whose layers a reference may alter.
        forward: its own.
        process: of one class, or of none where the pipeline has no negative half.
        x: what was asked about, 2B rows, or B.
        args: the other arguments, with the same rows.
        kwargs: the same by name.
        conditional_first: whether the condition's half comes first.
        answer: the first answer, whose form the pipeline expects.
    """

    network: nn.Module
    forward: Callable[..., Any]
    process: Process
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditional_first: bool
    answer: Any = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.x) // (2 if self.process.classes else 1)

    def sample(self, level: Level) -> Tensor:
        """(B, ...) x in float32 or better: not scaled, without what else is in its channels, such as a mask and its image."""
        channels = getattr(getattr(self.network, "config", None), "out_channels", None)
        x = self.x[: self.rows, : channels if self.x.ndim > 3 else None]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (
            x * edm_norm(level, self.process.sigma_data) if self.process.prediction == "edm" else x
        )

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        process = self.process
        places = self._places(condition, len(x), x.device)
        args, kwargs = self._of(places)
        scaled = x / edm_norm(level, process.sigma_data) if process.prediction == "edm" else x
        whole = torch.cat([scaled.to(self.x.dtype), self.x[places, x.shape[1] :]], 1)
        answer = self.forward(whole, *args, **kwargs)
        self.answer = answer if self.answer is None else self.answer
        output = tensor_of(answer)[:, : x.shape[1]].to(x.dtype)
        return predict(process.prediction, output, x, level, process.sigma_data)

    def answered(self, output: Tensor) -> Any:
        """The guided output in the form in which the pipeline expects it: its rows, its channels, its type."""
        asked = tensor_of(self.answer)
        variance = asked[: self.rows, output.shape[1] :]
        whole = torch.cat([output.to(asked.dtype), variance], 1)
        whole = torch.cat([whole] * (len(self.x) // self.rows))
        return (whole,) if isinstance(self.answer, tuple) else type(self.answer)(sample=whole)

    def _places(self, condition: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """The row of the pipeline's arguments for each of these rows."""
        within = torch.arange(rows, device=device) % self.rows
        if condition is None:
            return within
        second = condition if self.conditional_first else 1 - condition
        return within + second.to(device) * self.rows

    def _of(self, places: Tensor) -> Any:
        """The arguments for these rows."""
        total = len(self.x)
        return tree_map(
            lambda a: a[places] if isinstance(a, Tensor) and a.ndim and len(a) == total else a,
            (self.args, self.kwargs),
        )


@dataclass
class Progress:
    """What is known of a call under way.

    Args:
        process: of one class where both halves are there, or of none.
        memory: the rule's.
        step: of the last evaluation.
        asked: whether the network has been asked at this evaluation.
        waits: for whom an answer waits that has no content yet.
        rows: of a step, where equal halves of x were taken for two of guidance.
    """

    process: Process
    memory: Any = None
    step: Step | None = None
    asked: Any = None
    waits: Guidance | None = None
    rows: int | None = None

    def settle(self, rows: int) -> None:
        """The scheduler steps these rows: the evaluation is over.

        Raises:
            ValueError: the negative half has not come, or was none.
        """
        if self.rows not in (None, rows):
            raise ValueError(
                f"the {rows} samples begin with the same noise in both halves, as if a negative half were there: call the "
                f"pipeline with guidance_scale above 1, or give each sample its own seed"
            )
        if self.waits is not None:
            raise ValueError(unmet(self.waits))
        self.asked = None


class Guided:
    """A network's forward under a rule.

    Args:
        network: the network.
        forward: its own.
        scheduler: ours, which knows the level.
        guidance: the rule.
        family: the record of the pipeline's family.
        doubles: whether the pipeline says that it prepares both halves; None where it says nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[..., Any],
        scheduler: DiffcoreScheduler,
        guidance: Guidance,
        family: ModelFamily,
        doubles: Callable[[], bool | None],
    ) -> None:
        self.network, self.forward, self.scheduler, self.guidance = (
            network,
            forward,
            scheduler,
            guidance,
        )
        self.family, self.doubles = family, doubles

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, args, kwargs = asked_about(args, kwargs)
        call = self.scheduler.call
        state = call.now(self._time(args, kwargs))
        if call.guided is None:
            call.guided = self._begun(call, x, kwargs.get("class_labels"))
        progress: Progress = call.guided
        asked = Asked(
            self.network,
            self.forward,
            progress.process,
            x,
            args,
            kwargs,
            self.family.guidance_batching == "condition first",
        )
        if progress.asked is None:
            progress.step = step_of(progress.process, call.knots, state, progress.step)
        rule = self.guidance if call.plan.sampler.uses_guidance(state) else CFG(1.0)
        return self._answer(rule, asked, progress)

    def _answer(self, rule: Guidance, asked: Asked, progress: Progress) -> Any:
        """What the pipeline gets."""
        if progress.asked:
            raise ValueError(
                "the pipeline asks its network twice at a level: leave out what does, such as skip_guidance_layers"
            )
        assert progress.step is not None
        progress.asked, step, x = True, progress.step, asked.sample(progress.step.level)
        condition = (
            torch.zeros(len(x), dtype=torch.int64, device=x.device)
            if progress.process.classes
            else None
        )
        return asked.answered(
            guide(
                rule,
                evaluate_references(asked, rule, x, condition, progress.memory, step),
                progress,
            )
        )

    def _time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the scheduler says of the level that the network is told."""
        t = args[0] if args else kwargs["timestep"]
        t = t.flatten()[0] if isinstance(t, Tensor) else t
        return t / self.family.time_scale(self.network)

    def _begun(self, call: Call, x: Tensor, labels: Tensor | None) -> Progress:
        """What is known before the first evaluation; of DiT its labels too.

        Raises:
            ValueError: the rule cannot guide this call.
        """
        doubled = self._doubled(x, labels)
        steps = (step_of(call.plan.process, call.knots, state) for state in call.plan.states)
        if not doubled and any(
            isinstance(r, Unconditional)
            for s in steps
            for r in self.guidance.required_references(s, None)
        ):
            raise ValueError(unmet(self.guidance))
        guessed = doubled and labels is None and self.doubles() is None
        return Progress(self._checked(call, doubled), rows=len(x) // 2 if guessed else None)

    def _checked(self, call: Call, doubled: bool) -> Process:
        """Of one class, which a negative half makes droppable."""
        process = (
            replace(call.plan.process, classes=1, dropout=0.1) if doubled else call.plan.process
        )
        condition = torch.zeros(1, dtype=torch.int64) if doubled else None
        check_guidance(process, call.knots, condition, self.guidance, call.plan.sampler)
        return process

    def _doubled(self, x: Tensor, labels: Tensor | None) -> bool:
        """Whether x holds each sample twice; where the pipeline does not say, seen once a call."""
        said = self.doubles()
        if said is not None:
            return said
        null = self.family.null_label
        if labels is not None and null is not None and bool(labels[len(x) // 2 :].ne(null).any()):
            return False
        first, *second = x.chunk(2)
        return bool(second) and len(x) % 2 == 0 and torch.equal(first, second[0])


def unmet(rule: Guidance) -> str:
    """What to do where a pipeline leaves out the negative half."""
    return (
        f"{rule} needs the negative half, which the pipeline leaves out: call it with guidance_scale above 1 (Flux: "
        f"true_cfg_scale, and a negative prompt; its value is not used), or attach CFG(1.0)"
    )


def guide(rule: Guidance, seen: GuidanceInput, progress: Progress) -> Tensor:
    """The network's output that means the guided prediction."""
    prediction, progress.memory = rule.combine(seen, progress.memory)
    pair = prediction if rule.consistent else same_step(prediction, seen.x, seen.step)
    return target(
        seen.step.process.prediction, *pair, seen.step.level, seen.step.process.sigma_data
    )


def same_step(prediction: Prediction, x: Tensor, step: Step) -> Prediction:
    """The pair with x = α x_0 + σ ε whose first-order step leads where this one's does."""
    t, s = step.level, step.end
    y, det = prediction.at(s), t.alpha * s.sigma - t.sigma * s.alpha
    return Prediction((s.sigma * x - t.sigma * y) / det, (t.alpha * y - s.alpha * x) / det)


def check_rule(rule: Guidance) -> None:
    """Raise where a rule reads labels, which pipelines have not."""
    if any(isinstance(part, (ClassifierGuidance, GFCG)) for part in rule.parts()):
        raise ValueError(
            f"{rule} reads class labels, which a pipeline's condition is not: use CFG, APG or Interval"
        )


def asked_about(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """x, and the other arguments; all of them by position or by name."""
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in INPUTS if name in kwargs)
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
