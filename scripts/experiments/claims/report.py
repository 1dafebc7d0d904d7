"""Tables of the measurements in docs/experiments/claims-*.jsonl, for docs/claims.md."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from benchmarks.table import markdown_table, mean_and_half_range

from experiments.study import group_rows

__all__ = ["REPORTS", "TRAINING_PAIRS", "format_speed_ups", "speed_up"]

Rows = list[dict[str, Any]]

TRAINING_PAIRS = [
    *(("cosine, v, Min-SNR", f"cosine, v{other}") for other in ("", ", P2", ", Debiased")),
    *((f"cosine, v, {name}", "cosine, v") for name in ("P2", "Debiased", "DDPM-IP", "OT")),
    ("Laplace(0, 0.5), v", "cosine, v"),
]
"""Arms of training.jsonl whose speed-ups are reported, and what each is compared with."""
NOISY_KNOTS = 13
"""Knots of the exposure bias at λ of at most 1.1."""


def speed_up(curve: dict[str, Sequence[float]], base: dict[str, Sequence[float]], at: int) -> float:
    """How many times fewer steps a training needs for the distance that another has.

    The steps are interpolated in the logarithms of steps and distance. A distance beyond the ends
    of the curve counts as that of its end.

    Args:
        curve: distances by the number of steps; the first of each pair is used.
        base: distances of the other training.
        at: number of steps of the other training.

    Returns:
        `at` over the number of steps.
    """
    target = math.log(base[str(at)][0])
    points = sorted((math.log(int(steps)), math.log(pair[0])) for steps, pair in curve.items())
    reached = points[0][0] if points[0][1] <= target else points[-1][0]
    for (s, x), (t, y) in pairwise(points):
        if x > target >= y:
            reached = s + (t - s) * (x - target) / (x - y)
            break
    return at / math.exp(reached)


def format_speed_ups(rows: Rows, pairs: Iterable[tuple[str, str]], at: int) -> str:
    """Format the speed-up of arms over others, paired by seed (and kind of levels).

    Args:
        rows: measurements with arm, seed and distances.
        pairs: names of an arm and of the arm that it is compared with.
        at: number of steps of the latter.

    Returns:
        The table as Markdown.
    """
    table = []
    for name, base in pairs:
        curves = {_key(row): row["distances"] for row in _select(rows, arm=name)}
        values = [
            speed_up(curves[_key(row)], row["distances"], at)
            for row in _select(rows, arm=base)
            if _key(row) in curves
        ]
        table.append([name, base, mean_and_half_range(values, 2)])
    return markdown_table(
        ["arm", f"reaches the distance after {at} steps of", "times faster"], table
    )


def _key(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["seed"], row.get("levels")


def _select(rows: Rows, **values: Any) -> Rows:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def format_arms(rows: Rows) -> str:
    """Format the distances, the samplers and the exposure bias of the arms.

    Args:
        rows: measurements of `experiments.claims.arms`.

    Returns:
        The tables as Markdown.
    """
    weights = ("Min-SNR", "P2", "Debiased", "DDPM-IP")
    linear = [
        *((f"linear, ε, {name}", "linear, ε") for name in weights),
        *(("linear, ε, Min-SNR", f"linear, ε, {name}") for name in ("P2", "Debiased")),
    ]
    pairs = [
        ("cosine, x_0, Min-SNR", "cosine, x_0"),
        *((f"Laplace, {target}", f"cosine, {target}") for target in ("ε", "v", "x_0")),
    ]
    speed_ups = [format_speed_ups(rows, pairs, 500)]
    speed_ups += [format_speed_ups(rows, linear, at) for at in (500, 1000, 2000, 4000)]
    tables = [_format_distances(rows), *speed_ups, _format_samplers(rows), _format_exposure(rows)]
    return "\n\n".join(tables)


def _format_distances(rows: Rows) -> str:
    points = sorted({int(point) for row in rows for point in row["distances"]})
    header = ["arm", *(f"{n} steps" for n in points), "held-out, 1000 steps", "held-out, last"]
    table = []
    for (arm,), seeds in group_rows(rows, "arm").items():
        curves = [row["distances"] for row in seeds]
        cells = [[c[str(point)][0] for c in curves if str(point) in c] for point in points]
        cells.append([curve["1000"][1] for curve in curves])
        cells.append([list(curve.values())[-1][1] for curve in curves])
        table.append([arm, *(mean_and_half_range(cell, 1) for cell in cells)])
    return markdown_table(header, table)


def _format_samplers(rows: Rows) -> str:
    rows = [row for row in rows if "samplers" in row]
    names = list(rows[0]["samplers"])
    counts = list(rows[0]["samplers"][names[0]])
    table = [
        [arm, name, *(
            mean_and_half_range([row["samplers"][name][count] for row in seeds], 1)
            for count in counts
        )]
        for (arm,), seeds in group_rows(rows, "arm").items()
        for name in names
    ]  # fmt: skip
    return markdown_table(["arm", "sampler", *(f"{count} evaluations" for count in counts)], table)


def _format_exposure(rows: Rows) -> str:
    """Mean over the knots of the deviation of a ratio from 1, in per cent."""
    rows = [row for row in rows if "exposure" in row]
    table = []
    for (arm,), seeds in group_rows(rows, "arm").items():
        for sampler in seeds[0]["exposure"]:
            cells = [
                [
                    100 * mean(abs(ratio - 1) for ratio in row["exposure"][sampler][name][:knots])
                    for row in seeds
                ]
                for name, knots in (("variance", None), ("norm", None), ("norm", NOISY_KNOTS))
            ]
            table.append([arm, sampler, *(mean_and_half_range(cell, 2) for cell in cells)])
    return markdown_table(["arm", "sampler", "x, %", "ε, %", "ε at λ ≤ 1.1, %"], table)


def format_coupling(rows: Rows) -> str:
    """Format the straightness of flows and the variance of gradients.

    Args:
        rows: measurements of `experiments.claims.coupling`.

    Returns:
        The table as Markdown.
    """
    header = ["data", "pairs", "gradient variance, first step", "after training", "curvature"]
    header += ["error of 5 steps", "distance", "distance, 5 steps"]
    table = []
    for (problem, name), seeds in group_rows(rows, "problem", "coupling").items():
        cells = [list(values) for values in zip(
            *(row["gradient"].values() for row in seeds), strict=True
        )]  # fmt: skip
        cells += [
            [row[key] for row in seeds] for key in ("curvature", "few", "distance", "few_distance")
        ]
        table.append([problem, name, *(mean_and_half_range(cell, 4) for cell in cells)])
    return markdown_table(header, table)


def format_input_scale(rows: Rows) -> str:
    """Format the differences between scaled data and a shifted schedule.

    Args:
        rows: measurements of `experiments.claims.input_scale`.

    Returns:
        The table as Markdown.
    """
    keys = ("trajectories", "losses", "plain")
    table = [
        [f"{b:g}", *(f"{max(row[key] for row in seeds):.1e}" for key in keys)]
        for (b,), seeds in group_rows(rows, "b").items()
    ]
    return markdown_table(["b", "trajectories", "losses", "losses, input not normalised"], table)


def format_guided(rows: Rows) -> str:
    """Format quality, saturation, evaluations and similarity by rule and scale.

    Args:
        rows: measurements of `experiments.claims.guided`.

    Returns:
        The table as Markdown.
    """
    columns = {
        "recall": 3,
        "precision": 3,
        "saturation": 3,
        "excess": 4,
        "train": 0,
        "recognised": 3,
        "evaluations": 1,
        "psnr": 1,
    }
    table = []
    for (rule, scale), seeds in group_rows(rows, "rule", "scale").items():
        cells = [
            mean_and_half_range([row[key] for row in seeds if row[key] is not None], digits)
            for key, digits in columns.items()
        ]
        table.append([rule, f"{scale:g}", *cells])
    return markdown_table(["rule", "w", *columns], table)


def format_likelihood(rows: Rows) -> str:
    """Format the bits per dimension.

    Args:
        rows: measurements of `experiments.claims.likelihood`.

    Returns:
        The table as Markdown.
    """
    table = []
    for (data, steps, name), seeds in group_rows(rows, "data", "steps", "dequantisation").items():
        cells = [
            mean_and_half_range([row[key] for row in seeds], digits)
            for key, digits in (("bits", 3), ("error", 3), ("evaluations", 0))
        ]
        table.append([data, str(steps), name, *cells])
    header = ["training data", "steps", "dequantisation", "bits per dimension", "standard error"]
    return markdown_table([*header, "evaluations"], table)


def format_oracles(rows: Rows) -> str:
    """Format the distances to exact flows.

    Args:
        rows: measurements of `experiments.claims.oracles`.

    Returns:
        The table as Markdown.
    """
    counts = list(rows[0]["errors"])
    table = []
    for (problem, method), groups in group_rows(rows, "problem", "method").items():
        cells = [
            mean_and_half_range([row["errors"][count] for row in groups], 4) for count in counts
        ]
        table.append([problem, method, *cells])
    return markdown_table(["problem", "sampler", *(f"{n} evaluations" for n in counts)], table)


REPORTS = {
    "arms": format_arms,
    "coupling": format_coupling,
    "input-scale": format_input_scale,
    "guided": format_guided,
    "likelihood": format_likelihood,
    "oracles": format_oracles,
}
"""Function that formats the measurements of each study."""
