"""The error of samplers over network evaluations, from the table that `make bench` writes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcore.report.figures import create_figure, line_styles, save_figure

__all__ = ["ErrorCurves", "draw_errors", "plot_errors", "read_summary"]

ErrorCurves = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Problem -> name of a line -> network evaluations -> error."""
LINES = {"closest of ours": 3, "default": 6, "closest of diffusers": 5}
"""Name of a line -> column of its error in the table."""
MARKERS = "os^"
TITLES = {"mixture": "mixture, 2 dimensions", "64-D": "mixture, 64 dimensions"}
SHARES = ("digits",)
"""Problems whose error is a share of samples that end at another image than the exact flow."""


def read_summary(page: str) -> ErrorCurves:
    """Read the table "accuracy" of a page.

    Args:
        page: text of docs/benchmarks.md.

    Returns:
        The curves of the table.

    Raises:
        ValueError: the page has no such table.
    """
    block = re.search(r"<!-- benchmark accuracy -->(.*?)<!-- end -->", page, re.DOTALL)
    if block is None:
        raise ValueError("the page has no block `<!-- benchmark accuracy -->`")
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for line in block[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > max(LINES.values()) and cells[1].isdigit():
            for name, column in LINES.items():
                points = curves.setdefault(cells[0], {}).setdefault(name, {})
                points[int(cells[1])] = _number(cells[column])
    return curves


def _number(cell: str) -> float:
    """The error of a cell: `0.0031`, or the share in `3.1% (0.2)`."""
    first = cell.split()[0]
    return float(first.rstrip("%")) / (100 if first.endswith("%") else 1)


def draw_errors(curves: ErrorCurves, path: Path) -> None:
    """Draw a panel for each problem.

    Args:
        curves: errors by problem, line and evaluations.
        path: image to write.
    """
    figure, axes = create_figure(len(curves), width=4, height=3.6)
    for axis, oracle in zip(axes, curves, strict=True):
        plot_errors(axis, curves[oracle], TITLES.get(oracle, oracle), oracle in SHARES)
    save_figure(figure, path)


def plot_errors(
    axis: Any, lines: Mapping[str, Mapping[int, float]], title: str, is_share: bool = False
) -> None:
    """Draw the errors of one problem over evaluations.

    Args:
        axis: axes of matplotlib.
        lines: name of a line -> evaluations -> error.
        title: title of the axes.
        is_share: whether the errors are shares, which may be 0.
    """
    for (name, points), style, marker in zip(
        lines.items(), line_styles(len(lines)), MARKERS, strict=False
    ):
        axis.plot(list(points), list(points.values()), label=name, marker=marker, **style)
    counts = sorted({count for points in lines.values() for count in points})
    axis.set(title=title, xlabel="network evaluations", xscale="log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    if is_share:
        axis.set_ylabel("share that ends at another image")
        axis.set_yscale("symlog", linthresh=0.005)
        axis.set_ylim(0, 1.3 * max(max(points.values()) for points in lines.values()))
    else:
        axis.set_ylabel("distance to the exact flow's end")
        axis.set_yscale("log")
