"""References: the predictions that guidance extrapolates away from, and how each is computed.

    the same network without the condition     Unconditional   Ho & Salimans 2022 (2207.12598)
    the same network, another condition        Label           Liu et al. 2022 (2206.01714)
    another network, the same condition        WeakerNetwork   Karras et al. 2024 (2406.02507)
    the same network with altered layers       PerturbedAttention, SkippedLayers (perturbation.py)

Every rule accepts every reference. The predictions of the guided network
under several conditions share one forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper, null_condition
from diffcore.core.prediction import Prediction, hypot
from diffcore.core.process import Process
from diffcore.schedules import Level

__all__ = [
    "NETWORK_FIELD",
    "Condition",
    "Label",
    "LabelPerSample",
    "Query",
    "Reference",
    "Unconditional",
    "WeakerNetwork",
    "check_reference",
    "evaluate_queries",
    "find_networks",
    "load_weaker_networks",
]

Part = TypeVar("Part")
Condition = Sequence[int] | Tensor | None
"""One label for each sample, or None without a condition."""

NETWORK_FIELD = {"holds_network": True}
"""Metadata of a dataclass field that holds a network's denoiser, or the folder of its run."""


class Query(NamedTuple):
    """A network and the condition under which it is evaluated.

    Args:
        denoiser: denoiser of the network.
        condition: (B,) labels, or None without a condition.
    """

    denoiser: DenoiserProtocol
    condition: Tensor | None


class Reference(ABC):
    """A prediction that guidance extrapolates away from."""

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        """Check that a network of this process has the reference.

        Args:
            process: process of the network.
            condition: (B,) labels of the run, or None without a condition.
            rule: the rule as text; it begins the message.

        Raises:
            ValueError: the network has no such reference; the message has the remedy.
        """
        return

    def check_level(self, level: Level) -> None:
        """Check that the reference can be evaluated at a level at which the network can.

        Raises:
            ValueError: it cannot; the message has the remedy.
        """
        return

    @abstractmethod
    def query(self, denoiser: DenoiserProtocol, condition: Tensor | None, x: Tensor) -> Query:
        """Choose the network and the condition whose prediction is the reference.

        Args:
            denoiser: denoiser of the network that is guided.
            condition: (B,) labels of the run, or None without a condition.
            x: (B, *shape) input of the network.

        Returns:
            The network and the (B,) labels under which it is evaluated.
        """


def check_reference(reference: Any) -> None:
    """Check that the reference of a rule is a Reference, and not a bare label or a network.

    Raises:
        TypeError: it is something else; the message has examples.
    """
    if not isinstance(reference, Reference):
        raise TypeError(
            f"reference is {reference!r}, expected a reference such as Unconditional(), Label(3) "
            "or WeakerNetwork(network)"
        )


@dataclass(frozen=True)
class Unconditional(Reference):
    """The same network without the condition: under the null label, learnt by condition dropout."""

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if condition is None:
            raise ValueError(
                f"{rule} needs a condition to strengthen: pass one label for each sample "
                "(--labels, --prompt), or use CFG(1.0)"
            )
        if not process.dropout:
            raise ValueError(
                f"{rule} needs the unconditional prediction, but this network was trained without "
                "condition dropout: use CFG(1.0), or train with dropout above 0 (0.1 is usual), "
                "or choose another reference (Label, WeakerNetwork)"
            )

    def query(self, denoiser: DenoiserProtocol, condition: Tensor | None, x: Tensor) -> Query:
        return Query(denoiser, null_condition(denoiser.process, len(x), x.device))


@dataclass(frozen=True)
class Label(Reference):
    """The same network under another label: a negative condition. It needs no condition dropout.

    Args:
        label: class to move away from, 0 .. classes - 1; the same for all samples.
    """

    label: int

    def __post_init__(self) -> None:
        if self.label < 0:
            raise ValueError(f"label is {self.label}, expected a class, 0 or above")

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if self.label >= process.classes:
            raise ValueError(
                f"{rule} refers to label {self.label}, but this network has {process.classes} "
                f"classes: use labels below {process.classes}"
            )

    def query(self, denoiser: DenoiserProtocol, condition: Tensor | None, x: Tensor) -> Query:
        return Query(denoiser, torch.full((len(x),), self.label, device=x.device))


@dataclass(frozen=True)
class LabelPerSample(Reference):
    """One label for each sample, chosen by a rule during the run (GFCG).

    Args:
        labels: (B,) classes; None in a plan, which does not know them.
        base: reference whose network is evaluated under these labels; None is the same network.
    """

    labels: Tensor | None
    base: Reference | None = None

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if process.classes < 2:
            raise ValueError(
                f"{rule} needs a network of 2 classes or more, and this one has {process.classes}: "
                f"use CFG"
            )
        if self.base is not None:
            self.base.check(process, condition, rule)

    def check_level(self, level: Level) -> None:
        if self.base is not None:
            self.base.check_level(level)

    def query(self, denoiser: DenoiserProtocol, condition: Tensor | None, x: Tensor) -> Query:
        base = (
            Query(denoiser, condition)
            if self.base is None
            else self.base.query(denoiser, condition, x)
        )
        return Query(base.denoiser, self.labels)


@dataclass(frozen=True, repr=False)
class WeakerNetwork(Reference):
    """Another network under the same condition: smaller, trained for less time, or another average.

    Its schedule and prediction type may differ: levels are matched in λ, and x is rescaled by the
    ratio of the scalings. It needs neither a condition nor condition dropout.

    Args:
        network: denoiser of the weaker network; on the command line the folder of its run.
    """

    network: str | DenoiserProtocol = field(metadata=NETWORK_FIELD)

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if isinstance(self.network, str):
            raise ValueError(
                f"{rule} names the run {self.network!r}: pass "
                f"Run(Path({self.network!r})).denoiser()"
            )
        weaker = self.network.process
        if weaker.shape != process.shape:
            raise ValueError(
                f"{rule} compares networks of shapes {process.shape} and {weaker.shape}: train the "
                f"weaker one on the same data"
            )
        if condition is not None and weaker.classes != process.classes:
            raise ValueError(
                f"{rule} compares networks of {process.classes} and {weaker.classes} classes, "
                "whose labels differ: train the weaker one on the same classes"
            )

    def check_level(self, level: Level) -> None:
        assert not isinstance(self.network, str)  # `check` raises an error for a folder
        weaker = self.network.process
        weaker.check_level(weaker.schedule.at(level.logsnr), "for the weaker network, a knot")

    def query(self, denoiser: DenoiserProtocol, condition: Tensor | None, x: Tensor) -> Query:
        assert not isinstance(self.network, str)  # `check` raises an error for a folder
        return Query(_LevelMatchedDenoiser(self.network), condition)

    def __repr__(self) -> str:
        name = self.network if isinstance(self.network, str) else type(self.network).__name__
        return f"WeakerNetwork({name})"


class _LevelMatchedDenoiser(DenoiserWrapper):
    """A denoiser that accepts x and levels of another process."""

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        if self.process.schedule == level.schedule:
            return self.inner(x, level, condition)
        matched = self.process.schedule.at(level.logsnr)
        ratio = hypot(matched.alpha, matched.sigma) / hypot(level.alpha, level.sigma)
        ratio = ratio.to(x) if isinstance(ratio, Tensor) else ratio
        return self.inner(ratio * x, matched, condition)


def evaluate_queries(
    queries: Sequence[Query], x: Tensor, level: Level, micro_batch: int = 0
) -> list[Prediction]:
    """Evaluate the queries at one level. Queries to one denoiser share one forward.

    Args:
        queries: networks and conditions.
        x: (B, *shape) input of each network.
        level: level of x.
        micro_batch: number of samples in each call of a network; 0 puts all into one call.

    Returns:
        The prediction of each query, in the order of the queries.
    """
    predictions: dict[int, Prediction] = {}
    for i, query in enumerate(queries):
        if i not in predictions:
            same = [j for j in range(i, len(queries)) if queries[j].denoiser is query.denoiser]
            results = _evaluate_together([queries[j] for j in same], x, level, micro_batch)
            predictions.update(zip(same, results, strict=True))
    return [predictions[i] for i in range(len(queries))]


def _evaluate_together(
    queries: Sequence[Query], x: Tensor, level: Level, micro_batch: int
) -> list[Prediction]:
    """The predictions of one network under several conditions, from one forward."""
    count, denoiser = len(queries), queries[0].denoiser
    condition = queries[0].condition if count == 1 else _concatenate_conditions(queries, x)
    stacked = x if count == 1 else torch.cat([x] * count)
    together = _evaluate(denoiser, stacked, level, condition, micro_batch)
    chunks = (value.chunk(count) for value in together)
    return [Prediction(*pair) for pair in zip(*chunks, strict=True)]


def _concatenate_conditions(queries: Sequence[Query], x: Tensor) -> Tensor | None:
    """The conditions of all queries in one tensor; a missing one becomes the null label."""
    null = null_condition(queries[0].denoiser.process, len(x), x.device)
    if null is None:
        return None
    return torch.cat([null if q.condition is None else q.condition.to(null) for q in queries])


def _evaluate(
    denoiser: DenoiserProtocol, x: Tensor, level: Level, condition: Tensor | None, micro_batch: int
) -> Prediction:
    """Evaluate in calls of exactly `micro_batch` samples, the last one padded; 0 is one call."""
    if not micro_batch:
        return denoiser(x, level, condition)
    parts = []
    for start in range(0, len(x), micro_batch):
        # The last sample fills the last call: bits then do not depend on the number of samples.
        samples = torch.arange(start, start + micro_batch, device=x.device).clamp(max=len(x) - 1)
        labels = None if condition is None else condition[samples]
        parts.append(denoiser(x[samples], level, labels))
    return Prediction(*(torch.cat(values)[: len(x)] for values in zip(*parts, strict=True)))


def load_weaker_networks(part: Part, load: Callable[[str], DenoiserProtocol]) -> Part:
    """Replace each run folder in a rule or reference by the denoiser of that run.

    Args:
        part: rule or reference, which may hold others.
        load: function from the folder of a run to its denoiser.

    Returns:
        An equal rule or reference that holds denoisers; `part` itself if it names no folder.
    """
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changes = {}
    for f in fields(part):
        if f.init:
            value = getattr(part, f.name)
            new = _load_value(value, "holds_network" in f.metadata, load)
            if new is not value:
                changes[f.name] = new
    return replace(part, **changes) if changes else part


def _load_value(value: Any, holds_network: bool, load: Callable[[str], DenoiserProtocol]) -> Any:
    if holds_network and isinstance(value, str):
        return load(value)
    if isinstance(value, tuple):
        items = tuple(_load_value(item, holds_network, load) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return load_weaker_networks(value, load)


def find_networks(part: Any) -> Iterator[DenoiserProtocol | nn.Module]:
    """Iterate over the networks that a rule or reference evaluates beside the guided one.

    Yields:
        The denoisers of weaker networks, and classifiers that are modules or methods of modules. A
        network that is named by the folder of its run is not among them.
    """
    part = getattr(part, "__self__", part)  # the module of a bound method
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from find_networks(item)
    elif is_dataclass(part) and not isinstance(part, type):
        for f in fields(part):
            if not f.init:
                continue  # AutoGuidance builds this reference from its weaker network
            value = getattr(part, f.name)
            if "holds_network" not in f.metadata:
                yield from find_networks(value)
            elif not isinstance(value, str):
                yield value
