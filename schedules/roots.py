"""Inverses without a closed form: bracketed roots of monotone functions, to the last bits."""

from collections.abc import Callable

import torch
from torch import Tensor

FAR = 340.0  # of logit t: the squares of t and 1-t are representable


def inverse(f: Callable[[Tensor], Tensor], y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """X within [low, high] with f(x) = y, elementwise, for f monotone with y between its values at the ends.

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

    found = find_root(difference, (low.numpy(), high.numpy()), args=(y.numpy(),))
    return torch.as_tensor(found.x, dtype=torch.float64)


def logit_time(logsnr: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """T with λ(t, 1-t) = y, found as z = logit t, so that both tails keep their relative precision."""
    far = torch.full_like(y, FAR)

    def of_logit(z: Tensor) -> Tensor:
        return logsnr(z.sigmoid(), (-z).sigmoid())

    z = inverse(of_logit, y.clamp(of_logit(far), of_logit(-far)), -far, far)
    return torch.where(y.isinf(), (y < 0).double(), z.sigmoid())
