"""Reports of a run: metrics every few steps, previews, and steps that are not finite.

Losses stay on the device and are read once for each report.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcore.core.denoiser import Denoiser
from diffcore.sampling import images
from diffcore.sampling.generation import sample
from diffcore.training.checkpoints.checkpoint import name as checkpoint_name
from diffcore.training.further_networks import SCALARS as FURTHER_SCALARS
from diffcore.training.reports.metrics import Metrics
from diffcore.training.reports.noise_scale import mean_noise
from diffcore.training.reports.previews import preview
from diffcore.training.reports.tracking import Trackers
from diffcore.training.reports.usage import Usage
from diffcore.training.reports.validation import level_bounds, mean_by_level
from diffcore.training.reports.window import NonFinite, find_non_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffcore.training.reports.validation import Measurement
    from diffcore.training.state import TrainState
    from diffcore.training.trainer import Trainer

__all__ = ["SCALARS", "Reporter"]

SCALARS = 3
"""Columns of the window before the losses: gradient norm, variance and square of `noise_scale`."""


class Reporter:
    """Writes the reports of a run: metrics, tracker, progress bar, previews and messages.

    Args:
        settings: settings of the run.
        accelerator: accelerator of this rank; only the first rank writes.
    """

    def __init__(self, settings: "Trainer", accelerator: "Accelerator") -> None:
        self.settings, self.accelerator = settings, accelerator
        self.metrics = Metrics(settings.run.metrics)
        self.validation = Metrics(settings.run.validation)
        self.non_finite = Metrics(settings.run.non_finite)
        self.usage, self.speed = Usage(accelerator), Metrics(settings.run.speed)
        self.trackers = Trackers(settings, accelerator)
        self.bar: Any = None

    @cached_property
    def prompt_wrapper(self) -> Callable[[nn.Module], nn.Module] | None:
        """Wraps a network so that its labels are the prompts of previews; None without prompts.

        The first access encodes the prompts. Only the first rank needs it.
        """
        settings = self.settings
        previews = settings.previews
        if not settings.sample_every or not previews.prompts:
            return None
        return settings.source.prompt_wrapper(
            previews.prompts, previews.negative, self.accelerator.device
        )

    def describe_devices(self) -> None:
        """Print on how many ranks, on which device and in which precision the run trains."""
        ranks, device = self.accelerator.num_processes, self.accelerator.device.type
        self.message(
            f"training on {ranks} rank{'s' if ranks > 1 else ''}, device {device}, precision "
            f"{self.accelerator.mixed_precision}"
        )

    @contextmanager
    def progress(self, state: "TrainState") -> Iterator[None]:
        """Context with a progress bar of samples.

        Args:
            state: state of the run; the bar begins at its step.

        Yields:
            Nothing; `count` advances the bar.
        """
        batch = self.settings.batch_size
        with tqdm(
            total=self.settings.steps * batch,
            initial=state.step * batch,
            unit="img",
            unit_scale=True,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5,
        ) as self.bar:
            self.usage.restart()
            yield

    def count(self, samples: int) -> None:
        """Advance the progress bar by a number of samples."""
        self.bar.update(samples)
        self.usage.count(samples)

    def message(self, text: str) -> None:
        """Print a line on stderr, on the first rank."""
        self.accelerator.print(f"diffcore: {text}", file=sys.stderr)

    def report(self, state: "TrainState") -> None:
        """Write the metrics of the window, empty it, and check that the run is finite.

        Raises:
            ValueError: `patience` steps in a row were not finite.
        """
        values, by_level = self._values(state)
        speed = self.usage.read()
        shown = {name: f"{values[f'loss/{name}']:.4f}" for name in state.further}
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", **shown, refresh=False)
        levels = {f"loss/level {bin_}": loss for bin_, loss in enumerate(by_level)}
        self.trackers.log({**values, **levels, **speed}, state.step)
        if self.accelerator.is_main_process:
            schedule = self.settings.objective.schedule(self.settings.process)
            bounds = level_bounds(schedule, self.settings.validation.bins)
            lists = {"logsnr": bounds, "loss_by_level": by_level}
            self.metrics.write({"step": state.step, **values, **lists})
            self.speed.write({"step": state.step, **speed})
        self.check_finite(state)
        state.window.restore(None)
        state.level_sampler.forget()

    def _values(self, state: "TrainState") -> tuple[dict[str, float], list[float]]:
        """The numbers of a report, and the loss of each interval of levels."""
        settings, table = self.settings, state.window.gathered()
        losses = table[:, state.window.scalars :]
        values = {
            "loss": float(losses.double().mean()),
            "grad_norm": float(table[:, 0].double().mean()),
            "lr": settings.lr(state.step - 1, settings.steps),
            "skipped": len(find_non_finite(_all_norms(state, table), losses, 0)),
        }
        for name, columns in _further_columns(state).items():
            values[f"loss/{name}"], values[f"grad_norm/{name}"] = (
                table[:, columns].double().mean(0).tolist()
            )
            values[f"lr/{name}"] = state.further[name].lr(state.step - 1, settings.steps)
        if noise := mean_noise(table[:, 1:SCALARS]):
            values["noise_scale"] = noise.scale
            values["grad_variance"] = float(noise.variance)
            values["grad_square"] = float(noise.square)
        levels = state.level_sampler.levels(state.step, len(table))
        bins = settings.validation.bins
        return values, mean_by_level(losses, levels.times, bins, levels.oversampling)

    def report_validation(self, state: "TrainState", found: "Measurement") -> None:
        """Write the losses on held-out data.

        Args:
            state: state of the run.
            found: the losses.
        """
        values = {"loss": found.averaged.loss, "loss_current": found.current.loss}
        levels = {f"level {bin_}": loss for bin_, loss in enumerate(found.averaged.by_level)}
        tracked = {f"validation/{name}": value for name, value in (values | levels).items()}
        self.trackers.log(tracked, state.step)
        if self.accelerator.is_main_process:
            lists = {"logsnr": found.logsnr, "loss_by_level": found.averaged.by_level}
            self.validation.write({"step": state.step, **values, **lists})
        self.message(f"step {state.step}: loss {values['loss']:.4f} on the held-out data")

    def check_finite(self, state: "TrainState") -> None:
        """Print which of the steps since the last check were not finite. Every rank must call it.

        Args:
            state: state of the run.

        Raises:
            ValueError: `patience` steps in a row were not finite.
        """
        first, state.checked = state.checked, state.step
        if first == state.step:
            return
        table = state.window.gathered()[first - state.step :]
        norms, losses = table[:, 0], table[:, state.window.scalars :]
        bad = find_non_finite(_all_norms(state, table), losses, first)
        if not bad:
            state.non_finite_steps = 0
            return
        where = _describe(state, bad[0], table[bad[0].step - first])
        if self.accelerator.is_main_process:
            for found in bad:
                row = found.step - first
                self.non_finite.write(_samples(state, found.step, norms[row], losses[row]))
        self.message(
            f"{len(bad)} of the last {len(table)} steps were not finite and were skipped: {where}"
        )
        longest, is_searching = state.non_finite_steps, state.is_searching_scale
        has_faults = ~(losses.isfinite().all(1) & _further_losses(state, table).isfinite().all(1))
        faults = {f.step for f in bad if not is_searching or has_faults[f.step - first]}
        for step in range(first, state.step):
            state.non_finite_steps = state.non_finite_steps + 1 if step in faults else 0
            longest = max(longest, state.non_finite_steps)
        if longest >= self.settings.patience:
            raise ValueError(
                f"{longest} steps in a row were not finite (patience is {self.settings.patience}): "
                f"{where}; {self.settings.run.non_finite} has all samples; check the data, lower "
                "lr.peak, or use precision no"
            )

    def draw_preview(self, state: "TrainState") -> None:
        """Write a grid of samples of the averaged network. Every rank must call it."""
        settings, averaged = self.settings, state.gathered_average()
        if not self.accelerator.is_main_process:
            return
        draw = partial(
            sample,
            sampler=settings.sampler,
            grid=settings.grid,
            steps=settings.sample_steps,
            guidance=settings.guidance,
        )
        previews, source = settings.previews, settings.source
        shown = previews.samples(source, settings.process, settings.picture)
        wrapper = self.prompt_wrapper or state.label_wrapper
        with state.averaged_network(averaged) as network:
            denoiser = Denoiser(wrapper(network), previews.process(settings.process))
            image = preview(denoiser, source, shown, draw, settings.picture)
        images.save_image(image, settings.run.samples / f"{checkpoint_name(state.step)}.png")
        self.trackers.log_image("samples", image, state.step)


def _further_columns(state: "TrainState") -> dict[str, slice]:
    """Columns of the window with the loss and the gradient norm of each further network."""
    starts = range(SCALARS, state.window.scalars, FURTHER_SCALARS)
    return {
        name: slice(start, start + FURTHER_SCALARS)
        for name, start in zip(state.further, starts, strict=True)
    }


def _further_losses(state: "TrainState", table: Tensor) -> Tensor:
    """Losses (steps, networks) of the further networks."""
    return table[:, SCALARS : state.window.scalars : FURTHER_SCALARS]


def _all_norms(state: "TrainState", table: Tensor) -> Tensor:
    """Gradient norms (steps,); NaN if the loss or the norm of a further network is not finite."""
    further = table[:, SCALARS : state.window.scalars]
    return table[:, 0].where(further.isfinite().all(1), torch.nan)


def _describe(state: "TrainState", found: NonFinite, row: Tensor) -> str:
    """Step, sample, level and loss of a step that was not finite, or the further network."""
    for name, columns in _further_columns(state).items():
        loss, norm = row[columns].tolist()
        if not math.isfinite(loss + norm):
            return f"step {found.step}, network {name}: loss {loss:g}, gradient norm {norm:g}"
    key = state.sample_key(found.step, torch.tensor([found.batch_index]))
    shape = state.order.shape(found.step)
    logsnr = float(state.level_sampler.logsnr(key, state.step, shape))
    level = "unknown (the level sampler has been updated since)"
    level = level if math.isnan(logsnr) else f"{logsnr:.3f}"
    index = state.order.index(int(key.position))
    return f"step {found.step}, sample {index} of the data at λ = {level}, loss {found.loss}"


def _samples(
    state: "TrainState", step: int, norm: Tensor, losses: Tensor
) -> dict[str, float | list[float]]:
    """The report of a step that was not finite: the index, λ and loss of each of its samples."""
    key = state.sample_key(step, torch.arange(len(losses)))
    return {
        "step": step,
        "grad_norm": float(norm),
        "sample": [state.order.index(position) for position in key.position.tolist()],
        "logsnr": state.level_sampler.logsnr(key, state.step, state.order.shape(step)).tolist(),
        "loss": losses.tolist(),
    }
