"""Pictures of the pages on concepts: a digit at several noise levels, and errors of predictions."""

from pathlib import Path

import torch

from diffcore.core.prediction import PredictionType, log_gain
from diffcore.core.random import Stream, normal
from diffcore.report.figures import create_figure, line_styles, save_figure
from diffcore.schedules import Cosine
from diffcore.training.data import Digits

LEVELS = (float("inf"), 6.0, 3.0, 0.0, -3.0, -6.0, -float("inf"))
OUTPUTS: dict[str, PredictionType] = {
    "ε": "epsilon",
    "x_0": "sample",
    "v": "v_prediction",
    "ε - x_0": "flow_prediction",
    "EDM's output": "edm",
}
SIGMA_DATA = 0.5
DIGIT = 3


def draw_noise_levels(path: Path) -> None:
    """Write a row of one digit with the same noise at each of `LEVELS`.

    Args:
        path: image to write.
    """
    data = Digits()
    x0 = data.x0[int((data.labels == DIGIT).nonzero()[0])]
    noise = normal(0, Stream.NOISE, 0, tuple(x0.shape))[0]
    figure, axes = create_figure(len(LEVELS), width=1.35, height=1.75)
    for axis, logsnr in zip(axes, LEVELS, strict=True):
        level = Cosine().at(logsnr)
        axis.imshow((level.alpha * x0 + level.sigma * noise)[0], cmap="gray", vmin=-1.6, vmax=1.6)
        axis.axis("off")
        axis.set_title(f"λ = {logsnr:g}".replace("inf", "∞"))
    save_figure(figure, path)


def draw_predictions(path: Path) -> None:
    """Write |∂x_0/∂F| over λ for each network output F.

    Args:
        path: image to write.
    """
    logsnr = torch.linspace(-8, 8, 401, dtype=torch.float64)
    figure, (axis,) = create_figure(1, height=3.6)
    for (name, output), style in zip(OUTPUTS.items(), line_styles(len(OUTPUTS)), strict=True):
        gain = (log_gain(output, logsnr, SIGMA_DATA) / 2).exp()
        axis.plot(logsnr, gain, label=name, **style)
    axis.set(
        xlabel="λ = log α²/σ²  (right is clean)",
        ylabel="error of x_0 / error of the output",
        yscale="log",
        ylim=(0.01, 60),
    )
    save_figure(figure, path)
