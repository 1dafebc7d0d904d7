"""Plots of points and of signals, drawn by Pillow: they need no plotting library."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["draw_lines", "draw_points"]

COLOURS = (
    (31, 119, 180),
    (230, 97, 1),
    (27, 158, 119),
    (152, 78, 163),
    (200, 30, 60),
    (140, 110, 20),
    (0, 150, 180),
    (90, 90, 90),
)
"""Colours of rows of points and of channels of signals, which repeat."""
PANELS = 3
"""Largest number of pairs of coordinates that are drawn."""
BINS = 60
"""Number of bars of a histogram."""
SIDE, MARGIN, FINE = 320, 34, 2
"""Side of a panel and width of its margin in pixels; drawn at twice the size, then averaged."""
LINE_WIDTH, LINE_HEIGHT = 220, 110
"""Size of a panel of signals in pixels."""
Box = tuple[float, float, float, float]
FRAME, TEXT = (170, 170, 170), (60, 60, 60)


class _Panel(NamedTuple):
    """A rectangle of a drawing, with the bounds of its axes.

    Args:
        draw: drawing of `FINE` times the size.
        box: left, top, right and bottom in pixels of the drawing.
        x: bounds of the abscissas.
        y: bounds of the ordinates.
    """

    draw: ImageDraw.ImageDraw
    box: Box
    x: tuple[float, float]
    y: tuple[float, float]

    def pixels(self, points: Tensor) -> list[tuple[float, float]]:
        """Pixels of finite points (N, 2) within the bounds."""
        left, top, right, bottom = self.box
        low, high = torch.tensor([self.x, self.y], dtype=torch.float64).unbind(1)
        is_inside = ((points >= low) & (points <= high)).all(1)
        share = (points[is_inside].double() - low) / (high - low)
        scaled = share * torch.tensor((right - left, top - bottom)) + torch.tensor((left, bottom))
        return [(x, y) for x, y in scaled.tolist()]

    def frame(self, xlabel: str = "", ylabel: str = "") -> None:
        """Draw the frame, the bounds at its corners, and the names of the axes."""
        left, top, right, bottom = self.box
        self.draw.rectangle(self.box, outline=FRAME, width=FINE)
        below, beside = bottom + 4, left - 4
        self._text((left, below), f"{self.x[0]:.3g}", "la")
        self._text((right, below), f"{self.x[1]:.3g}", "ra")
        self._text(((left + right) / 2, below), xlabel, "ma")
        self._text((beside, bottom), f"{self.y[0]:.3g}", "rd")
        self._text((beside, top), f"{self.y[1]:.3g}", "ra")
        self._text((beside, (top + bottom) / 2), ylabel, "rm")

    def _text(self, position: tuple[float, float], text: str, anchor: str) -> None:
        self.draw.text(position, text, fill=TEXT, font=_font(10), anchor=anchor)


def draw_points(x: Tensor, rows: Sequence[str], per_row: int) -> Image.Image:
    """Scatter plots of pairs of coordinates, x_0 and x_1, x_2 and x_3, ..., at most three of them.

    One coordinate alone is drawn as a histogram. Points that are not finite are left out.

    Args:
        x: (N, n) points, row after row.
        rows: name of each row, which has a colour of its own; "" is not listed.
        per_row: number of points in a row.

    Returns:
        The picture.
    """
    pairs = list(_pairs(x.shape[1]))
    names = [(row, name) for row, name in enumerate(rows) if name]
    height = SIDE + 18 * len(names)
    sheet, draw = _sheet(len(pairs) * SIDE, height)
    for panel, pair in enumerate(pairs):
        box = _box(panel * SIDE, 0, SIDE, SIDE)
        if len(pair) == 1:
            _draw_histogram(draw, box, x[:, 0], len(rows), per_row)
            continue
        points = x[:, pair]
        axes = _Panel(draw, box, _bounds(points[:, 0]), _bounds(points[:, 1]))
        axes.frame(f"x{pair[0]}", f"x{pair[1]}")
        radius = FINE * (1 if len(x) > 500 else 1.8)
        for row in range(len(rows)):
            for a, b in axes.pixels(points[row * per_row : (row + 1) * per_row]):
                draw.ellipse((a - radius, b - radius, a + radius, b + radius), fill=_colour(row))
    for line, (row, name) in enumerate(names):
        position = (FINE * MARGIN, FINE * (SIDE + 18 * line))
        draw.text(position, name[:60], fill=_colour(row), font=_font(13))
    return _finish(sheet)


def draw_lines(
    x: Tensor, low: float, high: float, rows: Sequence[str], per_row: int
) -> Image.Image:
    """Signals as lines, a panel for each sample and a colour for each channel.

    Args:
        x: (N, C, L) signals, row after row; lines have gaps where values are not finite.
        low: lower end of the ordinates, which signals beyond it extend; -inf: that of the signals.
        high: upper end of the ordinates, which signals beyond it extend; inf: that of the signals.
        rows: name of each row, which stands above it.
        per_row: number of samples in a row.

    Returns:
        The picture.
    """
    heading = 20 if any(rows) else 0
    height, length = LINE_HEIGHT + heading, x.shape[2]
    sheet, draw = _sheet(per_row * LINE_WIDTH, math.ceil(len(x) / per_row) * height)
    ends = torch.tensor([end for end in (low, high) if math.isfinite(end)])
    bounds = _bounds(torch.cat((x.cpu().float().flatten(), ends)))
    for row, name in enumerate(rows):
        position = (FINE * MARGIN, FINE * (row * height + 4))
        draw.text(position, name, fill=TEXT, font=_font(13))
    time = torch.arange(length, dtype=torch.float64)
    for index, signal in enumerate(x.cpu().double()):
        row, column = divmod(index, per_row)
        top = row * height + heading
        box = _box(column * LINE_WIDTH, top, LINE_WIDTH, LINE_HEIGHT)
        panel = _Panel(draw, box, (0, max(length - 1, 1)), bounds)
        panel.frame()
        for channel, values in enumerate(signal):
            points = torch.stack((time, values), 1)
            for piece in _finite_pieces(points):
                draw.line(panel.pixels(piece), fill=_colour(channel), width=FINE + 1)
    return _finish(sheet)


def _draw_histogram(
    draw: ImageDraw.ImageDraw,
    box: Box,
    values: Tensor,
    rows: int,
    per_row: int,
) -> None:
    """Steps of the number of values in each of `BINS` intervals, a line for each row."""
    low, high = _bounds(values)
    parts = [values[row * per_row : (row + 1) * per_row].cpu() for row in range(rows)]
    counts = [
        torch.histc(part[part.isfinite()].float(), BINS, low, high).double() for part in parts
    ]
    panel = _Panel(draw, box, (low, high), (0, max(float(count.max()) for count in counts) or 1))
    panel.frame("x0", "items")
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    for row, count in enumerate(counts):
        steps = torch.stack(
            (torch.stack((edges[:-1], edges[1:]), 1).flatten(), count.repeat_interleave(2)), 1
        )
        draw.line(panel.pixels(steps), fill=_colour(row), width=FINE + 1)


def _pairs(size: int) -> Iterator[list[int]]:
    """Indices of coordinates that are drawn together; the last of an odd number joins the first."""
    if size == 1:
        yield [0]
        return
    for first in range(0, min(size, 2 * PANELS), 2):
        yield [first, first + 1 if first + 1 < size else 0]


def _finite_pieces(points: Tensor) -> Iterator[Tensor]:
    """The stretches of points (N, 2) without a value that is not finite."""
    is_finite = points.isfinite().all(1)
    start = 0
    for end in [*(~is_finite).nonzero().flatten().tolist(), len(points)]:
        if end > start:
            yield points[start:end]
        start = end + 1


def _bounds(values: Tensor) -> tuple[float, float]:
    """Bounds of an axis, 4 % wider than the finite values."""
    finite = values[values.isfinite()].double()
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    pad = 0.04 * (high - low) or 0.5
    return low - pad, high + pad


def _box(left: float, top: float, width: float, height: float) -> Box:
    """The frame of a panel in pixels of the drawing, inside its margins."""
    right, bottom = left + width - 8, top + height - 18
    return FINE * (left + MARGIN), FINE * (top + 6), FINE * right, FINE * bottom


def _sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (FINE * width, FINE * height), "white")
    return sheet, ImageDraw.Draw(sheet)


def _finish(sheet: Image.Image) -> Image.Image:
    return sheet.resize((sheet.width // FINE, sheet.height // FINE), Image.Resampling.BOX)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=FINE * size)


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]
