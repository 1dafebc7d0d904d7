"""Dequantisation: from the density of a flow to the probability of quantised data.

Quantised data have `bins` equally spaced values; a value stands for the bin of width Δ around it.
For noise y of a distribution q on the bin of x_0, and the density p of the flow,

    ln P(x_0) = ln ∫_bin p(y) dy ≥ E_q[ln p(y) - ln q(y)] = E_q[ln p(y)] + H(q)

With K draws the bound is E ln (1/K) Σ_k p(y_k)/q(y_k), which increases with K to ln P (Burda et al.
2015, 1509.00519). Such a probability, unlike a density, has a bound of 0 bits.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.evaluation.likelihood.density import first_level
from diffcore.schedules import Level

__all__ = [
    "DRAW_BITS",
    "Dequantisation",
    "Dequantised",
    "TruncatedNormal",
    "Uniform",
    "bin_width",
    "check_values",
    "detect_bins",
]

EIGHT_BITS, SIXTEEN_BITS = 256, 65536
SEARCHED_BINS = 4096
"""Largest number of values that is searched for between those of 8 and of 16 bits."""
GRID_TOLERANCE = 1e-3
"""Largest distance of a value from its grid, as a part of the width of a bin."""
DRAW_BITS = 32
"""Bits of a position that number the sample; those above number the draw."""


class Dequantised(NamedTuple):
    """One draw of y.

    Args:
        y: (B, *shape) data with noise, in the space of x_0, float64.
        log_q: (B,) ln q(y) in nats.
    """

    y: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class Dequantisation(ABC):
    """Noise on quantised data.

    Args:
        bins: number of equally spaced values of the data, from the low to the high end of the
            process's range: 256 for images of 8 bits, 17 for the bundled digits.

    Raises:
        ValueError: there are fewer than two values.
    """

    bins: int

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= SIXTEEN_BITS:
            raise ValueError(
                f"bins is {self.bins}, expected the number of values of the data, from 2 to "
                f"{SIXTEEN_BITS}"
            )

    @abstractmethod
    def level(self, process: Process) -> Level:
        """Determine the level at which the density of y is evaluated.

        Args:
            process: process with the schedule and with the range of the data.

        Returns:
            The level, at most as clean as those of training.
        """

    @abstractmethod
    def entropy(self, process: Process) -> float:
        """Compute the entropy of the noise in closed form.

        Args:
            process: process with the schedule and with the range of the data.

        Returns:
            H(q) of one element in nats.
        """

    @abstractmethod
    def _noise(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        """y - x_0 and ln q, each of the shape of u, which is uniform in (0, 1)."""

    def draw(
        self, process: Process, x0: Tensor, seed: int, position: Tensor, draw: int = 0
    ) -> Dequantised:
        """Add noise to data.

        Args:
            process: process with the range of the data.
            x0: (B, *shape) data.
            seed: 64-bit seed.
            position: (B,) position of each sample, below 2^32; its noise is a function of it.
            draw: number of the draw.

        Returns:
            y and ln q(y).
        """
        size = math.prod(process.shape)
        key = position + (draw << DRAW_BITS)
        u = uniform(seed, Stream.DEQUANTISATION, key, size)
        noise, log_q = self._noise(process, u)
        return Dequantised(x0.double() + noise.unflatten(1, process.shape), log_q.sum(1))


@dataclass(frozen=True)
class Uniform(Dequantisation):
    """y uniform on the bin of x_0: H = ln Δ for each element.

    The density is evaluated at σ/α = 0.001, or at the cleanest level of training. A network that
    was trained on quantised data without this noise has a density that is concentrated at the
    values, so that the bound is loose; `TruncatedNormal` fits such a network.

    Theis et al. 2015 (1511.01844).

    Args:
        bins: number of equally spaced values of the data, from the low to the high end of the
            process's range.
    """

    def level(self, process: Process) -> Level:
        return first_level(process)

    def entropy(self, process: Process) -> float:
        return math.log(bin_width(process, self.bins))

    def _noise(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        width = bin_width(process, self.bins)
        return width * (u - 0.5), torch.full_like(u, -math.log(width))


@dataclass(frozen=True)
class TruncatedNormal(Dequantisation):
    """y = x_0 + (σ/α) z at the level whose noise fills the bin, z normal within ±τ.

        τ σ/α = Δ/2
        H = ½ (1 + ln 2π(σ/α)²) + ln Z - τ/(√(2π) Z) e^(-τ²/2),   Z = erf(τ/√2)

    The noise is that of training but for the tails, so that the network need not be trained for it,
    and the flow ends before the levels at which it resolves the values. If the cleanest level of
    training is noisier, the density is evaluated there, with a smaller τ.

    Zheng et al. 2023 (2305.03935, section 4), whose experiments have τ = 3.02 for 8 bits.

    Args:
        bins: number of equally spaced values of the data, from the low to the high end of the
            process's range.
        tau: τ, standard deviations of the noise in half of a bin; above 0.

    Raises:
        ValueError: τ is not positive.
    """

    tau: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 30:
            raise ValueError(
                f"tau is {self.tau}, expected a number of standard deviations within (0, 30]"
            )

    def level(self, process: Process) -> Level:
        ratio = bin_width(process, self.bins) / (2 * self.tau)
        return first_level(process, -2 * math.log(ratio))

    def effective_tau(self, process: Process) -> float:
        """Compute τ at the level of the density.

        Args:
            process: process with the schedule and with the range of the data.

        Returns:
            At most `tau`; less if the cleanest level of training is noisier than the bin.
        """
        return bin_width(process, self.bins) / (2 * self._ratio(process))

    def entropy(self, process: Process) -> float:
        tau, ratio = self.effective_tau(process), self._ratio(process)
        mass = math.erf(tau / math.sqrt(2))
        tail = tau / (math.sqrt(2 * math.pi) * mass) * math.exp(-(tau**2) / 2)
        return (1 + math.log(2 * math.pi * ratio**2)) / 2 + math.log(mass) - tail

    def _ratio(self, process: Process) -> float:
        return float(self.level(process).ratio)

    def _noise(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        tau, ratio = self.effective_tau(process), self._ratio(process)
        mass = math.erf(tau / math.sqrt(2))
        z = torch.special.ndtri((1 - mass) / 2 + mass * u).clamp(-tau, tau)
        log_norm = math.log(math.sqrt(2 * math.pi) * ratio * mass)
        return ratio * z, -z.square() / 2 - log_norm


def bin_width(process: Process, bins: int) -> float:
    """Δ, the distance of neighbouring values from the low to the high end of the process's range.

    Args:
        process: process with the range of the data.
        bins: number of values.

    Returns:
        The distance in the unit of the data.

    Raises:
        ValueError: the range is infinite. Set process.low and process.high.
    """
    width = (process.high - process.low) / (bins - 1)
    if not math.isfinite(width):
        raise ValueError(
            f"the process's range is [{process.low}, {process.high}], which has no {bins} equally "
            "spaced values: set process.low and process.high to the range of the data, or measure "
            "the density without dequantisation"
        )
    return width


def check_values(process: Process, x0: Tensor, bins: int) -> None:
    """Check that data have no other values than those of the bins.

    Args:
        process: process with the range of the data.
        x0: data of any shape.
        bins: number of values.

    Raises:
        ValueError: a value is not one of them. The message contains the number that fits, if there
            is one.
    """
    if _is_on_grid(process, x0.unique(), bins):
        return
    found = detect_bins(process, x0)
    remedy = (
        f"use bins = {found}" if found else "these data are not quantised to any number of them"
    )
    raise ValueError(
        f"the data has other values than the {bins} equally spaced ones from {process.low:g} to "
        f"{process.high:g}: {remedy}"
    )


def detect_bins(process: Process, x0: Tensor) -> int | None:
    """The number of equally spaced values that data have.

    It is 256 if all values are among those of 8 bits, since an image need not use each of them.
    Otherwise it is the smallest number up to 4096 whose values contain those of the data, or 65536
    if they are among those of 16 bits.

    Args:
        process: process with the range of the data.
        x0: data of any shape.

    Returns:
        The number of values; None if the data are not quantised, or their range is infinite.
    """
    if not math.isfinite(process.high - process.low):
        return None
    values = x0.unique()
    if len(values) > SIXTEEN_BITS:
        return None
    searched = range(2, SEARCHED_BINS + 1) if len(values) <= SEARCHED_BINS else ()
    candidates = (EIGHT_BITS, *searched, SIXTEEN_BITS)
    return next((bins for bins in candidates if _is_on_grid(process, values, bins)), None)


def _is_on_grid(process: Process, values: Tensor, bins: int) -> bool:
    """Whether each of the values is one of the bins' centres, up to rounding."""
    position = (values.double() - process.low) / bin_width(process, bins)
    distance = (position - position.round()).abs().max()
    is_inside = position.min() > -0.5 and position.max() < bins - 0.5
    return bool(is_inside) and float(distance) <= max(GRID_TOLERANCE, 1e-7 * bins)
