"""Distances between sets of samples, and how many of them a classifier reads as their labels."""

import numpy as np
from torch import Tensor

from diffcore.io.extras import import_extra


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), of the Gaussians with the sets' means and covariances.

    tr (C_a C_b)^½ is the sum of the square roots of the eigenvalues of C_a C_b, which are real and not negative. The distance
    depends on the number of samples: compare it only with distances at the same number. Dowson & Landau 1982.

    Args:
        a: (N, *shape) samples, flattened to features.
        b: (M, *shape).

    Raises:
        ValueError: a set has fewer than two samples, or the sizes of a sample differ.
    """
    x, y = (value.double().flatten(1).numpy() for value in (a, b))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"sets are {tuple(a.shape)} and {tuple(b.shape)}, expected two samples or more, of equal size"
        )
    c_x, c_y = (np.atleast_2d(np.cov(value, rowvar=False)) for value in (x, y))
    eigenvalues = np.linalg.eigvals(c_x @ c_y).real.clip(min=0)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(c_x) + np.trace(c_y) - 2 * np.sqrt(eigenvalues).sum())


class Reader:
    """A support vector machine that has learned to read labels from real samples.

    Args:
        x: (N, *shape) real samples.
        labels: (N,) their classes.
    """

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        svm = import_extra("sklearn.svm", "The metric that recognises digits", extra="evaluate")
        self.machine = svm.SVC(C=10.0).fit(x.flatten(1).numpy(), labels.numpy())

    def recognised(self, x: Tensor, labels: Tensor) -> float:
        """The share of samples (N, *shape) read as the class they should be."""
        return float(self.machine.score(x.flatten(1).numpy(), labels.numpy()))
