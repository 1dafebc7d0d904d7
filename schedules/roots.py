"""Inverses without a closed form: bracketed roots of monotone functions, to the last bits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FAR = 340.0  # of logit t: the squares of t and 1-t are representable


def inverse(f: Callable[[Tensor], Tensor], y: Tensor, low: Tensor, high: Tensor) -> Tensor:
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


def logit_time(logsnr: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """T with λ(t, 1-t) = y, found as z = logit t, so that both tails keep their relative precision."""
    far = torch.full_like(y, FAR)
    z = inverse(lambda z: logsnr(z.sigmoid(), (-z).sigmoid()), y, -far, far)
    return torch.where(y.isinf(), (y < 0).double(), z.sigmoid())
