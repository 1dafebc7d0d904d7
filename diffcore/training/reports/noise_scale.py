"""The gradient noise scale: the batch size at which noise and gradient are of equal size.

    B_simple = tr Σ / |G|²

Σ is the covariance of the gradient of one sample, G the expected gradient. With batches of b < B
samples (McCandlish et al. 2018, 1812.06162, appendix A.1)

    E |g_b|² = |G|² + tr Σ / b
    |G|²  ≈ (B |g_B|² - b |g_b|²) / (B - b)
    tr Σ  ≈ (|g_b|² - |g_B|²) / (1/b - 1/B)

are estimates without bias. Their ratio is not, so that both are averaged over steps before they are
divided. g_b is the gradient of a micro-batch and g_B that of the step: a run needs several
micro-batches or ranks. Every micro-batch is spread over the global batch (`DataOrder`), so that its
times are stratified like those of a batch of its own size; Σ is then the covariance at given times,
up to terms of order 1/b².
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["GradientNoise", "MicroBatchNorms", "estimate_noise", "mean_noise"]


class GradientNoise(NamedTuple):
    """Estimates of the two parts of the noise scale, of one step or their means over steps.

    Args:
        variance: () tr Σ, the sum of the variances of the gradient of one sample.
        square: () |G|²; negative where it is smaller than the error of its estimate.
    """

    variance: Tensor
    square: Tensor

    @property
    def scale(self) -> float:
        """B_simple in samples; NaN if |G|² is not positive."""
        return float(self.variance / self.square) if self.square > 0 else math.nan


def estimate_noise(
    norm: Tensor, micro_square: Tensor, batch: int, micro_batch: int
) -> GradientNoise:
    """Estimate the gradient noise of a step, without a synchronisation.

    Args:
        norm: () norm of the gradient of the step, |g_B|.
        micro_square: () mean squared norm of the gradients of micro-batches, |g_b|².
        batch: number of samples of a step, B.
        micro_batch: number of samples of a micro-batch, b < B.

    Returns:
        The estimates, linear in `micro_square`.

    Raises:
        ValueError: The micro-batch is the whole batch, which leaves nothing to compare.
    """
    if not 0 < micro_batch < batch:
        raise ValueError(
            f"micro_batch is {micro_batch}, expected 1 .. {batch - 1}, less than the batch: use "
            "accumulation or several ranks"
        )
    square = norm.square()
    return GradientNoise(
        (micro_square - square) / (1 / micro_batch - 1 / batch),
        (batch * square - micro_batch * micro_square) / (batch - micro_batch),
    )


def mean_noise(steps: Tensor) -> GradientNoise | None:
    """The mean gradient noise of some steps.

    Args:
        steps: (steps, 2) variance and square of each step; not finite where there is no estimate.

    Returns:
        The means over the steps with an estimate; None if there is none.
    """
    steps = steps.double()
    steps = steps[steps.isfinite().all(1)]
    return GradientNoise(*steps.mean(0)) if len(steps) else None


class MicroBatchNorms:
    """The squared norms of the gradients of the micro-batches of a rank, kept on the device.

    Autograd calls a hook with the gradient of each parameter before it is added to that of the
    earlier micro-batches, and before the ranks exchange it.

    Args:
        parameters: parameters that the optimizer trains.
        parts: number of micro-batches of a rank in a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], parts: int) -> None:
        self.parts, self.is_recording = parts, False
        self.norms: list[Tensor] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._record)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context of the backward passes of one step.

        Yields:
            Nothing; `mean_square` reads the gradients afterwards.
        """
        self.norms, self.is_recording = [], True
        try:
            yield
        finally:
            self.is_recording = False

    def mean_square(self, scaler: Any) -> Tensor:
        """The mean squared norm of the gradients of the recorded micro-batches.

        Args:
            scaler: gradient scaler of fp16, which has multiplied the losses; None without one.

        Returns:
            () mean on the device.
        """
        # accelerate divides the loss of each micro-batch by their number.
        square = self.parts * torch.stack(self.norms).square().sum()
        return square if scaler is None else square / scaler.scale(torch.ones_like(square)) ** 2

    def _record(self, gradient: Tensor) -> None:
        if self.is_recording:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self.norms.append(norm)
