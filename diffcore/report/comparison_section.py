"""The section of a report that shows the comparison of samplers of a run."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from diffcore.io.plain_data import read_json
from diffcore.report.charts import Curve, line_chart
from diffcore.report.page import Section, chart_grid, picture_slider, value_table
from diffcore.run import Run

__all__ = ["comparison_section"]

HEADER = ("guidance", "sampler", "evaluations", "steps", "distance", "interval", "seconds", "")
NUMBER = (int, float)


class _Row(NamedTuple):
    """A case of the comparison, see `describe_case`.

    Args:
        guidance: name of the rule.
        sampler: name of the sampler.
        evaluations: evaluations of the guided network, the name of the column.
        steps: number of steps.
        distance: distance to the flow, or None.
        interval: both ends of its interval, or None.
        seconds: seconds for each sample, or None.
        reason: why there is no distance.
    """

    guidance: str
    sampler: str
    evaluations: float
    steps: float
    distance: float | None
    interval: Sequence[float] | None
    seconds: float | None
    reason: str

    @property
    def cells(self) -> list[str]:
        """The cells of the table."""
        interval = "" if self.interval is None else "{:.2g} to {:.2g}".format(*self.interval)
        distance, seconds = (_number(value) for value in (self.distance, self.seconds))
        counts = [f"{self.evaluations:g}", f"{self.steps:g}"]
        return [self.guidance, self.sampler, *counts, distance, interval, seconds, self.reason]


def comparison_section(run: Run, weights: str) -> Section:
    """The charts, table and pictures of comparison.json.

    Args:
        run: folder of the run.
        weights: hash of its averaged weights; "": unknown.

    Returns:
        The section, without a body if there is no comparison.

    Raises:
        ValueError: comparison.json is not one that `diffcore compare` writes.
    """
    if not run.comparison.is_file():
        return Section("Samplers", "")
    record = read_json(run.comparison)
    rows = _read_rows(run.comparison, record)
    charts = {
        f"distance to the flow, {rule}": _chart(list(group))
        for rule, group in groupby(rows, key=lambda row: row.guidance)
    }
    pictures = {path.stem: path for path in sorted(run.comparison.parent.glob("*.png"))}
    body = chart_grid({title: svg for title, svg in charts.items() if svg})
    body += picture_slider(pictures) + value_table(HEADER, [row.cells for row in rows])
    note = (
        "Distance to the accurately solved flow from the same noise, root mean square per element; "
        "seconds for each sample."
    )
    if weights and record.get("weights") not in (None, weights):
        note += " Of other weights than those of the run now: compare again."
    return Section("Samplers", body, note)


def _chart(rows: Sequence[_Row]) -> str:
    """Distance over evaluations, a curve for each sampler that has distances; "" without any."""
    curves = {
        sampler: Curve([row.evaluations for row in group], [row.distance for row in group])
        for sampler, group in (
            (name, list(each)) for name, each in groupby(rows, key=lambda row: row.sampler)
        )
        if any(row.distance for row in group)
    }
    return line_chart("distance to the flow", curves, "evaluations", "log") if curves else ""


def _read_rows(path: Path, record: Mapping[str, Any]) -> list[_Row]:
    cases, seconds = record.get("cases"), record.get("seconds")
    if not isinstance(cases, list) or not isinstance(seconds, list) or len(cases) != len(seconds):
        raise ValueError(f"{path} has no cases with their seconds: run diffcore compare again")
    rows = []
    for number, (case, time) in enumerate(zip(cases, seconds, strict=True)):
        try:
            values = {name: case[name] for name in _Row._fields if name != "seconds"}
            row = _Row(**values, seconds=time["seconds_per_sample"])
            is_valid = isinstance(row.evaluations, NUMBER) and isinstance(row.steps, NUMBER)
            is_valid = is_valid and all(
                value is None or isinstance(value, NUMBER) for value in (row.distance, row.seconds)
            )
            is_valid = is_valid and len(row.cells) == len(HEADER)
        except (KeyError, TypeError, ValueError, IndexError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{path}: case {number} lacks a value, or has one of another type: run diffcore "
                "compare again"
            )
        rows.append(row)
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
