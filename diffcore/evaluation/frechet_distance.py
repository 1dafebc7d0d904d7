"""The Fréchet distance between two sets of samples, each described by mean and covariance."""

import numpy as np
from torch import Tensor

__all__ = ["frechet_distance"]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between Gaussians with the means and covariances of two sets.

        |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)

    tr (C_a C_b)^½ is the sum of the square roots of the eigenvalues of C_a C_b, which are real and
    not negative. Lower is better. The distance of finite sets depends on the number of samples:
    compare it only with distances at the same number. Dowson & Landau 1982.

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
    c_x, c_y = (np.atleast_2d(np.cov(value, rowvar=False)) for value in (x, y))
    # Rounding can make eigenvalues slightly negative.
    eigenvalues = np.linalg.eigvals(c_x @ c_y).real.clip(min=0)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(c_x) + np.trace(c_y) - 2 * np.sqrt(eigenvalues).sum())
