"""Reports of a run: metrics every few steps, previews, and steps that are not finite.

Losses stay on the device and are read once for each report.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.core.denoiser import Denoiser
from diffcore.io.files import WriteError, write_file
from diffcore.io.plain_data import read_text
from diffcore.sampling import images
from diffcore.sampling.generation import sample
from diffcore.training.checkpoints.checkpoint import name as checkpoint_name
from diffcore.training.reports.previews import preview

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffcore.training.reports.validation import Measurement
    from diffcore.training.state import TrainState
    from diffcore.training.trainer import Trainer

__all__ = ["LossWindow", "Metrics", "NonFinite", "Reporter", "find_non_finite"]


class NonFinite(NamedTuple):
    """A step whose loss or gradient was not finite, and one of its samples.

    Args:
        step: optimizer step.
        batch_index: index of the sample in the global batch: the first with a loss that is not
            finite, else the one with the largest loss.
        loss: loss of that sample.
    """

    step: int
    batch_index: int
    loss: float


class LossWindow:
    """Losses and gradient norms since the last report, kept on the device.

    Args:
        parts: number of micro-batches of a rank in a step.
        gather: gathers a tensor (1, ...) of each rank to (ranks, ...).
    """

    def __init__(self, parts: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.parts = parts
        self.gather = gather
        self.rows: list[Tensor] = []
        self.past: Tensor | None = None

    def add(self, losses: Tensor, norm: Tensor) -> None:
        """Append a step.

        Args:
            losses: (samples,) losses of this rank, micro-batch after micro-batch.
            norm: () gradient norm.
        """
        self.rows.append(torch.cat((norm.detach().float().view(1), losses)))

    def gathered(self) -> Tensor:
        """The steps of the window, of all ranks. Every rank must call it.

        Returns:
            (steps, 1 + B) on the host: the norm, then the losses in the order of the global batch.
        """
        past = torch.zeros(0, 1) if self.past is None else self.past
        if not self.rows:
            return past
        rows = torch.stack(self.rows)
        ranks = self.gather(rows[None]).cpu()  # (ranks, steps, 1 + parts * micro)
        losses = ranks[:, :, 1:].unflatten(2, (self.parts, -1)).permute(1, 2, 0, 3).flatten(1)
        table = torch.cat((ranks[0, :, :1], losses), 1)
        self.past = table if self.past is None else torch.cat((past, table))
        self.rows = []
        return self.past

    def restore(self, past: Tensor | None) -> None:
        """Empty the window, and start with the steps that `gathered` returned earlier, if any."""
        self.rows, self.past = [], past if past is not None and len(past) else None


def find_non_finite(table: Tensor, first: int) -> list[NonFinite]:
    """The steps of a window whose loss or gradient is not finite.

    Args:
        table: (steps, 1 + B) as `LossWindow.gathered` returns it.
        first: step of the first row.

    Returns:
        One entry for each such step, in order.
    """
    found = []
    for offset, (norm, losses) in enumerate(zip(table[:, 0], table[:, 1:], strict=True)):
        if not (norm.isfinite() and losses.isfinite().all()):
            index = int(torch.where(losses.isfinite(), losses, torch.inf).argmax())
            found.append(NonFinite(first + offset, index, float(losses[index])))
    return found


class Metrics:
    """The file metrics.jsonl: one line of JSON for each report.

    It holds nothing that depends on the speed of the machine, so that a resumed run writes the
    same bytes.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def reports(self) -> list[dict[str, Any]]:
        """The reports in the file, without a line that a crash cut short.

        Returns:
            One dictionary for each line.
        """
        return [report for report in map(_parsed, self._lines()) if report is not None]

    def complete_reports(self, numbers: Sequence[str], lists: Sequence[str] = ()) -> list[Any]:
        """The reports in the file, each with all entries that its reader needs.

        Args:
            numbers: entries that are numbers or null.
            lists: entries that are lists of them.

        Returns:
            One dictionary for each line that is a report.

        Raises:
            ValueError: An entry is missing or of another type; the message has file and line.
        """
        reports = [(number, _parsed(line)) for number, line in enumerate(self._lines(), 1)]
        for number, report in reports:
            if report is None:
                continue
            wrong = [name for name in ("step", *numbers) if not _is_number(report.get(name, ""))]
            wrong += [
                name
                for name in lists
                if not isinstance(report.get(name), list) or not all(map(_is_number, report[name]))
            ]
            if wrong or report["step"] is None:
                raise ValueError(
                    f"{self.path}: line {number} has no {wrong[0] if wrong else 'step'}, or one "
                    "that is no number: restore or remove the line"
                )
        return [report for _, report in reports if report is not None]

    def rewind(self, step: int) -> list[int]:
        """Remove the reports after `step`.

        Args:
            step: last step whose report is kept.

        Returns:
            Numbers of the lines that were removed because they are no reports, without the last
            line, which a crash may have cut short.
        """
        if not self.path.is_file():
            return []
        reports = [_parsed(line) for line in self._lines()]
        kept = [report for report in reports if report and (report["step"] or 0) <= step]
        write_file(self.path, "".join(f"{json.dumps(report)}\n" for report in kept).encode())
        return [number for number, report in enumerate(reports[:-1], 1) if report is None]

    def write(self, values: Mapping[str, float | list[float]]) -> None:
        """Append a report; a value that is not finite becomes null, because JSON has no NaN.

        Args:
            values: numbers and lists of numbers by their name.

        Raises:
            WriteError: The file cannot be written.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise WriteError(
                f"{self.path} cannot be written ({error.strerror}): its lines and the checkpoints "
                "are kept; make room on the disk, then continue with --resume true"
            ) from None

    def _lines(self) -> list[str]:
        return read_text(self.path, 1 << 30).splitlines() if self.path.is_file() else []


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
        self.bar: Any = None

    def start_trackers(self, step: int) -> None:
        """Start the trackers of the settings, if any.

        Args:
            step: number of steps taken; TensorBoard discards what an interrupted run wrote after.
        """
        options = {"tensorboard": {"purge_step": step + 1}} if step else {}
        if self.settings.trackers:
            self.accelerator.init_trackers("tensorboard", init_kwargs=options)

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
            yield

    def count(self, samples: int) -> None:
        """Advance the progress bar by a number of samples."""
        self.bar.update(samples)

    def message(self, text: str) -> None:
        """Print a line on stderr, on the first rank."""
        self.accelerator.print(f"diffcore: {text}", file=sys.stderr)

    def report(self, state: "TrainState") -> None:
        """Write the metrics of the window, empty it, and check that the run is finite.

        Raises:
            ValueError: `patience` steps in a row were not finite.
        """
        table = state.window.gathered()
        values = {
            "step": state.step,
            "loss": float(table[:, 1:].double().mean()),
            "grad_norm": float(table[:, 0].double().mean()),
            "lr": self.settings.lr(state.step - 1, self.settings.steps),
            "skipped": len(find_non_finite(table, 0)),
        }
        rate = self.bar.format_dict["rate"] or 0.0
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.accelerator.log({**values, "images_per_second": rate}, step=state.step)
        if self.accelerator.is_main_process:
            self.metrics.write(values)
        self.check_finite(state)
        state.window.restore(None)

    def report_validation(self, state: "TrainState", found: "Measurement") -> None:
        """Write the losses on held-out data.

        Args:
            state: state of the run.
            found: the losses.
        """
        values = {"loss": found.averaged.loss, "loss_current": found.current.loss}
        levels = {f"level {bin_}": loss for bin_, loss in enumerate(found.averaged.by_level)}
        tracked = {f"validation/{name}": value for name, value in (values | levels).items()}
        self.accelerator.log(tracked, step=state.step)
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
        bad = find_non_finite(table, first)
        if not bad:
            state.non_finite_steps = 0
            return
        where = _describe(state, bad[0])
        if self.accelerator.is_main_process:
            for found in bad:
                self.non_finite.write(_samples(state, found.step, table[found.step - first]))
        self.message(
            f"{len(bad)} of the last {len(table)} steps were not finite and were skipped: {where}"
        )
        longest, steps = state.non_finite_steps, {found.step for found in bad}
        for step in range(first, state.step):
            state.non_finite_steps = state.non_finite_steps + 1 if step in steps else 0
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
        with state.averaged_network(averaged) as network:
            denoiser = Denoiser(state.label_wrapper(network), settings.process)
            image = preview(denoiser, settings.source, draw, settings.picture)
        images.save_image(image, settings.run.samples / f"{checkpoint_name(state.step)}.png")


def _describe(state: "TrainState", found: NonFinite) -> str:
    """Step, sample, level and loss of a step that was not finite."""
    key = state.sample_key(found.step, torch.tensor([found.batch_index]))
    shape = state.order.shape(found.step)
    logsnr = float(state.level_sampler.logsnr(key, state.step, shape))
    level = "unknown (the level sampler has been updated since)"
    level = level if math.isnan(logsnr) else f"{logsnr:.3f}"
    index = state.order.index(int(key.position))
    return f"step {found.step}, sample {index} of the data at λ = {level}, loss {found.loss}"


def _samples(state: "TrainState", step: int, row: Tensor) -> dict[str, float | list[float]]:
    """The report of a step that was not finite: the index, λ and loss of each of its samples."""
    key = state.sample_key(step, torch.arange(len(row) - 1))
    return {
        "step": step,
        "grad_norm": float(row[0]),
        "sample": [state.order.index(position) for position in key.position.tolist()],
        "logsnr": state.level_sampler.logsnr(key, state.step, state.order.shape(step)).tolist(),
        "loss": row[1:].tolist(),
    }


def _plain(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    """Whether a value is a number or null."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_report = isinstance(report, dict) and isinstance(report.get("step", ""), int | None)
    return report if is_report else None
