"""Figures that print well in grey: curves differ in lightness and dashes."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from diffcore.io.extras import import_extra
from diffcore.io.files import write_file

__all__ = ["create_figure", "line_styles", "save_figure"]

DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
PURPOSE = "Drawing a figure"


def create_figure(
    columns: int, rows: int = 1, width: float = 5, height: float = 4.6
) -> tuple[Any, Any]:
    """Create a figure of equal panels, which needs no display.

    Args:
        columns: number of panels side by side.
        rows: number of panels on top of each other.
        width: width of a panel in inches.
        height: height of a panel in inches.

    Returns:
        The figure, and its axes row by row.
    """
    import_extra("matplotlib", PURPOSE).use("Agg")
    plt = import_extra("matplotlib.pyplot", PURPOSE)
    size = (max(width * columns, 7), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes.flatten()


def line_styles(count: int) -> Iterator[dict[str, Any]]:
    """Create styles of curves that differ even without colour.

    Args:
        count: number of curves.

    Yields:
        Keyword arguments of matplotlib's `plot`.
    """
    colours = import_extra("matplotlib", PURPOSE).colormaps["viridis"]
    for index in range(count):
        yield {
            "color": colours(0.85 * index / max(count - 1, 1)),
            "ls": DASHES[index % len(DASHES)],
            "lw": 2,
        }


def save_figure(figure: Any, out: str | Path, dpi: int = 120) -> None:
    """Write a figure with a grid and a legend of all labelled curves, and close it.

    Args:
        figure: figure of matplotlib.
        out: file to write; the suffix decides the format.
        dpi: pixels per inch of raster formats.
    """
    plt = import_extra("matplotlib.pyplot", PURPOSE)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    if any(axis.get_legend_handles_labels()[0] for axis in figure.axes):
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    out, content = Path(out), BytesIO()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(content, dpi=dpi, format=out.suffix[1:])
    plt.close(figure)
    write_file(out, content.getvalue())
