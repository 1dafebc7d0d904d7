"""Inverses without a closed form: bracketed roots of monotone functions, to the last bits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
FAR = 340.0  # of logit t: the squares of t and 1-t are representable
HALVINGS = 200  # at most; a bracket within a factor of 2 closes in 53


def inverse(f: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """X within [low, high] with f(x) = y, elementwise, for f monotone; the nearer end where y is beyond its values there.

    Chandrupatla's method, of scipy.

    Args:
        f: of float64 tensors; elementwise, for it is asked about any selection of the elements.
        y: float64, on the host.
        low: of the shape of y.
        high: of the shape of y.
    """
    from scipy.optimize.elementwise import find_root

    def difference(x: object, y: object) -> object:
        return (f(torch.from_numpy(x)) - torch.from_numpy(y)).numpy()

    with np.errstate(all="ignore"):  # its interpolation divides by 0 where a bracket has closed
        found = find_root(difference, (low.numpy(), high.numpy()), args=(y.numpy(),))
    nearer = torch.where((f(low) - y).abs() <= (f(high) - y).abs(), low, high)
    return torch.where(torch.as_tensor(found.success), torch.as_tensor(found.x), nearer)


def newton(f: Function, rate: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """X within [low, high] with f(x) = y, elementwise, for f falling with f' = -rate.

    Newton's method, which halves the bracket where a step would leave it (f flat, or a kink): a few steps of a tight bracket.

    Args:
        f: of float64 tensors, elementwise.
        rate: -df/dx, zero where f is flat.
        y: float64, on the host.
        low: finite, of the shape of y.
        high: finite, of the shape of y.
    """
    x = low + (high - low) / 2
    last, done = torch.full_like(y, torch.inf), torch.zeros_like(y, dtype=torch.bool)
    for _ in range(HALVINGS):
        excess = f(x) - y
        low, high = torch.where(excess >= 0, x, low), torch.where(excess <= 0, x, high)
        step = x + excess / rate(x)
        inside = (step >= low) & (step <= high)  # not where it is NaN
        step = torch.where(inside, step, low + (high - low) / 2)
        rounding = (
            inside & (excess.abs() < 1e-15) & (8 * excess.abs() >= last)
        )  # Newton gains no more
        done = done | rounding | (step == x)
        if done.all():
            break
        x, last = torch.where(done, x, step), excess.abs()
    return x


def logit_time(logsnr: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """T with λ(t, 1-t) = y, found as z = logit t, so that both tails keep their relative precision."""
    far = torch.full_like(y, FAR)
    z = inverse(lambda z: logsnr(z.sigmoid(), (-z).sigmoid()), y, -far, far)
    return torch.where(y.isinf(), (y < 0).double(), z.sigmoid())
