"""The adaptive distribution of the training levels: it updates the objective's resampler."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.objective import Objective
from diffcore.training.reports.window import LossWindow

__all__ = ["DrawnLevels", "LevelSampler"]

PREFIX = "resampler."
"""Prefix of its tensors in a checkpoint."""


class DrawnLevels(NamedTuple):
    """The levels at which the samples of some steps were trained.

    Args:
        times: (steps, B) times t in the order of the global batch, float64.
        oversampling: (steps, B) density of their draws relative to uniform ones.
    """

    times: Tensor
    oversampling: Tensor


class LevelSampler:
    """The distribution of the training levels of a run, the same on every rank.

    With a resampler, it gathers the losses of all ranks every `update_interval` steps and updates
    the resampler. Without one, the distribution does not change.

    Args:
        objective: training objective, with or without a resampler.
        process: process with the schedule of the training times.
        seed: seed of the run.
        batch: size of the global batch.
        parts: number of micro-batches of a rank in a step.
        gather: gathers a tensor (1, ...) of each rank to (ranks, ...).
        group: number of consecutive samples of the global batch that are in one micro-batch.
    """

    def __init__(
        self,
        objective: Objective,
        process: Process,
        seed: int,
        batch: int,
        parts: int,
        gather: Callable[[Tensor], Tensor],
        group: int = 1,
    ) -> None:
        self.objective, self.process, self.seed, self.batch = objective, process, seed, batch
        self.learned: ResamplerState | None = (
            objective.resampler.initial_state() if objective.resampler else None
        )
        self.window = LossWindow(parts, gather, group)
        self.known = torch.zeros(0, 2, batch, dtype=torch.float64)  # drawn before the last update

    def add(self, step: int, losses: Tensor) -> None:
        """Add the losses of a step on this rank. Every rank must call it.

        Args:
            step: number of steps taken, including this one.
            losses: (samples,) losses of this rank.
        """
        resampler = self.objective.resampler
        if resampler is None:
            return
        self.window.add(losses, torch.zeros((), device=losses.device))
        if step % resampler.update_interval == 0:
            self._learn(step)

    def _learn(self, step: int) -> None:
        resampler = self.objective.resampler
        assert resampler is not None
        assert self.learned is not None
        table = self.window.gathered()[:, 1:].double()
        # Times are keyed, so they are computed again instead of being stored with the losses.
        drawn = self._draw(range(step - len(table), step))
        times = self.process.schedule.training_times(drawn.times.flatten())
        losses = table.flatten() * drawn.oversampling.flatten()
        self.known = torch.cat((self.known, torch.stack(drawn, 1)))
        self.learned = resampler.update(self.learned, times, losses)
        self.window.restore(None)

    def _draw(self, steps: range) -> DrawnLevels:
        """The levels of steps since the last update."""
        index = torch.arange(self.batch)
        keys = [SampleKey(self.seed, step, index, self.batch) for step in steps]
        times = torch.stack([self.objective.times(key, self.learned) for key in keys])
        flat = self.process.schedule.training_times(times.flatten())
        oversampling = self.objective.oversampling(self.process, flat, self.learned)
        return DrawnLevels(times, oversampling.view_as(times))

    def levels(self, step: int, count: int) -> DrawnLevels:
        """The levels of the last steps, at most of those since `forget`.

        Args:
            step: number of steps taken.
            count: number of last steps, at least 1.

        Returns:
            The levels.
        """
        resampler = self.objective.resampler
        pending = step % resampler.update_interval if resampler else count
        times, oversampling = self.known.unbind(1)
        if pending:
            drawn = self._draw(range(step - pending, step))
            times = torch.cat((times, drawn.times))
            oversampling = torch.cat((oversampling, drawn.oversampling))
        return DrawnLevels(times[-count:], oversampling[-count:])

    def forget(self) -> None:
        """Forget the levels of the steps before the last update."""
        self.known = self.known[:0]

    def logsnr(self, key: SampleKey, step: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """λ of samples that were drawn at an earlier step.

        Args:
            key: key of the samples.
            step: number of steps taken.
            shape: shape of x_0 in the batch of the samples; None for that of the process.

        Returns:
            (B,) λ; NaN if the resampler was updated since they were drawn.
        """
        resampler = self.objective.resampler
        if resampler and key.step < step - step % resampler.update_interval:
            return torch.full(key.position.shape, torch.nan)
        schedule = self.objective.schedule(replace(self.process, shape=shape or self.process.shape))
        times = schedule.training_times(self.objective.times(key, self.learned))
        return schedule.logsnr(times).reshape(key.position.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores, by name. Every rank must call it.

        Returns:
            The losses since the last update, the levels before it that are not reported yet, and
            the state of the resampler; {} without a resampler.
        """
        if self.learned is None:
            return {}
        stored = {"window": self.window.gathered(), "known": self.known, **self.learned}
        return {PREFIX + name: value for name, value in stored.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned.

        Args:
            tensors: tensors of a checkpoint; those of this class are removed from it.
        """
        stored = {
            name.removeprefix(PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(PREFIX)
        }
        if stored:
            self.window.restore(stored.pop("window"))
            self.known = stored.pop("known")
            self.learned = stored
