"""Integrals of the polynomial through the values of a multistep method.

    ∫ f dm ≈ Σ_j w_j f_j,   w_j = ∫ ℓ_j(v) dm

ℓ_j is the Lagrange polynomial, which is 1 at the node v_j and 0 at the other nodes. The weights add
up to ∫ dm. A multistep step is therefore the first-order step plus a correction,
Σ_{j≥1} w_j (f_j - f_0). It is computed in this form because no large terms cancel, and without
earlier values it is exactly the first-order step. The weights need only the moments of the measure,
M_p = ∫ (v - v_0)^p dm with p ≥ 1.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod

from numpy.polynomial.legendre import leggauss
from torch import Tensor

from diffcore.samplers.base import multiply
from diffcore.schedules import Real

__all__ = [
    "QuadratureRule",
    "even_moments",
    "gauss_legendre",
    "lagrange_weights",
    "moments",
    "polynomial_correction",
]

GAUSS = tuple(((1 + float(x)) / 2, float(w) / 2) for x, w in zip(*leggauss(16), strict=True))
"""Points and weights on [0, 1]. For a step of Δλ = 40 and an exponential measure, the quadrature is
exact to rounding.
"""

QuadratureRule = Iterable[tuple[Real, Real]]
"""Pairs (v, dm) of a quadrature rule."""


def gauss_legendre(
    start: Real, end: Real, density: Callable[[Real], Real]
) -> list[tuple[Real, Real]]:
    """Gauss-Legendre quadrature of a density ρ(q).

    Args:
        start: beginning of the interval of q.
        end: its end.
        density: ρ, a function of q.

    Returns:
        (q, ρ(q) dq) at each quadrature point.
    """
    width = end - start
    return [(q, density(q) * (width * w)) for q, w in ((start + width * x, w) for x, w in GAUSS)]


def moments(measure: QuadratureRule, origin: Real, count: int) -> list[Real]:
    """M_p = ∫ (v - origin)^p dm, p = 1 .. count, of a quadrature rule.

    Args:
        measure: pairs (v, dm).
        origin: origin of the moments.
        count: number of moments.

    Returns:
        M_1, ..., M_count.
    """
    totals: list[Real] = [0.0] * count
    for v, term in measure:
        for p in range(count):
            term = term * (v - origin)
            totals[p] = totals[p] + term
    return totals


def even_moments(mass: Real, width: Real, count: int) -> list[Real]:
    """M_p = mass · width^p / (p+1), p = 1 .. count, of a measure spread evenly over the variable.

    Args:
        mass: ∫ dm over the step.
        width: length of the step in the variable.
        count: number of moments.

    Returns:
        M_1, ..., M_count.
    """
    return [mass * width**p / (p + 1) for p in range(1, count + 1)]


def lagrange_weights(nodes: Sequence[Real], moments: Sequence[Real]) -> list[Real]:
    """w_j = ∫ ℓ_j dm for the nodes after the first, which is the origin of the moments.

    Args:
        nodes: values of the variable.
        moments: M_1, M_2, ... about the first node.

    Returns:
        One weight for each node after the first.
    """
    offsets = [node - nodes[0] for node in nodes[1:]]
    return [_weight(r, offsets[:j] + offsets[j + 1 :], moments) for j, r in enumerate(offsets)]


def polynomial_correction(
    values: Sequence[Tensor], nodes: Sequence[Real], moments: Sequence[Real], scale: Real
) -> Tensor | float:
    """c Σ_{j≥1} w_j (f_j - f_0): what the polynomial through f adds to a step with constant f_0.

    Args:
        values: f_j at two or more nodes, each (B, *shape); the step begins at the first.
        nodes: values of the variable of the polynomial.
        moments: M_1, M_2, ... of the step's measure about the first node.
        scale: c.

    Returns:
        (B, *shape).
    """
    first, *past = values
    w = lagrange_weights(nodes, moments)
    return sum(multiply(scale * w_j, f_j - first) for w_j, f_j in zip(w, past, strict=True))


def _weight(r: Real, others: Sequence[Real], moments: Sequence[Real]) -> Real:
    """∫ ℓ(s) dm of ℓ(s) = s Π (s - o) / (r Π (r - o)), with o the other offsets.

    Args:
        r: offset of the node from the first one.
        others: offsets of the other nodes.
        moments: M_1, M_2, ... about the first node.
    """
    coefficients: list[Real] = [1.0]  # of s, s², ...
    for o in others:
        coefficients = [
            a - o * b for a, b in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)
        ]
    numerator = sum((c * m for c, m in zip(coefficients, moments, strict=True)), 0.0)
    return numerator / (r * prod(r - o for o in others))
