"""The adaptive distribution of the training levels: it updates the objective's resampler."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.objective import Objective, SampleKey
from diffcore.training.reports.reporting import LossWindow

__all__ = ["LevelSampler"]

PREFIX = "resampler."
"""Prefix of its tensors in a checkpoint."""


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
    """

    def __init__(
        self,
        objective: Objective,
        process: Process,
        seed: int,
        batch: int,
        parts: int,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        self.objective, self.process, self.seed, self.batch = objective, process, seed, batch
        self.learned: ResamplerState | None = (
            objective.resampler.initial_state() if objective.resampler else None
        )
        self.window = LossWindow(parts, gather)

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
        table = self.window.gathered()[:, 1:].double()
        index = torch.arange(self.batch)
        keys = [
            SampleKey(self.seed, past, index, self.batch) for past in range(step - len(table), step)
        ]
        # Times are keyed, so they are computed again instead of being stored with the losses.
        uniform = torch.cat([self.objective.times(key, self.learned) for key in keys])
        times = self.process.schedule.training_times(uniform)
        losses = table.flatten() * self.objective.oversampling(self.process, times, self.learned)
        assert self.objective.resampler is not None
        assert self.learned is not None
        self.learned = self.objective.resampler.update(self.learned, times, losses)
        self.window.restore(None)

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
            The losses since the last update and the state of the resampler; {} without a resampler.
        """
        if self.learned is None:
            return {}
        stored = {"window": self.window.gathered(), **self.learned}
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
            self.learned = stored
