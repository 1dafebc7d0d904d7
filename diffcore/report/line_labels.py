"""Labels that are written beside the lines of a figure, each at a place where it covers nothing."""

from typing import Any

import numpy as np

from diffcore.io.extras import import_extra

__all__ = ["label_lines"]

POINTS = 32
"""Number of points along a line at which its label is tried."""
OFFSETS = [
    (x * reach, y * reach)
    for reach in (1.0, 2.0, 3.5, 6.0, 9.0)
    for x, y in ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
]
"""Directions and distances of a label from its point, in heights of the text."""
COVERED, HIDDEN, CROWDED = 60.0, 300.0, 6.0
"""Costs of covering lines and other labels, and of a point with other lines near; each height of
distance from the line costs 1."""
SPACING = 4.0
"""Pixels between the points at which lines are compared with labels."""


def label_lines(figure: Any) -> None:
    """Write the label of each labelled line beside it, with a thin connection where it is far.

    Args:
        figure: figure of matplotlib with its final limits and scales.
    """
    figure.draw_without_rendering()
    for axis in figure.axes:
        lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
        drawn = {line: _pixels(axis, line) for line in axis.get_lines()}
        taken: list[Any] = []
        for line in sorted(lines, key=lambda line: len(line.get_label()), reverse=True):
            _label(axis, line, drawn, taken)


def _pixels(axis: Any, line: Any) -> Any:
    """The points (N, 2) of a line within the axes, in pixels, dense enough to be covered."""
    x, y = (np.asarray(part, dtype=float) for part in line.get_data())
    points = axis.transData.transform(np.stack(np.broadcast_arrays(x, y), 1))
    points = points[np.isfinite(points).all(1)]
    if line.get_linestyle() != "None" and len(points) > 1:
        lengths = np.r_[0, np.cumsum(np.hypot(*np.diff(points, axis=0).T))]
        steps = np.linspace(0, lengths[-1], int(min(lengths[-1] / SPACING, 4000)) + 2)
        points = np.stack([np.interp(steps, lengths, part) for part in points.T], 1)
    left, bottom, right, top = axis.bbox.extents
    inside = (points >= (left, bottom)).all(1) & (points <= (right, top)).all(1)
    return points[inside]


def _label(axis: Any, line: Any, drawn: dict[Any, Any], taken: list[Any]) -> None:
    """Write one label at the cheapest of the places around its line, and add its box to `taken`."""
    own = drawn[line]
    if not len(own):
        return
    text = _write(axis, line)
    extent = text.get_window_extent()
    size = np.array([extent.width, extent.height])
    anchors = own[np.linspace(0, len(own) - 1, min(POINTS, len(own))).astype(int)]
    offsets = np.sign(OFFSETS) * size / 2 + np.array(OFFSETS) * size[1] / 2
    centres = (anchors[:, None] + offsets).reshape(-1, 2)
    anchors = anchors.repeat(len(offsets), 0)
    others = [points for other, points in drawn.items() if other is not line]
    edges = np.clip(anchors, centres - size / 2, centres + size / 2)
    gaps = np.hypot(*(anchors - edges).T)
    cost = gaps / size[1] + _cost(axis, centres, size, np.concatenate([own, *others]), taken)
    best = (cost + _crowding(anchors, others, size[1])).argmin()
    taken.append(_boxes(centres[best : best + 1], size)[0])
    inverse = axis.transData.inverted()
    text.set_position(inverse.transform(centres[best]))
    if gaps[best] > 1.2 * size[1]:
        ends = inverse.transform(np.stack([anchors[best], edges[best]]))
        axis.plot(*ends.T, color=line.get_color(), lw=0.7, zorder=4, scalex=False, scaley=False)


def _write(axis: Any, line: Any) -> Any:
    """The text of a label in the colour of its line, with a margin in that of the axes."""
    effects = import_extra("matplotlib.patheffects", "Drawing a figure")
    text = axis.text(0, 0, line.get_label(), color=line.get_color(), fontsize=9, zorder=5)
    text.set(in_layout=False, va="center", ha="center")
    text.set_path_effects([effects.withStroke(linewidth=3, foreground=axis.get_facecolor())])
    return text


def _cost(axis: Any, centres: Any, size: Any, drawn: Any, taken: list[Any]) -> Any:
    """Costs (C,) of labels at centres (C, 2): infinite outside of the axes."""
    boxes = _boxes(centres, size + 4)
    covered = ((drawn > boxes[:, None, :2]) & (drawn < boxes[:, None, 2:])).all(2).sum(1)
    outer = axis.bbox.extents
    outside = (boxes[:, :2] < outer[:2]).any(1) | (boxes[:, 2:] > outer[2:]).any(1)
    cost = np.where(outside, np.inf, COVERED * np.minimum(covered / 10, 1))
    for box in taken:
        shared = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        cost += HIDDEN * shared.clip(0).prod(1) / (size + 4).prod()
    return cost


def _crowding(anchors: Any, others: list[Any], height: float) -> Any:
    """Costs (C,) of points near other lines, where it is in doubt which line is meant."""
    cost = np.zeros(len(anchors))
    for points in others:
        if len(points):
            nearest = np.hypot(*(points - anchors[:, None]).transpose(2, 0, 1)).min(1)
            cost = np.maximum(cost, CROWDED * (1 - nearest / (2 * height)).clip(0))
    return cost


def _boxes(centres: Any, size: Any) -> Any:
    """Left, bottom, right and top (C, 4) of labels at centres (C, 2), in pixels."""
    return np.concatenate([centres - size / 2, centres + size / 2], 1)
