"""The networks of an objective beside the one that it trains: a frozen teacher, and others.

Distribution matching, for example, trains a network on the samples of the student, and a
discriminator. The trainer owns the weights of these networks and their optimizers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.network import LabelWrapper, without_labels
from diffcore.core.process import Process

__all__ = ["Networks", "RunningStatistics", "TrainedNetwork"]


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network that is trained beside that of the run, by its own optimizer.

    In each optimizer step of the run the network is updated `updates` times, before the run's own
    network, each time on the samples of the step with other random numbers.

    Args:
        module: the network, with its initial weights.
        optimizer: builds the optimizer from the parameters and the learning rate; None for that of
            the run.
        lr: learning rate as a function of the step and of the number of steps of the run; None for
            that of the run.
        updates: number of updates in each step of the run, at least 1.
        has_second_derivatives: whether a loss differentiates a gradient of the network, as the R1
            penalty does. Its parameters are then held by every rank where others are sharded.

    Raises:
        ValueError: `updates` is below 1.
    """

    module: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] | None = None
    lr: Callable[[int, int], float] | None = None
    updates: int = 1
    has_second_derivatives: bool = False

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates is {self.updates}, expected at least 1")


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of an objective beside the one that it trains.

    During the updates of one network the others are in evaluation mode and receive no gradient:
    a loss may differentiate through them with respect to their input.

    Args:
        teacher: frozen denoiser in evaluation mode, on the device of the run; None for none.
        trained: networks that are trained, by name. Their order is the order of their updates.
        label_wrapper: wraps a network so that it accepts the labels of the data; the trainer sets
            it.
        averaged: the network of the run with its averaged weights (EMA) after the last step, in
            evaluation mode, for losses to evaluate without gradient. The trainer sets it if the
            objective needs it (`Objective.needs_average`), else None.
    """

    teacher: DenoiserProtocol | None = None
    trained: Mapping[str, TrainedNetwork] = field(default_factory=dict)
    label_wrapper: LabelWrapper = without_labels
    averaged: Denoiser | None = None

    def module(self, name: str) -> nn.Module:
        """A further network as it is to be evaluated.

        Args:
            name: its name in `trained`.

        Returns:
            The module, which accelerate has wrapped in its own updates.
        """
        return self.trained[name].module

    def denoiser(self, name: str, process: Process) -> Denoiser:
        """A further network as a denoiser that accepts the labels of the data.

        Args:
            name: its name in `trained`.
            process: process of the network.

        Returns:
            The denoiser, which shares the weights of the module.
        """
        return Denoiser(self.label_wrapper(self.module(name)), process)


class RunningStatistics(nn.Module, ABC):
    """Statistics of the samples of each step, such as a running mean, as a part of a network.

    A loss calls `record` with sums over its samples. After the step the trainer adds them over the
    micro-batches and the ranks and calls `update`: the statistics do not depend on how the batch is
    split. They are buffers of the module, and so belong to the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None  # no buffer, which the first rank would send to the others

    @torch.no_grad()
    def record(self, sums: Tensor) -> None:
        """Add sums over samples of this rank.

        Args:
            sums: sums, of the same shape in each call; a tensor that is not finite is left out.
        """
        sums = sums.detach().double()
        sums = torch.where(sums.isfinite().all(), sums, 0.0)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor | None:
        """Take the sums since the last call.

        Returns:
            The sums, which are forgotten; None without any.
        """
        sums, self._sums = self._sums, None
        return sums

    @abstractmethod
    def update(self, sums: Tensor) -> None:
        """Update the buffers after a step.

        Args:
            sums: sums over all samples of the step, float64.
        """
