"""Integrals of the polynomial through a multistep method's memory.

    ∫ f dm ≈ Σ_j w_j f_j,   w_j = ∫ ℓ_j(v) dm,   ℓ_j the Lagrange polynomial with ℓ_j(v_j) = 1 and 0 at the other nodes

The weights add up to ∫ dm. So a multistep step is the first-order step and a correction, Σ_{j≥1} w_j (f_j - f_0), which is
how it is written here: nothing large cancels, and with an empty memory it *is* the first-order step.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod

from numpy.polynomial.legendre import leggauss

from diffcore.schedules import Real

POINTS = 16
"""Gauss-Legendre points: exact to rounding for an exponential measure over a step as wide as Δλ = 40."""

Rule = Sequence[tuple[Real, Real]]
"""Pairs (v, dm) of a quadrature rule."""


def rule(start: Real, end: Real, density: Callable[[Real], Real], points: int = POINTS) -> list[tuple[Real, Real]]:
    """(v, ρ(v) dv) at the Gauss-Legendre points from start to end."""
    width = end - start
    return [(start + width * x, density(start + width * x) * width * w) for x, w in _gauss(points)]


def weights(nodes: Sequence[Real], measure: Rule) -> list[Real]:
    """w_j = ∫ ℓ_j dm for the nodes after the first; the first one's is what is left of ∫ dm."""
    return [sum((dm * _lagrange(nodes, j, v) for v, dm in measure), 0.0) for j in range(1, len(nodes))]


def _lagrange(nodes: Sequence[Real], j: int, v: Real) -> Real:
    """ℓ_j(v)."""
    return prod((v - node) / (nodes[j] - node) for i, node in enumerate(nodes) if i != j)


@cache
def _gauss(points: int) -> tuple[tuple[float, float], ...]:
    """Points and weights on [0, 1]."""
    x, w = leggauss(points)
    return tuple(zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True))
