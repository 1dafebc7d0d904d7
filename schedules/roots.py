"""Inverses without a closed form: bracketed roots of monotone functions, to the last bits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["invert", "invert_by_newton", "invert_in_logit_time"]

Function = Callable[[Tensor], Tensor]
LOGIT_BOUND = 340.0  # bound of |logit t|: the squares of t and 1-t are representable
MAXIMUM_STEPS = 200  # of Newton's method; halving alone closes a bracket within a factor 2 in 53


def invert(f: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Solve f(x) = y for x within [low, high], elementwise, by Chandrupatla's method (scipy).

    Args:
        f: monotone function of float64 tensors. It must be elementwise, because it is evaluated on
            selections of the elements.
        y: values of f, float64 on the host.
        low: lower bounds, in the shape of `y`.
        high: upper bounds, in the shape of `y`.

    Returns:
        x in the shape of `y`; the nearer bound where `y` is outside f([low, high]), NaN where `y`
        is.

    Raises:
        ValueError: No root was found where there is one, because f is not finite and monotone.
    """
    from scipy.optimize.elementwise import find_root

    def difference(x: object, y: object) -> object:
        return (f(torch.from_numpy(x)) - torch.from_numpy(y)).numpy()

    with np.errstate(all="ignore"):  # the interpolation divides by 0 where a bracket has closed
        root = find_root(difference, (low.numpy(), high.numpy()), args=(y.numpy(),))
    solved, at_low, at_high = torch.as_tensor(root.success), f(low) - y, f(high) - y
    outside = (at_low.sign() * at_high.sign() > 0) | ~y.isfinite()
    if not (solved | outside).all():
        raise ValueError(
            f"a level or time has no inverse at {y[~(solved | outside)].tolist()[:3]}, because the "
            "schedule is not finite and monotone there: choose less extreme parameters"
        )
    nearer = torch.where(at_low.abs() <= at_high.abs(), low, high).masked_fill(y.isnan(), torch.nan)
    return torch.where(solved, torch.as_tensor(root.x), nearer)


def invert_by_newton(f: Function, rate: Function, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Solve f(x) = y for x within [low, high], elementwise, by Newton's method with a bracket.

    The bracket is halved where a Newton step would leave it (f is flat, or has a kink). From a
    narrow bracket a few steps suffice.

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
    for _ in range(MAXIMUM_STEPS):
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


def invert_in_logit_time(logsnr: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """Solve λ(t, 1-t) = y for t. The root is in z = logit t, so that both tails keep their digits.

    Args:
        logsnr: λ as a function of t and 1 - t, decreasing in t.
        y: values of λ, float64 on the host; ±inf give t = 0 and 1.

    Returns:
        t in [0, 1], in the shape of `y`.
    """
    bound = torch.full_like(y, LOGIT_BOUND)
    z = invert(lambda z: logsnr(z.sigmoid(), (-z).sigmoid()), y, -bound, bound)
    return torch.where(y.isinf(), (y < 0).double(), z.sigmoid())
