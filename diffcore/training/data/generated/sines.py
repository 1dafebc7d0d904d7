"""Sine waves of random frequency, phase and amplitude."""

import math

import torch

from diffcore.training.data.generated.generated import GeneratedData

__all__ = ["Sines"]


class Sines(GeneratedData):
    """Sine waves (1, length) of random frequency, phase and amplitude.

        x_0(k) = a sin(2π (f k/length + φ)),   k = 0 .. length - 1

    The frequency f is uniform in (low, high) periods per signal, φ in (0, 1) and a in (½, 1). A
    signal is thus determined by three numbers, which a spectrum recovers.

    Args:
        count: number of signals.
        length: number of values of a signal, at least 2.
        low: smallest number of periods in a signal.
        high: largest number of periods in a signal, at most length/2, the Nyquist frequency.
        seed: 64-bit seed; another one gives independent signals.

    Raises:
        ValueError: there are no signals, or a length or frequency is out of range.

    Example:
        >>> x0, label = Sines(3, length=32)[0]
        >>> x0.shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        count: int = 10_000,
        length: int = 128,
        low: float = 2.0,
        high: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(count, seed, length, low, high)
        if length < 2:
            raise ValueError(f"length is {length}, expected at least 2 values")
        if not 0 < low < high <= length / 2:
            raise ValueError(
                f"low and high are {low} and {high}, expected 0 < low < high <= {length / 2:g}, "
                "half the length"
            )
        frequency, phase, amplitude = self._uniform(3).unbind(1)
        frequency = low + (high - low) * frequency
        time = torch.arange(length, dtype=torch.float64) / length
        angle = 2 * math.pi * (frequency[:, None] * time + phase[:, None])
        self.x0 = ((0.5 + amplitude[:, None] / 2) * angle.sin())[:, None].float()
