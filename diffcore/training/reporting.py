"""What a run says of itself: metrics every few steps, read from the device once each time, and what is not finite."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class NonFinite(NamedTuple):
    """A step whose loss or gradient was not finite, and the sample to look at.

    Args:
        step: the optimizer step.
        place: of the sample in the global batch; the first with a loss that is not finite, else the largest.
        loss: of that sample.
    """

    step: int
    place: int
    loss: float


class Window:
    """Losses (steps, B) and gradient norms (steps,) since the last report, kept on the device.

    Columns are the places in the global batch once gathered, whatever the ranks and the accumulation.
    """

    def __init__(self, parts: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.parts = parts
        self.gather = gather
        self.rows: list[Tensor] = []
        self.past: Tensor | None = None

    def add(self, losses: Tensor, norm: Tensor) -> None:
        """A step's losses, part after part of this rank, and its gradient norm."""
        self.rows.append(torch.cat((norm.detach().float().view(1), losses)))

    def gathered(self) -> Tensor:
        """(steps, 1 + B) on the host: the norm, then the losses by place. Every rank must call."""
        past = torch.zeros(0, 1) if self.past is None else self.past
        if not self.rows:
            return past
        rows = torch.stack(self.rows)
        everyone = self.gather(rows[None]).cpu()  # (world, steps, 1 + parts * micro)
        losses = everyone[:, :, 1:].unflatten(2, (self.parts, -1)).permute(1, 2, 0, 3).flatten(1)
        table = torch.cat((everyone[0, :, :1], losses), 1)
        return table if self.past is None else torch.cat((past, table))

    def restore(self, past: Tensor | None) -> None:
        """Begin with what an earlier process gathered."""
        self.rows, self.past = [], past if past is not None and len(past) else None


def non_finite(table: Tensor, first: int) -> list[NonFinite]:
    """The steps of a window whose loss or gradient is not finite; `first` is the window's first step."""
    found = []
    for offset, (norm, losses) in enumerate(zip(table[:, 0], table[:, 1:], strict=True)):
        if not (norm.isfinite() and losses.isfinite().all()):
            place = int(torch.where(losses.isfinite(), losses, torch.inf).argmax())
            found.append(NonFinite(first + offset, place, float(losses[place])))
    return found


class Metrics:
    """metrics.jsonl: a line a report. What depends on the machine's speed is not in it, so a resumed run writes the same."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reports(self) -> list[dict[str, float | None]]:
        """What was written, without a line that a crash tore."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return [report for line in lines if (report := _parsed(line)) is not None]

    def rewind(self, step: int) -> None:
        """Drop what was reported after `step`."""
        if self.path.is_file():
            lines = [
                json.dumps(report) for report in self.reports() if (report["step"] or 0) <= step
            ]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in lines))
            temporary.rename(self.path)

    def write(self, values: dict[str, float]) -> None:
        """Append a line."""
        plain = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON has no NaN
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")


def _parsed(line: str) -> dict[str, float | None] | None:
    try:
        report = json.loads(line)
    except ValueError:
        return None
    return report if isinstance(report, dict) and "step" in report else None
