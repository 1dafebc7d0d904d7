"""Predictions: the pair (x_0, ε) estimated from x = α x_0 + σ ε, and the five network outputs F.

    epsilon            F = ε
    sample             F = x_0
    v_prediction       F = α_v ε - σ_v x_0,  α_v² = sigmoid(λ), σ_v² = sigmoid(-λ)
    flow_prediction    F = ε - x_0
    edm                F = (x_0 - c_skip x) / c_out, the network's input is c_in x

v is that of the vp process in every scaling; edm is the preconditioning of Karras et al. 2022
(2206.00364, eq. 7). A pair (x, F) determines x_0 and ε, each by the formula that is stable there;
samplers and guidance use only this pair. With n² = α² + σ² (edm: n² = σ² + α² s², where s is the
standard deviation of the data) the formulas hold in every scaling.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffcore.schedules import Level, Real

__all__ = [
    "Prediction",
    "PredictionType",
    "add_scaled",
    "add_to_x0",
    "at_least_float32",
    "dot_per_sample",
    "edm_norm",
    "expand_per_sample",
    "hypot",
    "log_gain",
    "predict",
    "scale_input",
    "target",
    "unscale_input",
]

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's estimate of x_0 and of ε in x = α x_0 + σ ε.

    Iteration gives the pair: `x0, eps = prediction`.

    Args:
        x0: estimate of x_0, of the shape of x.
        eps: estimate of ε, of the shape of x.
        variance: v of the variance β̃^(1-v) β^v of a step (`diffcore.core.transition`), of the shape
            of x; None for a network whose process has no learned variance.
        encoding: what x contains of x_0 at a level, as a function of x_0 and the level
            (`MeanEncoder`); None: x_0 itself.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None
    encoding: Callable[[Tensor, Level], Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.pair)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(x_0, ε)."""
        return self.x0, self.eps

    def at(self, level: Level) -> Tensor:
        """α x_0 + σ ε at another level, of the shape of x: the first-order step of samplers.

        With an `encoding`, x_0 is replaced by its value there.
        """
        level = level.to(self.x0)
        x0 = self.x0 if self.encoding is None else self.encoding(self.x0, level)
        return add_scaled(level.alpha * x0, level.sigma, self.eps)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its dtype is narrower, else x itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_scaled(x: Tensor, b: Real, y: Tensor) -> Tensor:
    """x + b y, of the shape of x; one pass over memory if b is a number.

    Args:
        x: first term.
        b: factor, a number or a tensor that broadcasts against x.
        y: second term, of the shape of x.
    """
    return x + b * y if isinstance(b, Tensor) else x.add(y, alpha=b)


def predict(
    prediction_type: PredictionType, output: Tensor, x: Tensor, level: Level, sigma_data: float
) -> Prediction:
    """The prediction (x_0, ε) from the network's output F at x, both of the shape of x.

    It is stable from λ = -inf to +inf, except for `epsilon` at α = 0, where F does not determine
    x_0, and for `sample` at σ = 0, where it does not determine ε.

    Args:
        prediction_type: the quantity that the network outputs.
        output: the network's output F, of the shape of x.
        x: noisy samples (B, ...), not scaled.
        level: noise level of all samples, or levels that broadcast against x.
        sigma_data: standard deviation s of the data; only edm uses it.

    Raises:
        ValueError: the prediction type is unknown; the message lists the known ones.
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
    """The output F that a network should have at x = α x_0 + σ ε, of the shape of x_0.

    Args:
        prediction_type: the quantity that the network outputs.
        x0: clean samples (B, ...).
        eps: noise, of the shape of x_0.
        level: noise level of all samples, or levels that broadcast against x_0.
        sigma_data: standard deviation s of the data; only edm uses it.

    Raises:
        ValueError: the prediction type is unknown; the message lists the known ones.
    """
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
    """ln |∂x_0/∂F|² at fixed x, of the shape of λ.

    It converts a weight on the squared error of x_0 into one on the squared error of F.

    Args:
        prediction_type: the quantity that the network outputs.
        logsnr: λ = ln(α²/σ²), of any shape.
        sigma_data: standard deviation s of the data; only edm uses it.

    Raises:
        ValueError: the prediction type is unknown; the message lists the known ones.
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
    """n = √(σ² + α² s²), the standard deviation of x: a number, or of the shape of the level.

    The input of a preconditioned network is x / n.
    """
    return hypot(level.alpha * sigma_data, level.sigma)


def scale_input(
    prediction_type: PredictionType, x: Tensor, level: Level, sigma_data: float
) -> Tensor:
    """The network's input for x: x / √(σ² + α² s²) for `edm` (its c_in), else x.

    Args:
        prediction_type: prediction type of the network.
        x: noisy samples (B, ...).
        level: their noise level.
        sigma_data: s, the standard deviation of the data.

    Returns:
        A tensor of the shape of x.
    """
    return x / edm_norm(level, sigma_data) if prediction_type == "edm" else x


def unscale_input(
    prediction_type: PredictionType, scaled: Tensor, level: Level, sigma_data: float
) -> Tensor:
    """The inverse of `scale_input`: x of a network's input.

    Args:
        prediction_type: prediction type of the network.
        scaled: the network's input (B, ...).
        level: noise level of x.
        sigma_data: s, the standard deviation of the data.

    Returns:
        x, of the shape of the input.
    """
    return scaled * edm_norm(level, sigma_data) if prediction_type == "edm" else scaled


def hypot(a: Real, b: Real) -> Real:
    """√(a² + b²), a number or of the shape of the tensors.

    `Tensor.hypot` avoids the overflow of a²; the formula for numbers can be traced by
    torch.compile.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.hypot(b)
    assert not isinstance(a, Tensor)
    assert not isinstance(b, Tensor)
    return math.sqrt(a * a + b * b)


def _unknown(prediction_type: str) -> str:
    """The message for a prediction type that does not exist."""
    return (
        f"prediction is {prediction_type!r}, expected one of {', '.join(get_args(PredictionType))}"
    )


def add_to_x0(prediction: Prediction, change: Tensor, level: Level) -> Prediction:
    """Add a change to x_0, and adjust ε so that x = α x_0 + σ ε still holds.

    Args:
        prediction: prediction to change.
        change: (B, *shape) what is added to x_0.
        level: level of the prediction.

    Returns:
        The changed prediction. At σ = 0, where x is x_0, it is `prediction` itself.
    """
    alpha, sigma = level.alpha, level.sigma
    ratio: Real
    if isinstance(sigma, Tensor):  # levels that differ between samples
        ratio = torch.as_tensor(alpha / sigma).where(sigma > 0, 0.0)
        change = change.where(sigma > 0, 0.0)
    elif sigma == 0:
        return prediction
    else:
        ratio = alpha / sigma
    eps = prediction.eps - ratio * change
    return replace(prediction, x0=prediction.x0 + change, eps=eps)


def dot_per_sample(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, shape (B, 1, ..., 1)."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def expand_per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value for each sample, reshaped from (B,) to (B, 1, ..., 1) to broadcast to x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
