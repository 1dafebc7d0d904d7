"""Inverses without a closed form: bracketed roots of monotone functions, to the last bits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["inverse", "logit_time", "newton"]

Function = Callable[[Tensor], Tensor]
FAR = 340.0  # bound of |logit t|: the squares of t and 1-t are representable
HALVINGS = 200  # at most; a bracket within a factor of 2 closes in 53


def inverse(f: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x within [low, high] with f(x) = y, elementwise, for a monotone f, by Chandrupatla's method
    (scipy).

    Args:
        f: monotone function of float64 tensors. It is elementwise, because it is evaluated on
            selections of the elements.
        y: values of f, float64 on the host.
        low: lower bounds, in the shape of `y`.
        high: upper bounds, in the shape of `y`.

    Returns:
        x in the shape of `y`; the nearer bound where `y` is outside of f([low, high]).
    """
    from scipy.optimize.elementwise import find_root

    def difference(x: object, y: object) -> object:
        return (f(torch.from_numpy(x)) - torch.from_numpy(y)).numpy()

    with np.errstate(all="ignore"):  # the interpolation divides by 0 where a bracket has closed
        found = find_root(difference, (low.numpy(), high.numpy()), args=(y.numpy(),))
    nearer = torch.where((f(low) - y).abs() <= (f(high) - y).abs(), low, high)
    return torch.where(torch.as_tensor(found.success), torch.as_tensor(found.x), nearer)


def newton(f: Function, rate: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x within [low, high] with f(x) = y, elementwise, for a decreasing f with f' = -rate.

    Newton's method, which halves the bracket where a step would leave it (f is flat, or has a
    kink). A tight bracket takes a few steps.

    Args:
        f: decreasing elementwise function of float64 tensors.
        rate: -df/dx, elementwise; zero where f is flat.
        y: values of f, float64 on the host.
        low: finite lower bounds, in the shape of `y`.
        high: finite upper bounds, in the shape of `y`.

    Returns:
        x in the shape of `y`.
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
        )  # another Newton step gains nothing
        done = done | rounding | (step == x)
        if done.all():
            break
        x, last = torch.where(done, x, step), excess.abs()
    return x


def logit_time(logsnr: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """t with λ(t, 1-t) = y. The root is found in z = logit t, so that both tails keep their digits.

    Args:
        logsnr: λ as a function of t and 1 - t, decreasing in t.
        y: values of λ, float64 on the host; ±inf give t = 0 and 1.

    Returns:
        t in [0, 1], in the shape of `y`.
    """
    far = torch.full_like(y, FAR)
    z = inverse(lambda z: logsnr(z.sigmoid(), (-z).sigmoid()), y, -far, far)
    return torch.where(y.isinf(), (y < 0).double(), z.sigmoid())
