"""Predictions: what a network says about x = α x_0 + σ ε, and the five quantities F that a network
can output.

    epsilon            F = ε
    sample             F = x_0
    v_prediction       F = α_v ε - σ_v x_0,  α_v² = sigmoid(λ), σ_v² = sigmoid(-λ)      the vp
    process's v, in any scaling flow_prediction    F = ε - x_0 edm                F = (x_0 - c_skip
    x) / c_out, network asked about c_in x          Karras et al. 2022, eq. 7

Each pair (x, F) gives x_0 and ε once, each by the formula that is stable there; samplers and
guidance see nothing else. With n² = α² + σ² (edm: σ² + α² s², s the standard deviation of the data)
the formulas hold in every scaling.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffcore.schedules import Level, Real

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]


class Prediction(NamedTuple):
    """The x_0 and ε that a network sees in x = α x_0 + σ ε; both have the shape of x."""

    x0: Tensor
    eps: Tensor

    def at(self, level: Level) -> Tensor:
        """α x_0 + σ ε at another level: the first-order step of every sampler."""
        level = level.to(self.x0)
        return add_scaled(level.alpha * self.x0, level.sigma, self.eps)


def add_scaled(x: Tensor, b: Real, y: Tensor) -> Tensor:
    """X + b y, in one pass over memory where b is a number: a step should cost little beside the
    network.
    """
    return x + b * y if isinstance(b, Tensor) else torch.add(x, y, alpha=b)


def predict(
    prediction_type: PredictionType, output: Tensor, x: Tensor, level: Level, sigma_data: float
) -> Prediction:
    """(x_0, ε) from the network's output F at x.

    Stable from λ = -inf to +inf, except `epsilon` where α = 0 and `sample` where σ = 0: no network
    can know there.
    """
    alpha, sigma, F = level.alpha, level.sigma, output
    match prediction_type:
        case "epsilon":
            return Prediction(add_scaled(x, -sigma, F) / alpha, F)
        case "sample":
            return Prediction(F, (x - alpha * F) / sigma)
        case "v_prediction":
            n = hypot(alpha, sigma)
            a, s = alpha / n, sigma / n
            return Prediction(add_scaled((a / n) * x, -s, F), add_scaled((s / n) * x, a, F))
        case "flow_prediction":
            n = alpha + sigma
            return Prediction(add_scaled(x, -sigma, F) / n, add_scaled(x, alpha, F) / n)
        case "edm":
            n, s = edm_norm(level, sigma_data), sigma_data
            x0 = add_scaled(((alpha * s / n) * (s / n)) * x, sigma * s / n, F)
            return Prediction(x0, add_scaled((sigma / n / n) * x, -alpha * s / n, F))
    raise ValueError(_unknown(prediction_type))


def target(
    prediction_type: PredictionType, x0: Tensor, eps: Tensor, level: Level, sigma_data: float
) -> Tensor:
    """The F that a network should output where x = α x_0 + σ ε."""
    alpha, sigma = level.alpha, level.sigma
    match prediction_type:
        case "epsilon":
            return eps
        case "sample":
            return x0
        case "v_prediction":
            n = hypot(alpha, sigma)
            return (alpha / n) * eps - (sigma / n) * x0
        case "flow_prediction":
            return eps - x0
        case "edm":
            n, s = edm_norm(level, sigma_data), sigma_data
            return (sigma / (s * n)) * x0 - (alpha * s / n) * eps
    raise ValueError(_unknown(prediction_type))


def log_gain(prediction_type: PredictionType, logsnr: Tensor, sigma_data: float) -> Tensor:
    """Ln |∂x_0/∂F|² at fixed x: what turns a weight on the squared x_0 error into one on the
    squared error of F.
    """
    match prediction_type:
        case "epsilon":
            return -logsnr
        case "sample":
            return 0 * logsnr
        case "v_prediction":
            return logsigmoid(-logsnr)
        case "flow_prediction":
            return 2 * logsigmoid(-logsnr / 2)
        case "edm":
            shift = 2 * math.log(sigma_data)
            return shift + logsigmoid(-logsnr - shift)
    raise ValueError(_unknown(prediction_type))


def edm_norm(level: Level, sigma_data: float) -> Real:
    """N = √(σ² + α² s²), the standard deviation of x: a preconditioned network is asked about x /
    n.
    """
    return hypot(level.alpha * sigma_data, level.sigma)


def scale_input(kind: PredictionType, x: Tensor, level: Level, sigma_data: float) -> Tensor:
    """The network's input for x: x / √(σ² + α² s²) for `edm` (its c_in), else x.

    Args:
        kind: prediction type of the network.
        x: noisy samples (B, ...).
        level: their noise level.
        sigma_data: s, the standard deviation of the data.

    Returns:
        A tensor of the shape of x.
    """
    return x / edm_norm(level, sigma_data) if kind == "edm" else x


def unscale_input(kind: PredictionType, scaled: Tensor, level: Level, sigma_data: float) -> Tensor:
    """The inverse of `scale_input`: x of a network's input.

    Args:
        kind: prediction type of the network.
        scaled: the network's input (B, ...).
        level: noise level of x.
        sigma_data: s, the standard deviation of the data.

    Returns:
        x, of the shape of the input.
    """
    return scaled * edm_norm(level, sigma_data) if kind == "edm" else scaled


def hypot(a: Real, b: Real) -> Real:
    """√(a² + b²); of tensors, whose a² may overflow, in one function, of numbers in a form that
    torch.compile can trace.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.hypot(b)
    assert not isinstance(a, Tensor)
    assert not isinstance(b, Tensor)
    return math.sqrt(a * a + b * b)


def _unknown(prediction_type: str) -> str:
    return (
        f"prediction is {prediction_type!r}, expected one of {', '.join(get_args(PredictionType))}"
    )
