"""The cases of a comparison of samplers as text, as plain data, and as pictures."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from PIL.Image import Image
from torch import Tensor

from diffcore.core.process import Process
from diffcore.evaluation.flow.sampler_comparison import Case
from diffcore.io.specs import describe_component
from diffcore.sampling import pictures
from diffcore.sampling.images import draw_table
from diffcore.sampling.pictures import Picture

__all__ = [
    "View",
    "describe_case",
    "describe_seconds",
    "draw_guidances",
    "draw_samplers",
    "format_cases",
    "name_sampler",
]

EVALUATIONS = "evaluations"
SHOWN = 8
"""Largest number of samples of a rule in the picture of guidance."""


def name_sampler(cases: Sequence[Case]) -> str:
    """The name of a sampler, with its steps if they are not its numbers of evaluations.

    Args:
        cases: cases of one sampler and one rule, in the order of the columns.

    Returns:
        The name, such as `Heun() (3, 5, 10 steps)`.
    """
    if all(case.steps in (0, case.count) for case in cases):
        return _sampler(cases[0])
    steps = ", ".join(str(case.steps) if case.steps else "–" for case in cases)
    return f"{_sampler(cases[0])} ({steps} steps)"


def format_cases(cases: Sequence[Case]) -> list[str]:
    """The cases as tables of text: for each rule the distances, and the seconds per sample.

    Args:
        cases: result of `SamplerComparison.run`.

    Returns:
        The lines.
    """
    lines = []
    for rule, group in _by_guidance(cases):
        header = [str(case.count) for case in group[0]]
        costs = _costs(group)
        lines += [f"guidance {rule}: {costs}", ""]
        lines += ["distance to the flow (RMS per element): median [interval, at least 95 %]"]
        lines += _table(header, group, _distance_cell)
        error = next((case.flow for row in group for case in row if case.flow is not None), None)
        if error is not None:
            lines += [
                f"The solved flow has an error of about {error.error:.1g} ({error.steps} steps, "
                "estimated by halving them); no distance below it is resolved (≤)."
            ]
        lines += _reasons(case for row in group for case in row)
        lines += ["", "seconds for each sample, median of the passes"]
        lines += [*_table(header, group, _seconds_cell), ""]
    return lines


def describe_case(case: Case) -> dict[str, Any]:
    """What was measured of a case as plain data, without times.

    Args:
        case: a case of `SamplerComparison.run`.

    Returns:
        The values by name, which are equal each time.
    """
    distance, flow = case.distance, case.flow
    return {
        "guidance": _rule(case),
        "sampler": _sampler(case),
        "evaluations": case.count,
        "steps": case.steps,
        "network_evaluations": case.evaluations,
        "distance": None if distance is None else distance.median,
        "interval": None if distance is None or distance.low is None else list(distance[1:3]),
        "is_resolved": None if distance is None else distance.is_resolved,
        "flow_error": None if flow is None else flow.error,
        "reason": case.reason,
    }


def describe_seconds(case: Case) -> dict[str, Any]:
    """The times of a case as plain data.

    Args:
        case: a case of `SamplerComparison.run`.

    Returns:
        Seconds for each sample, and of all samples in each pass.
    """
    return {"seconds_per_sample": case.seconds_per_sample, "passes": case.seconds}


class View(NamedTuple):
    """How samples are drawn.

    Args:
        process: process with the shape and the range of the pictures.
        picture: kind, see `pictures.picture_of`.
        decode: function that converts samples (N, *shape) to images, such as the decoder of
            latents.
    """

    process: Process
    picture: Picture = "auto"
    decode: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def is_of_points(self) -> bool:
        """Whether one picture shows all samples as points."""
        return pictures.picture_of(self.process, self.picture) == "points"

    def tile(self, x: Tensor | None) -> Image | None:
        """The picture of the first sample, or of all points; None without samples."""
        if x is None:
            return None
        x = x.float() if self.is_of_points else x[:1].float()
        return pictures.draw(self.decode(x), self.process, [""], len(x), self.picture)


def draw_samplers(cases: Sequence[Case], view: View) -> Image:
    """A picture of one rule: a row for each sampler, a column for each number of evaluations.

    Each cell shows the first sample; of points, all samples. The last column is the solved flow.

    Args:
        cases: cases of one guidance rule.
        view: how samples are drawn.

    Returns:
        The picture.
    """
    rows = [list(row) for _, row in groupby(cases, _sampler)]
    columns = [str(case.count) for case in rows[0]]
    tiles = [[view.tile(case.x) for case in row] for row in rows]
    flows = [next((case.flow for case in reversed(row) if case.flow), None) for row in rows]
    distinct = {id(flow): flow for flow in flows if flow is not None}  # the rows share theirs
    drawn = {key: view.tile(flow.x) for key, flow in distinct.items()}
    if drawn:
        columns.append("flow")
        for cells, flow in zip(tiles, flows, strict=True):
            cells.append(drawn.get(id(flow)))
    return draw_table(tiles, [_sampler(row[0]) for row in rows], columns, EVALUATIONS)


def draw_guidances(cases: Sequence[Case], names: Sequence[str], view: View) -> Image:
    """A picture of several rules: a row for each rule, a column for each sample.

    Args:
        cases: one case of each rule.
        names: label, prompt or seed of each sample.
        view: how samples are drawn.

    Returns:
        The picture.
    """
    columns = ["samples"] if view.is_of_points else list(names[:SHOWN])
    tiles = [
        [None if case.x is None else view.tile(case.x[index:]) for index in range(len(columns))]
        for case in cases
    ]
    corner = f"{_sampler(cases[0])}, {cases[0].count} {EVALUATIONS}"
    return draw_table(tiles, [_rule(case) for case in cases], columns, corner)


def _rule(case: Case) -> str:
    return describe_component(case.guidance)


def _sampler(case: Case) -> str:
    return describe_component(case.sampler)


def _by_guidance(cases: Sequence[Case]) -> list[tuple[str, list[list[Case]]]]:
    """The cases of each rule, row by row."""
    rules = [(rule, list(group)) for rule, group in groupby(cases, _rule)]
    return [(rule, [list(row) for _, row in groupby(group, _sampler)]) for rule, group in rules]


def _costs(rows: Sequence[Sequence[Case]]) -> str:
    """How many evaluations of the network one of the guided network takes."""
    ratios = [
        case.evaluations / case.count
        for row in rows
        for case in row
        if case.x is not None and case.steps == case.count
    ]
    cost = f"{statistics.fmean(ratios):.3g}" if ratios else "several"
    return f"one evaluation of the guided network is {cost} of the network"


def _reasons(cases: Iterable[Case]) -> list[str]:
    """Why some cells are empty, with the samplers that a reason belongs to."""
    samplers: dict[str, list[str]] = {}
    for case in cases:
        if case.reason:
            samplers.setdefault(case.reason, []).append(_sampler(case))
    return [f"– {', '.join(dict.fromkeys(names))}: {text}" for text, names in samplers.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[Case]], cell: Any) -> list[str]:
    """A table with the numbers of evaluations as columns."""
    table = [[EVALUATIONS, *header]]
    table += [[name_sampler(row), *(cell(case) for case in row)] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _distance_cell(case: Case) -> str:
    if case.distance is None:
        return "–"
    middle, low, high, is_resolved = case.distance
    if not is_resolved:
        return f"≤ {case.flow.error:.1g}" if case.flow is not None else "–"
    interval = "" if low is None else f" [{low:.2g}, {high:.2g}]"
    return f"{middle:.2g}{interval}"


def _seconds_cell(case: Case) -> str:
    seconds = case.seconds_per_sample
    return "–" if seconds is None else f"{seconds:.3g}"
