"""References: the predictions that guidance extrapolates away from, and how each is computed.

    the same network without any condition     Unconditional   Ho & Salimans 2022 (2207.12598)
    the same network without some conditions   Without         Brooks et al. 2023 (2211.09800)
    the same network, another condition        Label           Liu et al. 2022 (2206.01714)
    another network, the same condition        WeakerNetwork   Karras et al. 2024 (2406.02507)
    the same network with altered layers       PerturbedAttention, SkippedLayers (perturbation.py)

Every rule accepts every reference. The predictions of the guided network
under several conditions share one forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffcore.core.conditions import (
    BatchCondition,
    Conditions,
    as_conditions,
    null_condition,
    replace_label,
    without,
)
from diffcore.core.denoiser import DenoiserProtocol, LevelMatchedDenoiser
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
    "Without",
    "check_reference",
    "find_networks",
    "load_weaker_networks",
]

Part = TypeVar("Part")
Condition = Sequence[int] | Tensor | Mapping[str, Any] | Conditions | None
"""What samples are conditioned on: one label for each, or values by name, see `sample`; or None."""

NETWORK_FIELD = {"holds_network": True}
"""Metadata of a dataclass field that holds a network's denoiser, or the folder of its run."""


class Query(NamedTuple):
    """A network and the condition under which it is evaluated.

    Args:
        denoiser: denoiser of the network.
        condition: (B,) labels or `Conditions`, or None without a condition.
    """

    denoiser: DenoiserProtocol
    condition: BatchCondition | None


class Reference(ABC):
    """A prediction that guidance extrapolates away from."""

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        """Check that a network of this process has the reference.

        Args:
            process: process of the network.
            condition: (B,) labels or `Conditions` of the run, or None without a condition.
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
    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        """Choose the network and the condition whose prediction is the reference.

        Args:
            denoiser: denoiser of the network that is guided.
            condition: (B,) labels or `Conditions` of the run, or None without a condition.
            x: (B, *shape) input of the network.

        Returns:
            The network and the condition of B samples under which it is evaluated.
        """


def check_names(process: Process, names: Sequence[str], rule: str) -> None:
    """Check that conditions exist and that a network was trained without them too.

    Args:
        process: process of the network.
        names: names of conditions.
        rule: the rule as text; it begins the message.

    Raises:
        ValueError: a name is unknown, or its condition was never dropped in training.
    """
    for name in names:
        if name not in process.dropouts:
            known = ", ".join(process.dropouts) or "none"
            raise ValueError(
                f"{rule} refers to the condition {name!r}, but this network has {known}: use "
                "these names"
            )
        if not process.dropouts[name]:
            raise ValueError(
                f"{rule} needs a prediction without the condition {name}, but this network was "
                "trained without dropping it: train with its dropout above 0 (0.1 is usual), or "
                "leave it out"
            )


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
    """The same network without conditions: under their absent values, learnt by condition dropout.

    A class label becomes the null label. Named conditions that training never dropped are kept.
    """

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        if condition is None:
            raise ValueError(
                f"{rule} needs a condition to strengthen: pass one label for each sample "
                "(--labels, --prompt), or use CFG(1.0)"
            )
        if not any(process.dropouts.values()):
            raise ValueError(
                f"{rule} needs the unconditional prediction, but this network was trained without "
                "condition dropout: use CFG(1.0), or train with dropout above 0 (0.1 is usual), "
                "or choose another reference (Label, WeakerNetwork)"
            )

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        process = denoiser.process
        if not process.conditions:
            return Query(denoiser, null_condition(process, len(x), x.device))
        names = tuple(name for name, dropout in process.dropouts.items() if dropout)
        return Without(names).query(denoiser, condition, x)


@dataclass(frozen=True)
class Without(Reference):
    """The same network without some of its conditions, and under the others.

    Args:
        names: conditions that are absent; `label` is the class label or the prompt.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names are {self.names}, expected different names of conditions")

    def check(self, process: Process, condition: Condition, rule: str) -> None:
        check_names(process, self.names, rule)
        if condition is None:
            raise ValueError(f"{rule} needs conditions to strengthen: pass them, or use CFG(1.0)")

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        given = as_conditions(denoiser.process, condition, len(x), x.device)
        assert given is not None  # `check` raises an error for a process without conditions
        return Query(denoiser, without(denoiser.process, given, self.names))


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

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        label = torch.full((len(x),), self.label, device=x.device)
        return Query(denoiser, replace_label(condition, label))


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

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        base = (
            Query(denoiser, condition)
            if self.base is None
            else self.base.query(denoiser, condition, x)
        )
        return Query(base.denoiser, replace_label(base.condition, self.labels))


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
        own = {name: record.shape for name, record in process.conditions.items()}
        for name, record in weaker.conditions.items():
            if own.get(name) != record.shape:
                raise ValueError(
                    f"{rule} compares networks of which the weaker one has the condition {name} of "
                    f"shape {record.shape}: train it on conditions that this one has, {own}"
                )

    def check_level(self, level: Level) -> None:
        assert not isinstance(self.network, str)  # `check` raises an error for a folder
        weaker = self.network.process
        weaker.check_level(weaker.schedule.at(level.logsnr), "for the weaker network, a knot")

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        assert not isinstance(self.network, str)  # `check` raises an error for a folder
        return Query(LevelMatchedDenoiser(self.network), condition)

    def __repr__(self) -> str:
        name = self.network if isinstance(self.network, str) else type(self.network).__name__
        return f"WeakerNetwork({name})"


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
