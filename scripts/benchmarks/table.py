"""Tables of measurements as Markdown."""

from collections.abc import Iterable, Sequence
from statistics import mean

__all__ = ["markdown_table", "mean_and_half_range"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table.

    Args:
        header: names of the columns.
        rows: cells of each row.

    Returns:
        The lines of the table.
    """
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def mean_and_half_range(values: Sequence[float], digits: int) -> str:
    """Format the measurements of several seeds as one cell.

    Args:
        values: one measurement for each seed.
        digits: digits after the decimal point.

    Returns:
        `mean ± half of the range`; the value alone for one seed, and nothing for none.
    """
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
