"""The Fréchet distance between two sets of samples, each described by mean and covariance."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["frechet_distance"]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between Gaussians with the means and covariances of two sets.

        |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)

    With C = Rᵀ R, tr (C_a C_b)^½ is the sum of the singular values of R_a R_bᵀ. R is the triangular
    factor of the centred samples, so that no covariance is formed and no digits are lost where it
    is singular. Computed in float64. Lower is better. The distance of finite sets depends on the
    number of samples: compare it only with distances at the same number. Dowson & Landau 1982.

    Args:
        a: (N, *shape) samples, flattened to features.
        b: (M, *shape) samples, flattened to features.

    Returns:
        The distance, in squared units of the features.

    Raises:
        ValueError: a set has fewer than two samples, or the samples of the sets differ in size.
    """
    x, y = (value.double().flatten(1).numpy() for value in (a, b))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"sets are {tuple(a.shape)} and {tuple(b.shape)}, expected two samples or more, of "
            "equal size"
        )
    r_x, r_y = _root(x), _root(y)
    shift = x.mean(0) - y.mean(0)
    common = np.linalg.svd(r_x @ r_y.T, compute_uv=False).sum()
    return float(shift @ shift + np.square(r_x).sum() + np.square(r_y).sum() - 2 * common)


def _root(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """R with Rᵀ R the covariance of the rows of x."""
    return np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1)
