"""Check samples of the recipes on generated data against the known answer.

    python scripts/check_generated.py points points.npz
    python scripts/check_generated.py signals signals.npy

points   energy distance between samples and fresh data, beside that of two fresh data sets
signals  share of energy outside the best sine wave; distribution of frequency and amplitude
volumes  error against the best ball; distribution of its radius
video    error against a ball that moves straight at constant speed
"""

import sys

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.spatial.distance import cdist
from scipy.stats import kstest

from diffcore.training.data.generated.balls import RADII, RADIUS, draw_balls
from diffcore.training.data.generated.sines import Sines
from diffcore.training.data.generated.two_moons import TwoMoons

FRESH = 4
"""Number of fresh data sets, of seeds 1 .. FRESH."""


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased: 0 on average for equal distributions."""
    within = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * cdist(a, b).mean() - sum(within))


def check_points(arrays) -> None:
    """Compare points of each label with fresh ones."""
    x, label = arrays["x"], arrays["label"]
    for k in (0, 1):
        own = x[label == k]
        fresh = [TwoMoons(2 * len(own), seed=s).x0.numpy()[k::2] for s in range(1, FRESH + 1)]
        samples = [energy_distance(own, data) for data in fresh]
        data = [energy_distance(a, b) for i, a in enumerate(fresh) for b in fresh[:i]]
        print(
            f"label {k}, {len(own)} points: energy distance to fresh data "
            f"{min(samples):.5f} .. {max(samples):.5f}, of two fresh data sets "
            f"{min(data):.5f} .. {max(data):.5f}"
        )


def fit_sine(x: np.ndarray) -> tuple[float, float, float]:
    """Frequency and amplitude of the best sine wave, and the share of energy outside of it."""
    time, best = np.arange(len(x)) / len(x), (1.0, 0.0, 0.0)
    grid = np.arange(0.5, len(x) / 2, 0.1)
    start = grid[np.argmax([abs(np.exp(2j * np.pi * f * time) @ x) for f in grid])]
    for f in start + np.linspace(-0.3, 0.3, 121):
        basis = np.stack((np.sin(2 * np.pi * f * time), np.cos(2 * np.pi * f * time)), 1)
        weights = np.linalg.lstsq(basis, x, rcond=None)[0]
        outside = np.sum((basis @ weights - x) ** 2) / np.sum(x**2)
        best = min(best, (outside, f, float(np.hypot(*weights))))
    return best[1], best[2], best[0]


def check_signals(x: np.ndarray) -> None:
    """Fit a sine wave to each signal, and compare its numbers with the uniform distributions."""
    for name, signals in (("samples", x), ("data", Sines(len(x), x.shape[-1], seed=1).x0.numpy())):
        found = np.array([fit_sine(signal) for signal in signals[:, 0].astype(float)])
        frequency, amplitude, outside = found.T
        print(
            f"{name}: {len(x)} signals; energy outside the best sine wave: median "
            f"{np.median(outside):.2e}, 90 % below {np.quantile(outside, 0.9):.2e}; frequency "
            f"{describe((frequency - 2) / 8)}; amplitude {describe(2 * amplitude - 1)}"
        )


def describe(values: np.ndarray) -> str:
    """Greatest difference from the uniform distribution on (0, 1), and its bound for data."""
    bound = 1.36 / np.sqrt(len(values))
    distance = kstest(values, "uniform").statistic
    return f"differs from uniform by {distance:.3f} (95 % of data sets: below {bound:.3f})"


def check_volumes(x: np.ndarray) -> None:
    """Fit a ball to each volume."""
    size = x.shape[-1]
    found = [fit_balls(volume, size, fit_centre_and_radius) for volume in torch.tensor(x[:, 0])]
    radius = np.array([numbers[3] for numbers, _ in found]) / size
    report(found)
    print(f"radius {describe((radius - RADII[0]) / (RADII[1] - RADII[0]))}")


def check_video(x: np.ndarray) -> None:
    """Fit a ball that moves straight to each video."""
    report([fit_balls(video, x.shape[-1], fit_path) for video in torch.tensor(x[:, 0])])


def report(found: list[tuple[np.ndarray, float]]) -> None:
    """Print the root mean square of the differences from the fits."""
    errors = [error for _, error in found]
    print(
        f"{len(found)} samples; root mean square difference from the best fit, of values in "
        f"[-1, 1]: median {np.median(errors):.3f}, 90 % below {np.quantile(errors, 0.9):.3f}"
    )


def fit_centre_and_radius(numbers: torch.Tensor, size: int, frames: int) -> torch.Tensor:
    """A volume with a ball of the centre numbers[:3] and the radius numbers[3]."""
    return draw_balls(numbers[None, :3], numbers[3:], size)[0]


def fit_path(numbers: torch.Tensor, size: int, frames: int) -> torch.Tensor:
    """A video of a ball from numbers[:2] to numbers[2:4]."""
    share = torch.linspace(0, 1, frames)[:, None]
    centre = numbers[:2] * (1 - share) + numbers[2:4] * share
    return draw_balls(centre, torch.full((frames,), RADIUS * size), size)


def fit_balls(x: torch.Tensor, size: int, render) -> tuple[np.ndarray, float]:
    """The numbers of the best rendered sample, and the root mean square of the difference."""
    weight = (x.clamp(-1, 1) + 1).double() ** 2
    places = torch.arange(size) + 0.5
    if x.shape[0] == size:  # a volume
        axes = [(weight.sum([b for b in range(3) if b != a]) * places).sum() for a in range(3)]
        radius = (float((x > 0).sum()) * 0.75 / np.pi) ** (1 / 3)
        start = [*(float(total / weight.sum()) for total in axes), radius]
    else:
        ends = [weight[0], weight[-1]]
        start = [float((f.sum(1 - a) * places).sum() / f.sum()) for f in ends for a in range(2)]

    def difference(numbers: np.ndarray) -> np.ndarray:
        rendered = render(torch.tensor(numbers, dtype=torch.float32), size, len(x))
        return (rendered - x).flatten().double().numpy()

    fit = least_squares(difference, start, diff_step=1e-3)
    return fit.x, float(np.sqrt(np.mean(fit.fun**2)))


CHECKS = {
    "points": check_points,
    "signals": check_signals,
    "volumes": check_volumes,
    "video": check_video,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](np.load(sys.argv[2]))
