"""References for tests: exact denoisers, their exact flow, and networks with exact outputs."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.oracle import GaussianMixture
from diffcore.core.prediction import Prediction, PredictionType
from diffcore.core.process import Process, TimeConditioning
from diffcore.schedules import Cosine, Discrete, Flow, Level, Schedule, ZeroTerminalSNR
from diffcore.schedules.base import Scaling

PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
TO_NOISE = {  # schedules that reach α = 0
    "cosine": Cosine(),
    "flow": Flow(),
    "table": ZeroTerminalSNR(Discrete()),
    "table, flow": ZeroTerminalSNR(Discrete(scaling="flow")),
}
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])
MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)


def covariance(long: float, short: float, angle: float) -> Tensor:
    """A 2-D covariance with these standard deviations along axes rotated by `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return axes @ torch.diag(torch.tensor([long**2, short**2], dtype=torch.float64)) @ axes.T


COVARIANCES = torch.stack(
    [covariance(0.6, 0.2, 0.4), covariance(0.4, 0.3, -1.0), covariance(0.5, 0.25, 2.0)]
)


def process(
    schedule: Schedule | None = None,
    shape: Sequence[int] = (2,),
    classes: int = 2,
    **fields: object,
) -> Process:
    """A process for 2-D data with two classes."""
    dropout = 0.1 if classes else 0.0
    return Process(
        schedule or Cosine(), shape=tuple(shape), classes=classes, **({"dropout": dropout} | fields)
    )


def mixture(record: Process | None = None) -> GaussianMixture:
    """Three anisotropic Gaussians in 2-D: class 0 is the first, class 1 the other two."""
    return GaussianMixture(MEANS, COVARIANCES, WEIGHTS, LABELS, record or process())


def gaussian(mean: Sequence[float], cov: Tensor, record: Process | None = None) -> GaussianMixture:
    """The exact denoiser of one Gaussian."""
    record = record or process(shape=(len(mean),))
    return GaussianMixture(
        torch.tensor([mean], dtype=torch.float64), cov.double()[None], process=record
    )


def flow(denoise: DenoiserProtocol, x: Tensor, start: Level, end: Level) -> Tensor:
    """The solution of the probability flow between two levels, of the shape of x.

    DOP853 integrates dz/da = ε - x_0 with z = x/(α+σ) and a = σ/(α+σ).
    """

    def velocity(a: float, z: np.ndarray) -> np.ndarray:
        level = _at_blend(start.schedule, a)
        at = torch.from_numpy(z).view_as(x) * (level.alpha + level.sigma)
        prediction = denoise(at, level)
        return (prediction.eps - prediction.x0).flatten().numpy()

    z = (x / (start.alpha + start.sigma)).flatten().numpy()
    span = (start.sigma / (start.alpha + start.sigma), end.sigma / (end.alpha + end.sigma))
    solution = solve_ivp(
        velocity, span, z, method="DOP853", rtol=1e-13, atol=1e-13, t_eval=span[1:]
    )
    return torch.from_numpy(solution.y[:, -1]).view_as(x) * (end.alpha + end.sigma)


def _at_blend(schedule: Schedule, a: float) -> Level:
    with np.errstate(divide="ignore"):
        return schedule.at(float(2 * (np.log1p(-a) - np.log(a))))


class ExactNetwork(nn.Module):
    """A network with the exact output for its process's prediction type and time conditioning.

    The outputs and the inverse of the time conditioning are written independently of the library's.
    """

    def __init__(self, oracle: DenoiserProtocol, record: Process) -> None:
        super().__init__()
        self.oracle, self.process = oracle, record
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls.append((x, time, class_labels))
        level = self._level(time.double().view(-1, *[1] * (x.ndim - 1)))
        alpha, sigma, s = level.alpha, level.sigma, self.process.sigma_data
        norm = (sigma**2 + alpha**2 * s**2).sqrt()
        if self.process.prediction == "edm":
            x = x * norm
        x0, eps = self.oracle(x, level, class_labels)
        match self.process.prediction:
            case "epsilon":
                return eps
            case "sample":
                return x0
            case "v_prediction":  # the angle of the vp process
                angle = torch.atan2(sigma, alpha)
                return angle.cos() * eps - angle.sin() * x0
            case "flow_prediction":
                return eps - x0
            case "edm":  # (x_0 - c_skip x/α) / c_out, in a form that is finite at α = 0
                return (sigma * x0 - alpha * s**2 * eps) / (s * norm)

    def _level(self, time: Tensor) -> Level:
        conditioning, schedule = self.process.time, self.process.schedule
        match conditioning.variable:
            case "index":
                return schedule.level((time + 1) / conditioning.scale)
            case "t":
                return schedule.level(time / conditioning.scale)
            case "blend":
                a = time / conditioning.scale
                return schedule.at(2 * (torch.log1p(-a) - a.log()))
            case "logsnr":
                return schedule.at(time / conditioning.scale)
            case "sigma":
                return schedule.at(-2 * (time / conditioning.scale).log())


class PointMass:
    """The exact denoiser of a distribution concentrated at one point."""

    def __init__(self, point: Tensor, record: Process) -> None:
        self.point, self.process = point, record

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        return Prediction(self.point.expand_as(x), (x - level.alpha * self.point) / level.sigma)


class Pair:
    """p(x | class) = N(0, 1) and p(x) = N(0, 2), for which guided flows are linear in x."""

    def __init__(self, conditional: float = 1.0, reference: float = 2.0) -> None:
        self.process = process(Flow(), shape=(1,), classes=1)
        variances = (conditional, reference)
        self.conditional, self.reference = (
            gaussian([0.0], torch.tensor([[v]]), self.process) for v in variances
        )

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        null = torch.ones(len(x)) if condition is None else condition
        pairs = zip(self.reference(x, level), self.conditional(x, level), strict=True)
        return Prediction(*(torch.where((null == 1)[:, None], a, b) for a, b in pairs))


def time_conditioning(variable: str) -> TimeConditioning:
    """A time conditioning by `variable` with an unusual scale."""
    scales = {"index": 1000.0, "t": 1000.0, "blend": 500.0, "logsnr": -0.125, "sigma": 3.0}
    return TimeConditioning(variable, scale=scales[variable])


def unet() -> nn.Module:
    """A small class-conditional UNet2DModel on 8x8 images.

    It contains convolutions, attention, group norms and class embeddings.
    """
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
