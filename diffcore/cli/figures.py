"""Figures that print well in grey: panels side by side, curves that differ in lightness and dashes, a legend below."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcore.io.extras import import_extra

DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]


def figure(columns: int, lines: int = 1, width: float = 5, height: float = 4.6) -> tuple[Any, Any]:
    """A figure and its axes, line by line; drawn without a display. Sizes are of a panel, in inches."""
    mpl = import_extra("matplotlib", "Drawing a figure")
    mpl.use("Agg")
    plt = import_extra("matplotlib.pyplot", "Drawing a figure")

    size = (max(width * columns, 7), height * lines)
    made, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    return made, axes.flatten()


def styles(count: int) -> Iterator[dict[str, Any]]:
    """Colours that differ in lightness, and lines in dashes."""
    mpl = import_extra("matplotlib", "Drawing a figure")
    colours = mpl.colormaps["viridis"]
    for place in range(count):
        yield {
            "color": colours(0.85 * place / max(count - 1, 1)),
            "ls": DASHES[place % len(DASHES)],
            "lw": 2,
        }


def save(made: Any, out: Path, dpi: int = 120) -> None:
    """Write it, with a grid and a legend of what has a name, and close it."""
    plt = import_extra("matplotlib.pyplot", "Drawing a figure")
    for axis in made.axes:
        axis.grid(alpha=0.3)
    if any(axis.get_legend_handles_labels()[0] for axis in made.axes):
        made.legend(loc="outside lower center", ncols=2, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(out, dpi=dpi)
    plt.close(made)
