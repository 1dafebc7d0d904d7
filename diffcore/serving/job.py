"""An accepted request while its samples are drawn."""

import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import torch
from torch import Tensor

from diffcore.sampling.generation import Samples
from diffcore.serving.request import RequestPlan
from diffcore.serving.trajectory import Trajectory

__all__ = ["Job"]


class Job:
    """An accepted request: the samples that have begun, those that are done, and its future.

    Args:
        plan: the checked request.
        timeout: seconds after which it is given up; None: never.
    """

    def __init__(self, plan: RequestPlan, timeout: float | None) -> None:
        self.plan, self.timeout = plan, timeout
        self.start = time.monotonic()
        self.future: Future[Samples] = Future()
        self.begun = 0
        self._samples: dict[int, Tensor] = {}
        self._evaluations = 0

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.plan.request.seeds)

    @property
    def remaining(self) -> int:
        """Number of samples that are not done."""
        return self.count - len(self._samples)

    @property
    def seconds(self) -> float:
        """Seconds since it was accepted."""
        return time.monotonic() - self.start

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.timeout is not None and self.seconds >= self.timeout

    def add(self, index: int, trajectory: Trajectory) -> bool:
        """Add a sample that is done.

        Args:
            index: its index among those of the request.
            trajectory: its trajectory, which has no step left.

        Returns:
            Whether all samples are done.
        """
        self._samples[index] = trajectory.x.cpu()
        self._evaluations += trajectory.evaluations
        return not self.remaining

    def finish(self) -> None:
        """Set the result of the future, unless it was cancelled."""
        x = torch.cat([self._samples[index] for index in range(self.count)])
        mean = self._evaluations / self.count
        with suppress(InvalidStateError):
            self.future.set_result(Samples(x, self.plan.knots, mean, self.plan.planned))

    def fail(self, error: Exception) -> None:
        """Set the error of the future, unless it was cancelled."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)
