"""The pictures of the playground: knots, trajectories and samples, each a PNG file."""

import math
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcore.cli.commands.playground.drawing import Drawing
from diffcore.core.oracle import Oracle
from diffcore.io.extras import import_extra
from diffcore.sampling import pictures
from diffcore.schedules import Level

__all__ = ["Panel", "draw_panels"]

SIDE, DPI = 4.4, 100
"""Height of a panel in inches, and pixels per inch."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS = "o^sDvPX*"
"""Colours and markers of labels, which repeat; the colours are those of Okabe and Ito."""
TRAJECTORIES = 24
"""Number of trajectories that are drawn for each label."""
LOGSNR_RANGE = 14.0
"""|λ| beyond which a knot is drawn at the border."""
SMOOTHED = 7.0
"""λ of the density that is drawn, at which a single point has a width of 0.03."""
CELLS = 90
"""Number of cells of the drawn density along each axis."""
STRIP, STRIP_ROWS = 8, 4
"""Largest number of predictions and of samples in the picture of trajectories of images."""
WIDEST = 6.0
"""Largest half side of a plane; samples beyond it are not drawn."""


class Panel(NamedTuple):
    """A picture with its heading.

    Args:
        title: heading.
        text: what the picture shows, for readers who do not see it.
        png: content of the PNG file.
    """

    title: str
    text: str
    png: bytes


def draw_panels(drawing: Drawing) -> list[Panel]:
    """Draw knots, trajectories and samples.

    Args:
        drawing: samples with their trajectories.

    Returns:
        Three pictures.
    """
    knots = drawing.samples.knots
    if drawing.model.denoiser.process.shape == (2,):
        trajectories, samples = _plane_trajectories(drawing), _plane_samples(drawing)
    else:
        trajectories, samples = _predictions(drawing), _sample_picture(drawing)
    text = ", ".join(f"{knot.logsnr:.3g}" for knot in knots)
    return [Panel("Knots", f"λ of the knots: {text}", _knots(drawing)), trajectories, samples]


def _knots(drawing: Drawing) -> bytes:
    """The knots over λ, on the density of the schedule's levels."""
    figure, axis = _figure()
    schedule, knots = drawing.model.denoiser.process.schedule, drawing.samples.knots
    logsnr = torch.linspace(-LOGSNR_RANGE, LOGSNR_RANGE, 400, dtype=torch.float64)
    density = schedule.density(logsnr).numpy()
    share = density / max(float(density.max()), 1e-9) * (len(knots) - 1)
    axis.fill_between(logsnr.numpy(), share, color="0.85", lw=0)
    border = LOGSNR_RANGE + 1
    shown = np.clip([knot.logsnr for knot in knots], -border, border)
    is_beyond = np.abs(shown) == border
    index = np.arange(len(knots))
    axis.plot(shown, index, color=COLOURS[0], lw=1)
    axis.scatter(shown[~is_beyond], index[~is_beyond], s=18, color=COLOURS[0], zorder=3)
    axis.scatter(
        shown[is_beyond], index[is_beyond], s=24, facecolor="w", edgecolor=COLOURS[0], zorder=3
    )
    axis.set(
        xlabel="λ = ln α²/σ²: noise on the left, data on the right",
        ylabel="knot (grey: density p(λ) of the schedule)",
        xlim=(-border - 0.5, border + 0.5),
    )
    axis.set_xticks([-border, -10, -5, 0, 5, 10, border], ["≤", -10, -5, 0, 5, 10, "≥"])
    axis.grid(alpha=0.3)
    return _png(figure)


def _plane_trajectories(drawing: Drawing) -> Panel:
    """Lines from noise to data, each x over the standard deviation √(α²+σ²) of its noise level."""
    figure, axis = _figure()
    knots, x = drawing.samples.knots, drawing.samples.x
    steps = drawing.step_starts
    places = [_normalised(e.x[: len(x)], e.level) for e in steps]
    count = len(places[0])
    points = torch.stack([*places, _normalised(x[:count], knots[-1])]).numpy()
    half = _half_side(points)
    _shade(axis, drawing.model.oracle, half)
    labels = (drawing.request.condition or [0] * count)[:count]
    for label in dict.fromkeys(labels):
        rows = [row for row in range(count) if labels[row] == label][:TRAJECTORIES]
        colour = COLOURS[label % len(COLOURS)]
        axis.plot(points[:, rows, 0], points[:, rows, 1], color=colour, lw=0.8, alpha=0.8)
        axis.scatter(*points[0, rows].T, s=10, facecolor="w", edgecolor=colour, zorder=3)
        axis.scatter(*points[-1, rows].T, s=10, color=colour, zorder=3)
    axis.set(xlabel="x/√(α²+σ²), first coordinate", ylabel="second coordinate")
    text = f"{len(steps)} steps from the noise (hollow) to the sample (filled)"
    return Panel("Trajectories", text, _png(figure))


def _plane_samples(drawing: Drawing) -> Panel:
    """The samples on the density of the data."""
    figure, axis = _figure()
    points = drawing.samples.x.numpy()
    half = _half_side(points)
    _shade(axis, drawing.model.oracle, half)
    labels = np.asarray(drawing.request.condition or [0] * len(points))
    for label, name in zip(dict.fromkeys(labels.tolist()), drawing.request.row_names, strict=True):
        axis.scatter(
            *points[labels == label].T,
            s=9,
            color=COLOURS[label % len(COLOURS)],
            marker=MARKERS[label % len(MARKERS)],
            label=name,
            lw=0,
        )
    if drawing.request.condition:
        axis.legend(loc="upper right", frameon=False, fontsize=9)
    axis.set(xlabel="x_0, first coordinate", ylabel="second coordinate")
    beyond = int((~(np.abs(points) <= half).all(1)).sum())
    text = f"{len(points)} samples" + (f", {beyond} of them beyond the picture" if beyond else "")
    return Panel("Samples", text, _png(figure))


def _predictions(drawing: Drawing) -> Panel:
    """The predictions of x_0 of the first samples, one row each, from noise to data."""
    chosen = _spread(len(drawing.step_starts), STRIP)
    evaluations = [drawing.step_starts[index] for index in chosen]
    process, rows = drawing.model.sample_process, min(STRIP_ROWS, drawing.request.count)
    if pictures.picture_of(process) == "points":
        x0 = torch.cat([evaluation.x0 for evaluation in evaluations])
        names, per_row = [f"λ {e.level.logsnr:.2g}" for e in evaluations], len(evaluations[0].x0)
    else:
        x0 = torch.stack([evaluation.x0[:rows] for evaluation in evaluations], 1).flatten(0, 1)
        names, per_row = [f"seed {seed}" for seed in drawing.request.seeds[:rows]], len(chosen)
    levels = ", ".join(f"{evaluation.level.logsnr:.3g}" for evaluation in evaluations)
    image = pictures.draw(drawing.model.decode(x0), process, names, per_row)
    return Panel("Predictions of x_0", f"predicted at λ = {levels}", _encode(image))


def _sample_picture(drawing: Drawing) -> Panel:
    """The samples as `diffcore sample` draws them."""
    request, process = drawing.request, drawing.model.sample_process
    columns = pictures.COLUMNS[pictures.picture_of(process)].samples
    per_row = request.per_label if request.condition else min(request.count, columns)
    names = request.row_names if request.condition else [""] * math.ceil(request.count / per_row)
    image = pictures.draw(drawing.model.decode(drawing.samples.x), process, names, per_row)
    return Panel("Samples", f"{request.count} samples", _encode(image))


def _normalised(x: Tensor, level: Level) -> Tensor:
    """x/√(α²+σ²): x itself in the scaling vp, and bounded in the scaling ve."""
    return x / math.hypot(float(level.alpha), float(level.sigma))


def _half_side(points: np.ndarray) -> float:
    """Half the side of a square around the origin that contains the points, within bounds."""
    finite = np.abs(points[np.isfinite(points)])
    return min(max(1.7, 1.05 * float(finite.max(initial=0))), WIDEST)


def _shade(axis: Any, oracle: Oracle | None, half: float) -> None:
    """Set the limits of a plane, and shade the density of an exact distribution."""
    axis.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    if oracle is None:
        return
    level = oracle.process.schedule.at(SMOOTHED)
    line = torch.linspace(-half, half, CELLS, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    density = oracle.log_density(level.alpha * points, level).exp().view(CELLS, CELLS).T.sqrt()
    axis.imshow(
        density.numpy(), origin="lower", extent=(-half, half, -half, half), cmap="Greys", alpha=0.45
    )


def _spread(count: int, most: int) -> list[int]:
    """At most this many indices below `count`, evenly spread, with the first and the last one."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _figure() -> tuple[Any, Any]:
    """A figure without pyplot, whose global state threads would share."""
    import_extra("matplotlib", "The playground")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE, SIDE), dpi=DPI)
    figure.subplots_adjust(left=0.14, bottom=0.12, right=0.98, top=0.98)  # laid out, it takes twice
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _encode(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
