"""Tables and the picture of what `benchmarks.accuracy` measured."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean

from benchmarks.accuracy import GRIDS, Row
from diffcore.sampling.generation import GRID, SAMPLER

STEADY = 1e-12
"""A distance that is only rounding."""


def default_name() -> str:
    """Sampler and grid that `sample` takes unless told otherwise, as the measurements name them."""
    return f"{SAMPLER}, {next(name for name, (grid, _) in GRIDS.items() if grid == GRID)}"


def cells(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each oracle and count whose error is a number."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if math.isfinite(row.median):
            found.setdefault((row.oracle, row.count), []).append(row)
    return found


def best(rows: Iterable[Row], side: str) -> Row:
    """The closest of a side; among as many flips, the one of the smaller median."""
    return min((row for row in rows if row.side == side), key=lambda row: (row.error, row.median))


def ratio(row: Row, other: Row, starts: int) -> float:
    """Error over error, where a share of flips is known to one start."""
    least = STEADY if row.flips is None else 1 / starts
    return (row.error + least) / (other.error + least)


def summary(rows: Sequence[Row], default: str, starts: int) -> str:
    """Side by side, at each count and oracle: our closest, diffusers' closest, and the default, as Markdown."""
    lines = [
        "| oracle | evaluations | closest of ours | error | closest of diffusers | error | default | over our closest |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (oracle, count), cell in cells(rows).items():
        ours, theirs = best(cell, "ours"), best(cell, "diffusers")
        mine = next(row for row in cell if row.name == default)
        lines.append(
            f"| {oracle} | {count} | {ours.name} | {shown(ours)} | {theirs.name} | {shown(theirs)} | {shown(mine)} "
            f"| {ratio(mine, ours, starts):.2f} |"
        )
    return "\n".join(lines)


def shown(row: Row) -> str:
    """The error: a distance, or the share of flips and the median distance."""
    return f"{row.median:.2g}" if row.flips is None else f"{row.flips:.1%} ({row.median:.2g})"


def by_method(rows: Sequence[Row], oracle: str) -> str:
    """Each sampler of each side with its best grid over all counts: the error at every count, as Markdown."""
    own = [row for row in rows if row.oracle == oracle]
    counts = sorted({row.count for row in own})
    lines = [
        "| | sampler | grid | " + " | ".join(map(str, counts)) + " |",
        "|---|---|---|" + "---|" * len(counts),
    ]
    for (side, method), group in groupby(own, key=lambda row: (row.side, row.method)):
        grid, errors = min(
            _by_grid(list(group)).items(), key=lambda item: _typical(item[1].values())
        )
        row = " | ".join(shown(errors[count]) if count in errors else "" for count in counts)
        lines.append(f"| {side} | {method} | {grid} | {row} |")
    return "\n".join(lines)


def _by_grid(rows: list[Row]) -> dict[str, dict[int, Row]]:
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row.grid, {})[row.count] = row
    return found


def _typical(rows: Iterable[Row]) -> float:
    errors = [row.error if math.isfinite(row.median) else math.inf for row in rows]
    return (
        geometric_mean([error + 1e-6 for error in errors])
        if math.isfinite(sum(errors))
        else math.inf
    )


def ranking(rows: Sequence[Row], starts: int, side: str = "ours") -> list[tuple[float, float, str]]:
    """(geometric mean, maximum, name) of each combination's error over our closest, in all cells that it was measured in."""
    found: dict[str, list[float]] = {}
    every = cells(rows)
    for cell in every.values():
        closest = best(cell, "ours")
        for row in cell:
            if row.side == side:
                found.setdefault(row.name, []).append(ratio(row, closest, starts))
    whole = {name: ratios for name, ratios in found.items() if len(ratios) == len(every)}
    return sorted((geometric_mean(ratios), max(ratios), name) for name, ratios in whole.items())


def picture(rows: Sequence[Row], default: str, path: Path) -> None:
    """Error over evaluations, a panel an oracle: the closest of each side, the default, and DDIM."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = cells(rows)
    oracles = list(dict.fromkeys(oracle for oracle, _ in every))
    figure, axes = pyplot.subplots(
        1, len(oracles), figsize=(4 * len(oracles), 3.6), constrained_layout=True
    )
    lines: dict[str, tuple[Callable[[list[Row]], Row], dict[str, object]]] = {
        "closest of ours": (lambda cell: best(cell, "ours"), {"color": "black", "marker": "o"}),
        "default": (
            lambda cell: _named(cell, default),
            {"color": "black", "marker": "s", "linestyle": ":"},
        ),
        "closest of diffusers": (
            lambda cell: best(cell, "diffusers"),
            {"color": "0.45", "marker": "^", "linestyle": "--"},
        ),
        "DDIM, Trailing": (
            lambda cell: _named(cell, "DDIM(eta=0.0), Trailing, Cosine"),
            {"color": "0.7", "marker": "x", "linestyle": "-."},
        ),
    }
    for oracle, axis in zip(oracles, axes, strict=True):
        counts = [count for name, count in every if name == oracle]
        for label, (pick, style) in lines.items():
            axis.plot(
                counts, [pick(every[oracle, count]).error for count in counts], label=label, **style
            )
        axis.set(title=oracle, xlabel="network evaluations", xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        flips = every[oracle, counts[0]][0].flips is not None
        axis.set(
            ylabel="share of basin flips" if flips else "median distance to the exact flow's end"
        )
        axis.set_yscale("symlog", linthresh=0.005) if flips else axis.set_yscale("log")
        axis.set_ylim(bottom=0 if flips else None)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _named(rows: Iterable[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)
