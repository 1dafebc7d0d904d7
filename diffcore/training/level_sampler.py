"""What the objective's resampler learns during a run: the same on every rank, and part of the checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.objectives.level_sampling import Learned
from diffcore.objectives.objective import Objective, SampleKey
from diffcore.training.reporting import Window

PREFIX = "resampler."


class Adaptation:
    """Gathers the losses of every rank each `every` steps, and lets the resampler learn from them.

    Args:
        objective: whose resampler learns; without one nothing is kept.
        process: whose schedule the times are of.
        seed: of the run.
        batch: size of the global batch.
        parts: of the batch, one after the other on a rank.
        gather: over ranks.
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
        self.learned: Learned | None = objective.resampler.start() if objective.resampler else None
        self.window = Window(parts, gather)

    def add(self, step: int, losses: Tensor) -> None:
        """A step's losses on this rank; `step` steps have been taken with it. Every rank must call."""
        resampler = self.objective.resampler
        if resampler is None:
            return
        self.window.add(losses, torch.zeros((), device=losses.device))
        if step % resampler.every == 0:
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
        """λ of the one sample at `place`, as far as it is known after `step` steps: what drew it may have learned since."""
        resampler = self.objective.resampler
        if resampler and place.step < step - step % resampler.every:
            return "one forgotten since"
        times = self.process.schedule.training_times(self.objective.times(place, self.learned))
        return f"{float(self.process.schedule.logsnr(times)):.3f}"

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it. Every rank must call."""
        if self.learned is None:
            return {}
        kept = {"window": self.window.gathered(), **self.learned}
        return {PREFIX + name: value for name, value in kept.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back from a checkpoint's tensors what `tensors` gave, and leave the others."""
        own = {
            name.removeprefix(PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(PREFIX)
        }
        if own:
            self.window.restore(own.pop("window"))
            self.learned = own
