"""Tables and picture of the measurements of `benchmarks.accuracy`."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean

from pictures.accuracy import draw_errors

from benchmarks.accuracy import Measurement
from benchmarks.sides.samplers import GRIDS
from benchmarks.table import markdown_table
from diffcore.io.specs import describe_component
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER

TITLES = {
    "mixture": "Mixture of three Gaussians in two dimensions",
    "64-D": "Mixture of six Gaussians in 64 dimensions",
    "digits": "Closed-form denoiser of the digits",
}
"""Name of a problem -> heading of its table."""
ROUNDING = 1e-12
"""A distance that consists of rounding errors."""


def default_name() -> str:
    """Find the name of the default sampler and grid of `sample` in the measurements.

    Returns:
        The name.
    """
    grids = {grid: name for name, (grid, _) in GRIDS.items()}
    return f"{describe_component(DEFAULT_SAMPLER)}, {grids[DEFAULT_GRID]}"


def group_cells(measurements: Iterable[Measurement]) -> dict[tuple[str, int], list[Measurement]]:
    """Group measurements by problem and evaluations.

    Args:
        measurements: measurements of all sides.

    Returns:
        The measurements with finite errors, by (oracle, count).
    """
    cells: dict[tuple[str, int], list[Measurement]] = {}
    for measurement in measurements:
        if math.isfinite(measurement.median):
            cells.setdefault((measurement.oracle, measurement.count), []).append(measurement)
    return cells


def find_best(measurements: Iterable[Measurement], side: str) -> Measurement:
    """Find the smallest error of a side; among equal flips, the smallest median distance.

    Args:
        measurements: measurements of one cell.
        side: ours or diffusers.

    Returns:
        The best measurement.
    """
    candidates = (measurement for measurement in measurements if measurement.side == side)
    return min(candidates, key=lambda measurement: (measurement.error, measurement.median))


def error_ratio(measurement: Measurement, other: Measurement, starts: int) -> float:
    """Divide two errors, to which the resolution is added: one start for flips, rounding otherwise.

    Args:
        measurement: numerator.
        other: denominator.
        starts: number of starts.

    Returns:
        The ratio.
    """
    resolution = ROUNDING if measurement.flips is None else 1 / starts
    return (measurement.error + resolution) / (other.error + resolution)


def format_summary(measurements: Sequence[Measurement], default: str, starts: int) -> str:
    """Format the best of ours, the best of diffusers and the default for each problem and count.

    Args:
        measurements: measurements of both sides.
        default: name of the default sampler and grid.
        starts: number of starts.

    Returns:
        The table as Markdown.
    """
    header = ["oracle", "evaluations", "closest of ours", "error", "closest of diffusers"]
    header += ["error", "default", "over our closest"]
    rows = []
    for (oracle, count), cell in group_cells(measurements).items():
        ours, theirs = find_best(cell, "ours"), find_best(cell, "diffusers")
        mine = _find_named(cell, default)
        row = [oracle, str(count), ours.name, format_error(ours), theirs.name]
        row += [format_error(theirs), format_error(mine), f"{error_ratio(mine, ours, starts):.2f}"]
        rows.append(row)
    return markdown_table(header, rows)


def format_error(measurement: Measurement) -> str:
    """Format an error: the median distance, or the share of flips with the distance.

    Args:
        measurement: a measurement.

    Returns:
        The text of a cell.
    """
    if measurement.flips is None:
        return f"{measurement.median:.2g}"
    return f"{measurement.flips:.1%} ({measurement.median:.2g})"


def format_methods(measurements: Sequence[Measurement], oracle: str) -> str:
    """Format the errors of each sampler with its best grid over all counts.

    Args:
        measurements: measurements of both sides.
        oracle: name of the problem.

    Returns:
        The table as Markdown, with a column for each count.
    """
    selected = [measurement for measurement in measurements if measurement.oracle == oracle]
    counts = sorted({measurement.count for measurement in selected})
    rows = []
    for (side, method), group in groupby(selected, key=lambda it: (it.side, it.method)):
        grids: dict[str, dict[int, Measurement]] = {}
        for measurement in group:
            grids.setdefault(measurement.grid, {})[measurement.count] = measurement
        grid, errors = min(grids.items(), key=lambda item: _typical_error(item[1].values()))
        cells = [format_error(errors[count]) if count in errors else "" for count in counts]
        rows.append([side, method, grid, *cells])
    return markdown_table(["side", "sampler", "grid", *map(str, counts)], rows)


def _typical_error(measurements: Iterable[Measurement]) -> float:
    """The geometric mean of the errors, infinite if one of them is not finite."""
    errors = [it.error if math.isfinite(it.median) else math.inf for it in measurements]
    if not math.isfinite(sum(errors)):
        return math.inf
    return geometric_mean([error + 1e-6 for error in errors])


def format_peers(measurements: Sequence[Measurement], default: str, sides: Sequence[str]) -> str:
    """Format the closest of further sides beside the default and the closest of ours.

    Args:
        measurements: measurements of all sides.
        default: name of the default sampler and grid.
        sides: names of the further sides.

    Returns:
        The table as Markdown.
    """
    header = ["oracle", "evaluations", "default", "closest of ours"]
    header += [column for side in sides for column in (f"closest of {side}", "error")]
    rows = []
    for (oracle, count), cell in group_cells(measurements).items():
        row = [
            oracle,
            str(count),
            *map(format_error, (_find_named(cell, default), find_best(cell, "ours"))),
        ]
        for side in sides:
            if any(measurement.side == side for measurement in cell):
                best = find_best(cell, side)
                row += [best.name, format_error(best)]
            else:
                row += ["", ""]
        rows.append(row)
    return markdown_table(header, rows)


def format_all(measurements: Sequence[Measurement], starts: int) -> str:
    """Format all samplers with their best grids, and the ranking of combinations.

    Args:
        measurements: measurements of all sides.
        starts: number of starts of the digits.

    Returns:
        Markdown, with a heading for each problem.
    """
    oracles = dict.fromkeys(measurement.oracle for measurement in measurements)
    parts = [
        f"## {TITLES.get(name, name)}\n\n{format_methods(measurements, name)}" for name in oracles
    ]
    ranking = rank_combinations(measurements, starts)[:20]
    rows = [[f"{mean:.2f}", f"{maximum:.2f}", name] for mean, maximum, name in ranking]
    header = ["over our closest: geometric mean", "maximum", "sampler and grid"]
    return "\n\n".join([*parts, "## Combinations over all problems", markdown_table(header, rows)])


def default_errors(
    measurements: Sequence[Measurement], default: str, starts: int
) -> list[tuple[str, int, float]]:
    """The errors of the default, for a comparison with a later run.

    Args:
        measurements: measurements of all sides.
        default: name of the default sampler and grid.
        starts: number of starts of the digits, whose resolution is added to a share of flips.

    Returns:
        (oracle, evaluations, error) of each cell.
    """
    found = []
    for (oracle, count), cell in group_cells(measurements).items():
        mine = _find_named(cell, default)
        found.append((oracle, count, mine.error + (0 if mine.flips is None else 1 / starts)))
    return found


def rank_combinations(
    measurements: Sequence[Measurement], starts: int, side: str = "ours"
) -> list[tuple[float, float, str]]:
    """Rank combinations of sampler and grid by their errors over the best of ours in all cells.

    Args:
        measurements: measurements of both sides.
        starts: number of starts.
        side: ours or diffusers.

    Returns:
        (geometric mean, maximum, name) of the ratios of each combination that all cells contain,
        best first.
    """
    ratios: dict[str, list[float]] = {}
    cells = group_cells(measurements)
    for cell in cells.values():
        closest = find_best(cell, "ours")
        for measurement in cell:
            if measurement.side == side:
                ratio = error_ratio(measurement, closest, starts)
                ratios.setdefault(measurement.name, []).append(ratio)
    complete = {name: each for name, each in ratios.items() if len(each) == len(cells)}
    return sorted((geometric_mean(each), max(each), name) for name, each in complete.items())


def draw(measurements: Sequence[Measurement], default: str, path: Path) -> None:
    """Draw the error over evaluations: the best of each side, and the default.

    Args:
        measurements: measurements of both sides.
        default: name of the default sampler and grid.
        path: image to write.
    """
    lines: dict[str, Callable[[list[Measurement]], Measurement]] = {
        "closest of ours": lambda cell: find_best(cell, "ours"),
        "default": lambda cell: _find_named(cell, default),
        "closest of diffusers": lambda cell: find_best(cell, "diffusers"),
    }
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for (oracle, count), cell in group_cells(measurements).items():
        for name, select in lines.items():
            points = curves.setdefault(oracle, {}).setdefault(name, {})
            points[count] = select(cell).error
    draw_errors(curves, path)


def _find_named(measurements: Iterable[Measurement], name: str) -> Measurement:
    return next(measurement for measurement in measurements if measurement.name == name)
