"""Exact moments of what a sampler makes of a Gaussian: everything is affine in the first x and in
each noise drawn.
"""

from dataclasses import dataclass, field, replace

import torch

from diffcore.guidance import CFG
from diffcore.sampling.loop import integrate


@dataclass
class Probe:
    """Noise that is zero but for d rows at each draw: the unit vectors, in rows of their own."""

    rows: int
    size: int
    keys: list = field(default_factory=list)
    intervals: list = field(default_factory=list)
    channel: tuple = ()

    def between(self, t, s, step):
        self.keys.append((self.channel, step))
        self.intervals.append((self.channel, t, s))
        z = torch.zeros(self.rows, self.size, dtype=torch.float64)
        first = 1 + self.size * len(self.keys)
        z[first : first + self.size] = torch.eye(self.size, dtype=torch.float64)[
            : max(0, self.rows - first)
        ]
        return z

    def branch(self, index):
        return replace(self, channel=(*self.channel, index))


def affine(denoiser, sampler, knots, guidance=CFG(1.0), condition=None):
    """(A, b, [B_k]) of x_end = A x + b + Σ B_k z_k, for a denoiser that is affine in x."""
    (size,) = denoiser.process.shape

    def result(draws):
        rows = 1 + size * (1 + draws)
        x = torch.zeros(rows, size, dtype=torch.float64)
        x[1 : 1 + size] = torch.eye(size, dtype=torch.float64)
        probe = Probe(rows, size)
        labels = None if condition is None else torch.full((rows,), condition)
        return integrate(denoiser, sampler, x, knots, probe, guidance, labels)[0], probe.keys

    _, keys = result(0)
    assert len(set(keys)) == len(keys)  # no two draws share a key
    x, _ = result(len(keys))
    A, *B = (x[1:] - x[0]).unflatten(0, (-1, size)).mT
    return A, x[0], B


def moments(denoiser, sampler, knots, mean, cov, **options):
    """Mean and covariance at the last knot, from those at the first."""
    A, b, B = affine(denoiser, sampler, knots, **options)
    return A @ mean + b, A @ cov @ A.mT + sum(
        (matrix @ matrix.mT for matrix in B), torch.zeros_like(cov)
    )
