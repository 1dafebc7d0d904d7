"""References: what a rule moves away from, and how it is asked.

    the same network without the condition     Unconditional      Ho & Salimans 2022 (2207.12598)
    the same network, another condition        Label              a negative prompt; Liu et al. 2022 (2206.01714)
    another network, the same condition        Weaker             Karras et al. 2024 (2406.02507)
    the same network, altered                  PerturbedAttention, SkippedLayers (diffcore.guidance.perturbation)

Any of them serves any rule. What asks the same network goes into one forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoise, null_condition
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.schedules import Level

Part = TypeVar("Part")
Condition = Sequence[int] | Tensor | None
RUN = {"run": True}
"""Metadata of a field that holds a network, or the folder of the run that made it."""


class Query(NamedTuple):
    """A network and the condition that it is asked about, (B,) labels or nothing."""

    denoiser: Denoise
    condition: Tensor | None


class Reference(ABC):
    """What guidance moves away from."""

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        """Raise ValueError where a network of this process has no such reference; `rule` begins the message."""
        return

    def check_level(self, level: Level) -> None:
        """Raise ValueError where the reference cannot be asked at a level where the network can."""
        return

    @abstractmethod
    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        """Which network to ask about x, under which condition."""


def check_reference(reference: Any) -> None:
    """Raise where a rule is given something else, such as a bare label or network."""
    if not isinstance(reference, Reference):
        raise TypeError(
            f"reference is {reference!r}, expected a reference such as Unconditional(), Label(3) or Weaker(network)"
        )


@dataclass(frozen=True)
class Unconditional(Reference):
    """The same network without the condition: the null label, which condition dropout taught it."""

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if condition is None:
            raise ValueError(
                f"{rule} needs a condition to strengthen: pass one label a sample (--labels, --prompt), or use CFG(1.0)"
            )
        if not process.dropout:
            raise ValueError(
                f"{rule} needs the unconditional prediction, but this network was trained without condition dropout: "
                f"use CFG(1.0), or train with dropout above 0 (0.1 is usual), or take another reference (Label, Weaker)"
            )

    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        return Query(denoiser, null_condition(denoiser.process, len(x), x.device))


@dataclass(frozen=True)
class Label(Reference):
    """The same network under another label: a negative condition. It needs no condition dropout.

    Args:
        label: a class, 0 .. classes - 1.
    """

    label: int

    def __post_init__(self) -> None:
        if self.label < 0:
            raise ValueError(f"label is {self.label}, expected a class, 0 or above")

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if self.label >= process.classes:
            raise ValueError(
                f"{rule} asks for label {self.label}, but this network has {process.classes} classes: "
                f"use labels below {process.classes}"
            )

    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        return Query(denoiser, torch.full((len(x),), self.label, device=x.device))


@dataclass(frozen=True)
class Labels(Reference):
    """A label a row, as a rule chose them while it ran: another condition of the same network, or of `base`'s.

    Args:
        labels: (B,), or None for what a plan does not know yet.
        base: the network that is asked.
    """

    labels: Tensor | None
    base: Reference | None = None

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if process.classes < 2:
            raise ValueError(
                f"{rule} needs a network of 2 classes or more, and this one has {process.classes}: use CFG"
            )
        if self.base is not None:
            self.base.check(process, condition, rule)

    def check_level(self, level: Level) -> None:
        if self.base is not None:
            self.base.check_level(level)

    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        base = (
            Query(denoiser, condition)
            if self.base is None
            else self.base.query(denoiser, condition, x)
        )
        return Query(base.denoiser, self.labels)


@dataclass(frozen=True, repr=False)
class Weaker(Reference):
    """Another network under the same condition: smaller, less trained, with another dropout or average.

    It may have been trained on another schedule and prediction type: levels are matched in λ, and x is rescaled by the
    ratio of the scalings. It needs no condition and no condition dropout.

    Args:
        network: its denoiser; on the command line the folder of its run.
    """

    network: str | Denoise = field(metadata=RUN)

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if isinstance(self.network, str):
            raise ValueError(
                f"{rule} names the run {self.network!r}: pass Run(Path({self.network!r})).denoiser()"
            )
        own = self.network.process
        if own.shape != process.shape:
            raise ValueError(
                f"{rule} compares networks of shapes {process.shape} and {own.shape}: the weaker one needs the same data"
            )
        if condition is not None and own.classes != process.classes:
            raise ValueError(
                f"{rule} compares networks of {process.classes} and {own.classes} classes: labels would differ"
            )

    def check_level(self, level: Level) -> None:
        assert not isinstance(self.network, str)  # `check` refuses it
        own = self.network.process
        own.check_level(own.schedule.at(level.logsnr), "for the weaker network, a knot")

    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        assert not isinstance(self.network, str)  # `check` refuses it
        return Query(_Matched(self.network), condition)

    def __repr__(self) -> str:
        return f"Weaker({self.network if isinstance(self.network, str) else type(self.network).__name__})"


class _Matched:
    """A network asked at a level of another process."""

    def __init__(self, denoiser: Denoise) -> None:
        self.denoiser, self.process = denoiser, denoiser.process

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        if self.process.schedule == level.schedule:
            return self.denoiser(x, level, condition)
        own = self.process.schedule.at(level.logsnr)
        ratio = own.alpha / level.alpha if level.alpha else own.sigma / level.sigma
        return self.denoiser(ratio * x, own, condition)


def evaluate_queries(
    queries: Sequence[Query], x: Tensor, level: Level, rows: int = 0
) -> list[Prediction]:
    """The prediction for each query: one forward for all that ask the same network, or calls of `rows` rows each."""
    if len(queries) == 1:
        return [_ask(queries[0].denoiser, x, level, queries[0].condition, rows)]
    found: dict[int, Prediction] = {}
    for i, query in enumerate(queries):
        if i not in found:
            same = [j for j in range(i, len(queries)) if queries[j].denoiser is query.denoiser]
            found.update(
                zip(same, _together([queries[j] for j in same], x, level, rows), strict=True)
            )
    return [found[i] for i in range(len(queries))]


def _together(queries: Sequence[Query], x: Tensor, level: Level, rows: int) -> list[Prediction]:
    """The predictions of one network under several conditions."""
    condition = queries[0].condition if len(queries) == 1 else _stacked(queries, x)
    many = x if len(queries) == 1 else torch.cat([x] * len(queries))
    every = _ask(queries[0].denoiser, many, level, condition, rows)
    return [
        Prediction(*pair)
        for pair in zip(*(value.chunk(len(queries)) for value in every), strict=True)
    ]


def _stacked(queries: Sequence[Query], x: Tensor) -> Tensor | None:
    nothing = null_condition(queries[0].denoiser.process, len(x), x.device)
    if nothing is None:
        return None
    return torch.cat([nothing if q.condition is None else q.condition.to(nothing) for q in queries])


def _ask(
    denoiser: Denoise, x: Tensor, level: Level, condition: Tensor | None, rows: int
) -> Prediction:
    """In calls of `rows` rows, the last one padded, so that each has the same size; 0 is one call."""
    if not rows:
        return denoiser(x, level, condition)
    parts = []
    for start in range(0, len(x), rows):
        chosen = torch.arange(start, start + rows, device=x.device).clamp(max=len(x) - 1)
        parts.append(denoiser(x[chosen], level, None if condition is None else condition[chosen]))
    return Prediction(*(torch.cat(values)[: len(x)] for values in zip(*parts, strict=True)))


def loaded(part: Part, load: Callable[[str], Denoise]) -> Part:
    """The rule or reference with every run that it names by its folder replaced by that run's denoiser."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    own = {
        f.name: (getattr(part, f.name), bool(f.metadata.get("run"))) for f in fields(part) if f.init
    }
    new = {name: _loaded(value, named, load) for name, (value, named) in own.items()}
    changes = {name: value for name, value in new.items() if value is not own[name][0]}
    return replace(part, **changes) if changes else part


def networks(part: Any) -> Iterator[Denoise]:
    """The other networks that a rule or reference asks."""
    if isinstance(part, tuple):
        for item in part:
            yield from networks(item)
    elif is_dataclass(part) and not isinstance(part, type):
        for f in (
            f for f in fields(part) if f.init
        ):  # AutoGuidance makes its reference of its weaker network
            value = getattr(part, f.name)
            if not f.metadata.get("run"):
                yield from networks(value)
            elif not isinstance(value, str):
                yield value


def _loaded(value: Any, named: bool, load: Callable[[str], Denoise]) -> Any:
    if named and isinstance(value, str):
        return load(value)
    if isinstance(value, tuple):
        parts = tuple(_loaded(item, named, load) for item in value)
        return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return loaded(value, load)
