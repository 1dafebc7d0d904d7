"""The sampler of training levels in a run: what the objective's resampler has learned from the
losses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.objective import Objective, SampleKey
from diffcore.training.reporting import LossWindow

PREFIX = "resampler."


class LevelSampler:
    """The distribution of the training levels of a run, the same on every rank.

    With a resampler, it gathers the losses of all ranks every few steps and updates the resampler.
    Without one, it does nothing.

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
            losses: losses of this rank.
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
        places = [
            SampleKey(self.seed, past, index, self.batch) for past in range(step - len(table), step)
        ]
        times = torch.cat([self.objective.times(place, self.learned) for place in places])
        drawn = self.process.schedule.training_times(times)
        losses = table.flatten() * self.objective.oversampling(self.process, drawn, self.learned)
        assert self.objective.resampler is not None
        assert self.learned is not None
        self.learned = self.objective.resampler.update(self.learned, drawn, losses)
        self.window.restore(None)

    def describe(self, place: SampleKey, step: int) -> str:
        """λ of one sample as text; unknown if the resampler was updated since it was drawn.

        Args:
            place: key of the sample.
            step: number of steps taken.

        Returns:
            λ with three decimals, or a phrase that says why it is unknown.
        """
        resampler = self.objective.resampler
        if resampler and place.step < step - step % resampler.update_interval:
            return "unknown (the level sampler has been updated since)"
        times = self.process.schedule.training_times(self.objective.times(place, self.learned))
        return f"{float(self.process.schedule.logsnr(times)):.3f}"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores; empty without a resampler. Every rank must call it."""
        if self.learned is None:
            return {}
        kept = {"window": self.window.gathered(), **self.learned}
        return {PREFIX + name: value for name, value in kept.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned, and remove it from a checkpoint's tensors."""
        own = {
            name.removeprefix(PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(PREFIX)
        }
        if own:
            self.window.restore(own.pop("window"))
            self.learned = own
