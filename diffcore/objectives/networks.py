"""The networks of an objective beside the one that it trains: a frozen teacher, and others.

Distribution matching, for example, trains a network on the samples of the student, and a
discriminator. The trainer owns the weights of these networks and their optimizers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from diffcore.core.denoiser import DenoiserProtocol

__all__ = ["Networks", "TrainedNetwork"]


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network that is trained beside that of the run, by its own optimizer.

    In each optimizer step of the run the network is updated `updates` times, before the run's own
    network, each time on the samples of the step with other random numbers.

    Args:
        module: the network, with its initial weights.
        optimizer: builds the optimizer from the parameters and the learning rate.
        lr: learning rate as a function of the step and of the number of steps of the run.
        updates: number of updates in each step of the run, at least 1.

    Raises:
        ValueError: `updates` is below 1.
    """

    module: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    lr: Callable[[int, int], float]
    updates: int = 1

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates is {self.updates}, expected at least 1")


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of an objective beside the one that it trains.

    Args:
        teacher: frozen denoiser in evaluation mode, on the device of the run; None for none.
        trained: networks that are trained, by name. Their order is the order of their updates.
    """

    teacher: DenoiserProtocol | None = None
    trained: Mapping[str, TrainedNetwork] = field(default_factory=dict)
