"""Line charts as SVG in the style of the figures, in the colours of a light or a dark page."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, Literal, NamedTuple

from diffcore.io.extras import import_extra
from diffcore.report.figures import (
    FAINT,
    INK,
    PAPER,
    line_colours,
    line_styles,
    theme_settings,
)
from diffcore.report.line_labels import label_lines

__all__ = ["Curve", "line_chart"]

PURPOSE = "A report"


class Curve(NamedTuple):
    """A curve of a chart.

    Args:
        x: abscissas.
        y: ordinates, as many; None leaves a gap.
    """

    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    xlabel: str,
    yscale: Literal["linear", "log"] = "linear",
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
) -> str:
    """Draw curves against a common abscissa.

    Args:
        title: heading of the chart.
        curves: curves by the name that is written beside them; one curve has no name.
        xlabel: name of the abscissa.
        yscale: scale of the ordinates.
        xlim: bounds of the abscissas; None: those of the curves.
        ylim: bounds of the ordinates; None: those of the curves.

    Returns:
        An `<svg>` element without width and height. Text has the colour of the text around it, and
        curves have those of `line_colours` for a light or a dark page.
    """
    matplotlib = import_extra("matplotlib", PURPOSE)
    figure_class = import_extra("matplotlib.figure", PURPOSE).Figure
    style = theme_settings("light") | {"svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = figure_class(figsize=(5, 3.3), layout="constrained")
        axis = figure.subplots()
        for (name, curve), line in zip(curves.items(), line_styles(len(curves)), strict=True):
            y = [float("nan") if value is None else value for value in curve.y]
            label = name if len(curves) > 1 else None
            axis.plot(curve.x, y, label=label, marker="o" if len(y) == 1 else None, **line)
        axis.set(xlabel=xlabel, yscale=yscale, xlim=xlim, ylim=ylim)
        _place_ticks(axis, is_log=yscale == "log", is_integer=xlabel == "step")
        axis.grid(visible=True)
        label_lines(figure)
        for text in axis.texts:  # an outline would make paths of the text; the page draws it
            text.set_path_effects([])
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(_with_page_colours(buffer.getvalue(), len(curves)), title)


def _place_ticks(axis: Any, is_log: bool, is_integer: bool) -> None:
    ticker = import_extra("matplotlib.ticker", PURPOSE)
    if is_log:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    if is_integer:
        axis.xaxis.get_major_locator().set_params(integer=True)


def _with_page_colours(svg: str, count: int) -> str:
    """The chart with colours of the page around it in place of those of the light theme."""
    colours = {INK["light"]: "currentColor", FAINT["light"]: "var(--line)"}
    colours |= {PAPER["light"]: "var(--card)"}
    pairs = zip(line_colours(count, "light"), line_colours(count, "dark"), strict=True)
    colours |= {light: f"light-dark({light}, {dark})" for light, dark in pairs}
    return re.sub("#[0-9a-f]{6}", lambda found: colours.get(found[0], found[0]), svg)


def _for_page(svg: str, title: str) -> str:
    """The element alone, without size and repeated ids, in the colour of the text of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img" aria-label="{label}">',
        svg,
        count=1,
    )
