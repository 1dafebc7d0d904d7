"""Validation: the loss on held-out data at fixed noise levels, with fixed noise.

    loss = 1/M Σ_i L(x_0 of item π(i) mod N, t_i, ε_i),   t_i = U + i/M mod 1,   M = N draws

The permutation π, the levels, the noise and the dropped conditions are functions of the seed alone,
so that the curve over the steps has no sampling noise, and differs between runs of one seed only by
the network. The loss is that of the objective without what makes training noisier or easier:
perturbation, coupling, resampling and learned uncertainty.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from diffcore.core.conditions import batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, derive_seed, permutation
from diffcore.objectives.coupling import IndependentCoupling
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.sampling.generation import evaluation_mode
from diffcore.schedules import Schedule
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.checks import (
    check_data,
    process_of_item,
    process_with_captions,
    read_item,
)
from diffcore.training.data.source import NOISE, WEIGHT, DataSource
from diffcore.training.optimization.gradients import frozen

if TYPE_CHECKING:
    from diffcore.training.state import TrainState

__all__ = [
    "HeldOutLoss",
    "Measurement",
    "Validation",
    "level_bounds",
    "mean_by_level",
    "measure_loss",
    "stops_early",
    "validate",
]


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out data and how often its loss is measured.

    Args:
        data: held-out data set, with items as those of the training data; None: no validation.
        every: number of steps between two measurements; the last step has one too.
        items: largest number of items, spread evenly over the data.
        draws: number of noise levels at which each item is evaluated.
        bins: number of intervals of noise levels, with equally many levels in each; those of the
            training loss too.
        patience: number of measurements in a row without a lower loss of the averaged weights after
            which the run ends; 0 never ends it early.

    Raises:
        ValueError: A number is out of range, or the data set is empty or not map-style.
    """

    data: Dataset | None = None  # type: ignore[type-arg]  # jsonargparse reads the bare class
    every: int = 1000
    items: int = 1024
    draws: int = 1
    bins: int = 8
    patience: int = 0

    def __post_init__(self) -> None:
        minimum = {"every": 1, "items": 1, "draws": 1, "bins": 1, "patience": 0}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"validation.{name} is {getattr(self, name)}, expected at least {least}"
                )

    @cached_property
    def source(self) -> DataSource | None:
        """The held-out data with the defaults of every optional member, or None."""
        return None if self.data is None else as_data_source(self.data)

    def process(self, process: Process) -> Process:
        """The process of the held-out data, which may have other captions than the training data.

        Args:
            process: process of the run.
        """
        if self.source is None or not self.source.texts:
            return process
        return process_with_captions(replace(process, classes=0), self.source)

    def check(self, process: Process) -> None:
        """Raise ValueError if the held-out data does not fit the process of a run.

        Args:
            process: process of the run.
        """
        if self.source is not None:
            check_data(self.source, self.process(process))

    def is_due(self, step: int, last: int) -> bool:
        """Whether the loss is measured after `step` steps of a run of `last` steps."""
        return self.data is not None and (step % self.every == 0 or step == last)


class HeldOutLoss(NamedTuple):
    """The loss on held-out data.

    Args:
        loss: mean over all levels.
        by_level: mean in each interval of noise levels, from clean to noise.
    """

    loss: float
    by_level: list[float]


class Measurement(NamedTuple):
    """The losses of a run on its held-out data at one step.

    Args:
        averaged: loss of the averaged weights.
        current: loss of the current weights.
        logsnr: λ at the bounds of the intervals of noise levels.
    """

    averaged: HeldOutLoss
    current: HeldOutLoss
    logsnr: list[float]


def measure_loss(
    denoiser: Denoiser,
    validation: Validation,
    objective: Objective,
    seed: int,
    batch_size: int,
    ranks: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    networks: Networks | None = None,
) -> HeldOutLoss:
    """The loss of a network on the held-out data. Every rank must call it.

    Args:
        denoiser: network that accepts the labels of the held-out data, with its process.
        validation: held-out data and number of evaluations.
        objective: training objective.
        seed: seed of the run.
        batch_size: number of samples in a network call.
        ranks: index of this rank, and number of ranks.
        gather: gathers a tensor (1, n) of each rank to (ranks, n).
        networks: networks of the objective beside the one that it trains.

    Returns:
        The loss, the same on every rank, and equal to rounding for every number of ranks and batch
        size.

    Raises:
        ValueError: An item cannot be read, or does not fit the process.
    """
    source = validation.source
    assert source is not None
    plain = replace(
        objective,
        coupling=IndependentCoupling(),
        levels="stratified",
        perturbation=0.0,
        resampler=None,
        uncertainty=None,
    )
    size = min(validation.items, len(source))
    total, (rank, world) = size * validation.draws, ranks
    key_seed = derive_seed(seed, Stream.VALIDATION, 0)
    # Sorted data must not put each class at levels of its own.
    rows = permutation(key_seed, 0, total) % size * len(source) // size
    own = torch.arange(rank, -(-total // world) * world, world) % total  # as many on each rank
    # Items of several buckets are not stacked, and a sharded network needs equally many calls.
    micro = 1 if source.groups and len(source.groups.shapes) > 1 else batch_size
    with torch.no_grad(), evaluation_mode(denoiser):
        losses = torch.cat(
            [
                _batch_losses(
                    denoiser,
                    source,
                    plain,
                    SampleKey(key_seed, 0, index, total),
                    rows[index],
                    networks,
                )
                for index in own.split(micro)
            ]
        )
    table = gather(losses[None]).T.flatten()[:total].double().cpu()
    times = plain.times(SampleKey(key_seed, 0, torch.arange(total), total))
    return HeldOutLoss(float(table.mean()), mean_by_level(table, times, validation.bins))


def mean_by_level(
    losses: Tensor, times: Tensor, bins: int, oversampling: Tensor | None = None
) -> list[float]:
    """The mean loss in each interval of noise levels, Σ L_i / Σ 1/q_i.

    Args:
        losses: (N,) or (steps, B) losses, divided by q already.
        times: times t of their levels, of the same shape, in (0, 1].
        bins: number of intervals, of equal length in t.
        oversampling: q, the density of the draws of t relative to uniform ones; None: 1.

    Returns:
        The means from clean to noise; NaN where an interval has no sample.
    """
    table = losses.double().flatten()
    inverse = torch.ones_like(table) if oversampling is None else 1 / oversampling.flatten()
    index = (times.flatten() * bins).long().clamp(max=bins - 1)
    inside = [index == bin_ for bin_ in range(bins)]
    return [float(table[mask].sum() / inverse[mask].sum()) for mask in inside]


def level_bounds(schedule: Schedule, bins: int) -> list[float]:
    """λ at the bounds of the intervals of noise levels, from clean to noise.

    Args:
        schedule: schedule of the training levels, `Objective.schedule`. With `reference_size` it is
            that of samples of the shape of the process; those of other buckets are at other λ.
        bins: number of intervals.

    Returns:
        bins + 1 values of λ, which fall.
    """
    return [float(schedule.logsnr(bin_ / bins)) for bin_ in range(bins + 1)]


def _batch_losses(
    denoiser: Denoiser,
    source: DataSource,
    objective: Objective,
    key: SampleKey,
    rows: Tensor,
    networks: Networks | None,
) -> Tensor:
    """The losses (B,) of items at the levels that a key indexes, on the device of the network."""
    device = denoiser.device
    process = process_of_item(denoiser.process, source, int(rows[0]))
    items = [read_item(partial(source.__getitem__, row), row, process) for row in rows.tolist()]
    x0, label, extras = default_collate(items)
    draw = objective.draw(process, key, device).paired(extras.get(NOISE))
    values = {**extras, **draw.conditions}
    condition = batch_condition(process, label, values, device, source.inputs)
    weight = extras[WEIGHT].to(device) if WEIGHT in extras else None
    return objective(denoiser, x0.to(device), condition, draw, None, weight, networks)


def validate(state: "TrainState") -> Measurement:
    """Measure the held-out loss of the averaged and of the current weights. All ranks must call it.

    Args:
        state: state of the run.

    Returns:
        Both losses, the same on every rank.
    """
    settings, accelerator = state.settings, state.accelerator
    validation = settings.validation
    source = validation.source
    assert source is not None
    process = validation.process(settings.process)
    denoiser = Denoiser(source.label_wrapper(accelerator.device)(state.network), process)
    measure = partial(
        measure_loss,
        denoiser,
        validation,
        settings.objective,
        settings.seed,
        settings.batch_size // accelerator.num_processes // settings.accumulation,
        (accelerator.process_index, accelerator.num_processes),
        accelerator.gather,
        state.networks,
    )
    with frozen(state.further_modules()), state.evaluation_weights():
        current = measure()
    with frozen(state.further_modules()), state.average.applied():
        averaged = measure()
    schedule = settings.objective.schedule(process)
    return Measurement(averaged, current, level_bounds(schedule, validation.bins))


def stops_early(losses: list[float], patience: int) -> bool:
    """Whether the last `patience` losses are all no lower than an earlier one.

    Args:
        losses: losses of the averaged weights, in the order of their measurement; NaN is higher
            than every number.
        patience: number of measurements; 0: never.
    """
    if not patience or len(losses) <= patience:
        return False
    ranked = [math.inf if math.isnan(loss) else loss for loss in losses]
    return min(ranked[-patience:]) >= min(ranked[:-patience])
