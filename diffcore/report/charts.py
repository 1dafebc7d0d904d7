"""Line charts as SVG that takes the colour of the text around it, for light and dark pages."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, Literal, NamedTuple

from diffcore.io.extras import import_extra

__all__ = ["Curve", "line_chart"]

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#ca8a04", "#06b6d4", "#64748b")
"""Colours that are legible on white and on black."""
INK = "#123456"
"""Stands for the colour of the text of the page."""
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": None,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Curve(NamedTuple):
    """A curve of a chart.

    Args:
        x: abscissas.
        y: ordinates, as many; None leaves a gap.
        style: "-" for a line, "--" for a dashed one.
    """

    x: Sequence[float]
    y: Sequence[float | None]
    style: Literal["-", "--"] = "-"


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
        curves: curves by the name in the legend; one curve has no legend.
        xlabel: name of the abscissa.
        yscale: scale of the ordinates.
        xlim: bounds of the abscissas; None: those of the curves.
        ylim: bounds of the ordinates; None: those of the curves.

    Returns:
        An `<svg>` element without width and height, whose lines and text have the colour of the
        text around it.
    """
    matplotlib = import_extra("matplotlib", "A report")
    import_extra("matplotlib.ticker", "A report")
    figure_class = import_extra("matplotlib.figure", "A report").Figure
    style: dict[str, Any] = {
        **STYLE,
        "axes.prop_cycle": matplotlib.rcsetup.cycler("color", COLOURS),
        "svg.hashsalt": title,
    }
    with matplotlib.rc_context(style):
        figure = figure_class(figsize=(5, 3.3), layout="constrained")
        axis = figure.subplots()
        for name, curve in curves.items():
            y = [float("nan") if value is None else value for value in curve.y]
            marker = "o" if len(y) == 1 else None
            axis.plot(curve.x, y, curve.style, label=name, lw=1.8, marker=marker)
        axis.set(xlabel=xlabel, yscale=yscale, xlim=xlim, ylim=ylim)
        if yscale == "log":
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if xlabel == "step":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=2 if len(curves) < 6 else 3)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """The element alone, without size and repeated ids, in the colour of the text of the page."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img" aria-label="{label}">',
        svg,
        count=1,
    )
