"""The style of all figures, light or dark, for colour-blind readers and for grey prints.

Curves differ in lightness and dashes. Labels are written beside the curves, not in a legend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from diffcore.io.extras import import_extra
from diffcore.io.files import write_file
from diffcore.report.line_labels import label_lines

__all__ = [
    "FAINT",
    "INK",
    "PAPER",
    "Theme",
    "create_figure",
    "current_theme",
    "figure_theme",
    "line_colours",
    "line_styles",
    "save_figure",
    "theme_path",
    "theme_settings",
]

Theme = Literal["light", "dark"]
"""Colours of a figure: dark lines on white, or light lines on a dark page."""

DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
PURPOSE = "Drawing a figure"
INK = {"light": "#20222b", "dark": "#e2e4ec"}
"""Colour of text and axes."""
PAPER = {"light": "#ffffff", "dark": "#1e2129"}
"""Colour of the background."""
FAINT = {"light": "#d3d5dc", "dark": "#41444f"}
"""Colour of the grid."""
COLOURS = {"light": (0.0, 0.72), "dark": (0.45, 1.0)}
"""Part of the colour map viridis whose contrast with the paper is sufficient."""


@contextmanager
def figure_theme(theme: Theme) -> Iterator[None]:
    """Draw figures in a theme within a `with` block; outside of one they are light.

    Args:
        theme: light or dark.

    Raises:
        ValueError: the theme is unknown.
    """
    if theme not in get_args(Theme):
        raise ValueError(f"theme is {theme!r}, expected light or dark")
    with import_extra("matplotlib", PURPOSE).rc_context(theme_settings(theme)):
        yield


def theme_settings(theme: Theme) -> dict[str, Any]:
    """The settings of matplotlib for a theme.

    Args:
        theme: light or dark.

    Returns:
        Values for `matplotlib.rc_context`.
    """
    ink, paper = INK[theme], PAPER[theme]
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "axes.edgecolor": ink,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.axisbelow": True,
        "grid.color": FAINT[theme],
        "grid.linewidth": 0.6,
        "font.size": 10,
        "legend.frameon": False,
        "lines.markersize": 5,
    }


def theme_path(path: str | Path, theme: Theme) -> Path:
    """The file of a figure in a theme: `weights.png` if light, `weights-dark.png` if dark.

    Args:
        path: file of the light figure.
        theme: light or dark.

    Returns:
        The path.
    """
    path = Path(path)
    return path if theme == "light" else path.with_name(f"{path.stem}-dark{path.suffix}")


def create_figure(
    columns: int, rows: int = 1, width: float = 5, height: float = 4.6, minimum: float = 7
) -> tuple[Any, Any]:
    """Create a figure of equal panels, which needs no display.

    Args:
        columns: number of panels side by side.
        rows: number of panels on top of each other.
        width: width of a panel in inches.
        height: height of a panel in inches.
        minimum: smallest width of the figure in inches.

    Returns:
        The figure, and its axes row by row.
    """
    matplotlib = import_extra("matplotlib", PURPOSE)
    matplotlib.use("Agg")
    plt = import_extra("matplotlib.pyplot", PURPOSE)
    size = (max(width * columns, minimum), height * rows)
    with matplotlib.rc_context(theme_settings(current_theme())):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
    return figure, axes.flatten()


def current_theme() -> Theme:
    """The theme of the `figure_theme` block around the caller.

    Returns:
        light or dark; light outside of a block.
    """
    rc = import_extra("matplotlib", PURPOSE).rcParams
    return "dark" if rc["figure.facecolor"] == PAPER["dark"] else "light"


def line_colours(count: int, theme: Theme) -> list[str]:
    """Colours of curves in the order of their lightness, which grey prints keep.

    Args:
        count: number of curves.
        theme: light or dark.

    Returns:
        Colours as #rrggbb.
    """
    matplotlib = import_extra("matplotlib", PURPOSE)
    low, high = COLOURS[theme]
    places = [low + (high - low) * index / max(count - 1, 1) for index in range(count)]
    return [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](place)) for place in places]


def line_styles(count: int) -> Iterator[dict[str, Any]]:
    """Create styles of curves that differ even without colour.

    Args:
        count: number of curves.

    Yields:
        Keyword arguments of matplotlib's `plot`.
    """
    for index, colour in enumerate(line_colours(count, current_theme())):
        yield {"color": colour, "ls": DASHES[index % len(DASHES)], "lw": 2}


def save_figure(figure: Any, out: str | Path, dpi: int = 120) -> None:
    """Write a figure with a grid, and with the labels of its curves beside them, and close it.

    Args:
        figure: figure of matplotlib.
        out: file to write; the suffix decides the format.
        dpi: pixels per inch of raster formats.
    """
    plt = import_extra("matplotlib.pyplot", PURPOSE)
    for axis in figure.axes:
        axis.grid(axis.axison)
    label_lines(figure)
    out, content = Path(out), BytesIO()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(content, dpi=dpi, format=out.suffix[1:])
    plt.close(figure)
    write_file(out, content.getvalue())
