"""Integrals of the polynomial through a multistep method's memory.

    ∫ f dm ≈ Σ_j w_j f_j,   w_j = ∫ ℓ_j(v) dm,   ℓ_j the Lagrange polynomial with ℓ_j(v_j) = 1 and 0 at the other nodes

The weights add up to ∫ dm. So a multistep step is the first-order step and a correction, Σ_{j≥1} w_j (f_j - f_0), which is
how it is written here: nothing large cancels, and with an empty memory it *is* the first-order step. All that is asked of
the measure are its moments M_p = ∫ (v - v_0)^p dm, p ≥ 1.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod

from numpy.polynomial.legendre import leggauss

from diffcore.schedules import Real

GAUSS = tuple(((1 + float(x)) / 2, float(w) / 2) for x, w in zip(*leggauss(16), strict=True))
"""Points and weights on [0, 1]: exact to rounding for an exponential measure over a step as wide as Δλ = 40."""

Rule = Iterable[tuple[Real, Real]]
"""Pairs (v, dm) of a quadrature rule."""


def rule(start: Real, end: Real, density: Callable[[Real], Real]) -> list[tuple[Real, Real]]:
    """(q, ρ(q) dq) at the Gauss-Legendre points from start to end."""
    width = end - start
    return [(q, density(q) * (width * w)) for q, w in ((start + width * x, w) for x, w in GAUSS)]


def moments(measure: Rule, origin: Real, count: int) -> list[Real]:
    """M_1 .. M_count of a quadrature rule."""
    totals: list[Real] = [0.0] * count
    for v, term in measure:
        for p in range(count):
            term = term * (v - origin)
            totals[p] = totals[p] + term
    return totals


def even_moments(mass: Real, width: Real, count: int) -> list[Real]:
    """M_p = mass · width^p / (p+1): of a measure spread evenly over the variable."""
    return [mass * width**p / (p + 1) for p in range(1, count + 1)]


def weights(nodes: Sequence[Real], moments: Sequence[Real]) -> list[Real]:
    """w_j = ∫ ℓ_j dm for the nodes after the first, which is the origin of the moments."""
    offsets = [node - nodes[0] for node in nodes[1:]]
    return [_weight(r, offsets[:j] + offsets[j + 1 :], moments) for j, r in enumerate(offsets)]


def _weight(r: Real, others: Sequence[Real], moments: Sequence[Real]) -> Real:
    """∫ of ℓ(s) = s Π (s - o) / (r Π (r - o)), o the other offsets."""
    coefficients: list[Real] = [1.0]  # of s, s², ...
    for o in others:
        coefficients = [
            a - o * b for a, b in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)
        ]
    numerator = sum((c * m for c, m in zip(coefficients, moments, strict=True)), 0.0)
    return numerator / (r * prod(r - o for o in others))
