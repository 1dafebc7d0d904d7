"""The published formulas, written apart from the library: in y = x/α, u = σ/α, as k-diffusion and
the papers print them.

Each takes D(y, λ) -> (x_0, ε), y at the first of the finite logsnrs, and returns y at the last;
then there is no clean step. `seen` holds (t, ε) of a knot at α = 0, for the methods whose variable
is finite there.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from scipy.integrate import quad


def u(logsnr):
    return math.exp(-logsnr / 2)


def a(logsnr):
    return (
        0.0 if logsnr == math.inf else 1.0 if logsnr == -math.inf else u(logsnr) / (1 + u(logsnr))
    )


def cosine_time(logsnr):
    """t of λ = 2 ln cot(πt/2)."""
    return 2 / math.pi * math.atan(u(logsnr))


def lagrange(nodes, j, v):
    return math.prod((v - node) / (nodes[j] - node) for i, node in enumerate(nodes) if i != j)


def integral(nodes, j, v, density, t, s):
    """∫ ℓ_j(v(q)) ρ(q) dq from t to s."""
    return quad(lambda q: lagrange(nodes, j, v(q)) * density(q), t, s, epsabs=1e-13, epsrel=1e-12)[
        0
    ]


def euler(D, y, logsnrs, seen):
    for t, s in pairwise(logsnrs):
        y = y + (u(s) - u(t)) * D(y, t)[1]
    return y


def heun(D, y, logsnrs, seen):
    """2206.00364, Algorithm 1."""
    for t, s in pairwise(logsnrs):
        eps = D(y, t)[1]
        trial = y + (u(s) - u(t)) * eps
        y = y + (u(s) - u(t)) * (eps + D(trial, s)[1]) / 2
    return y


def singlestep(D, y, logsnrs, seen):
    """2211.01095, Algorithm 1, r = 1/2."""
    for t, s in pairwise(logsnrs):
        h = (s - t) / 2
        x0 = D(y, t)[0]
        middle = math.exp(-h / 2) * y - math.expm1(-h / 2) * x0
        y = math.exp(-h) * y - math.expm1(-h) * D(middle, (t + s) / 2)[0]
    return y


def multistep_2(D, y, logsnrs, seen):
    """2211.01095, Algorithm 2."""
    h_last, last = None, None
    for t, s in pairwise(logsnrs):
        h, x0 = (s - t) / 2, D(y, t)[0]
        r = None if last is None else h_last / h
        d = x0 if last is None else (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        y = math.exp(-h) * y - math.expm1(-h) * d
        h_last, last = h, x0
    return y


def multistep_3(factor) -> Callable:
    """k-diffusion's 3M without noise; the quadratic term counts `factor` times: 1 in print, 2 in
    truth.
    """

    def method(D, y, logsnrs, seen):
        past = []
        for t, s in pairwise(logsnrs):
            h, x0 = (s - t) / 2, D(y, t)[0]
            phi_2 = math.expm1(-h) / h + 1
            phi_3 = phi_2 / h - 0.5
            y = math.exp(-h) * y - math.expm1(-h) * x0
            if len(past) == 1:
                ((h_1, x0_1),) = past
                y = y + phi_2 * (x0 - x0_1) / (h_1 / h)
            elif len(past) == 2:
                (h_1, x0_1), (h_2, x0_2) = past
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
                d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
                y = y + phi_2 * d1 - factor * phi_3 * d2
            past = [(h, x0), *past][:2]
        return y

    return method


def adams(k, held, v) -> Callable:
    """Quadrature of the Lagrange polynomial; y has a solution with ε over u and with
    x_0 over 1/u.
    """

    def method(D, y, logsnrs, seen):
        past = list(seen) if v is cosine_time else []
        for t, s in pairwise(logsnrs):
            x0, eps = D(y, t)
            past = [(v(t), eps if held == "eps" else x0), *past][:k]
            nodes = [node for node, _ in past]
            if held == "eps":
                w = [integral(nodes, j, v, lambda q: -u(q) / 2, t, s) for j in range(len(past))]
                y = y + sum(w_j * f for w_j, (_, f) in zip(w, past, strict=True))
            else:
                w = [
                    integral(nodes, j, v, lambda q: 1 / (2 * u(q)), t, s) for j in range(len(past))
                ]
                y = u(s) * (y / u(t) + sum(w_j * f for w_j, (_, f) in zip(w, past, strict=True)))
        return y

    return method


SCALES = {
    "eps": lambda q: 1.0,
    "x0": u,
    "velocity": lambda q: 1 + u(q),
}  # of y over the coordinate of what is held
DENSITIES = {
    "eps": lambda q: -u(q) / 2,
    "x0": lambda q: 1 / (2 * u(q)),
    "velocity": lambda q: -a(q) * (1 - a(q)) / 2,
}


def moulton(k, held, v) -> Callable:
    """PEC: Adams-Bashforth's prediction, and the corrector with the value at it; v = None counts
    knots.
    """

    def integrals(nodes, t, s, step):
        if v is not None:
            return [integral(nodes, j, v, DENSITIES[held], t, s) for j in range(len(nodes))]
        mass = quad(DENSITIES[held], t, s)[0]
        return [
            mass * quad(lambda q, j=j: lagrange(nodes, j, q), step, step + 1)[0]
            for j in range(len(nodes))
        ]

    def method(D, y, logsnrs, seen):
        scale, past, left = SCALES[held], [], None
        for i, (t, s) in enumerate(pairwise(logsnrs)):
            x0, eps = D(y, t)
            past = [
                (i if v is None else v(t), {"eps": eps, "x0": x0, "velocity": eps - x0}[held]),
                *past,
            ][: k + 1]
            z = y / scale(t)
            if left is not None:
                before, z_before = left
                w = integrals([node for node, _ in past], before, t, i - 1)
                z = z_before + sum(w_j * f for w_j, (_, f) in zip(w, past, strict=True))
            w = integrals([node for node, _ in past[:k]], t, s, i)
            y = scale(s) * (z + sum(w_j * f for w_j, (_, f) in zip(w, past[:k], strict=True)))
            left = t, z
        return y

    return method


def flow_moulton(k) -> Callable:
    """The same of ε - x_0 over a, in z: from noise to data without exception."""

    def method(velocity, z, blends):
        past, left = [], None
        for t, s in pairwise(blends):
            past = [(t, velocity(z, t)), *past][: k + 1]
            nodes = [node for node, _ in past]
            if left is not None:
                before, z_before = left
                w = [
                    integral(nodes, j, lambda q: q, lambda q: 1.0, before, t)
                    for j in range(len(past))
                ]
                z = z_before + sum(w_j * f for w_j, (_, f) in zip(w, past, strict=True))
            left = t, z
            w = [
                integral(nodes[:k], j, lambda q: q, lambda q: 1.0, t, s)
                for j in range(len(nodes[:k]))
            ]
            z = z + sum(w_j * f for w_j, (_, f) in zip(w, past[:k], strict=True))
        return z

    return method


def flow(k) -> Callable:
    """ε - x_0 over a, in z = x/(α+σ), by quadrature: from noise to data without exception."""

    def method(velocity, z, blends):
        past = []
        for t, s in pairwise(blends):
            past = [(t, velocity(z, t)), *past][:k]
            nodes = [node for node, _ in past]
            w = [integral(nodes, j, lambda q: q, lambda q: 1.0, t, s) for j in range(len(past))]
            z = z + sum(w_j * f for w_j, (_, f) in zip(w, past, strict=True))
        return z

    return method


CLASSICAL = {
    1: [1],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def ipndm(k) -> Callable:
    """2204.13902: the weights of equal steps."""

    def method(D, y, logsnrs, seen):
        past = [eps for _, eps in seen]
        for t, s in pairwise(logsnrs):
            past = [D(y, t)[1], *past][:k]
            y = y + (u(s) - u(t)) * sum(
                c * eps for c, eps in zip(CLASSICAL[len(past)], past, strict=True)
            )
        return y

    return method


def gradient_estimation(gamma) -> Callable:
    """2306.04848."""

    def method(D, y, logsnrs, seen):
        last = None
        for t, s in pairwise(logsnrs):
            eps = D(y, t)[1]
            average = eps if last is None else gamma * eps + (1 - gamma) * last
            y, last = y + (u(s) - u(t)) * average, eps
        return y

    return method


def unipc(p, variant) -> Callable:
    """2302.04867, Algorithms 5 to 8: R ρ B(h) = φ for predictor and corrector."""

    def terms(order, h, ratios):
        """ρ B(h) for the differences at `ratios` of h."""
        B = h if variant == "bh1" else -math.expm1(-h)
        if order == "half":
            return [B / 2]
        g, phi, factorial = [], -math.expm1(-h) / h, 1.0  # ∫ e^{-(1-τ)h} τ^k h dτ of k = 1, 2, ...
        moment = phi * h
        for i in range(1, len(ratios) + 1):
            moment = 1 - i * moment / h
            g.append(moment)
            factorial *= i
        R = np.array([[r**i for r in ratios] for i in range(1, len(ratios) + 1)])
        return np.linalg.solve(R, np.array(g)).tolist()

    def method(D, y, logsnrs, seen):
        past, base = [], None  # past: (λ, x_0), the newest first
        for i, (t, s) in enumerate(pairwise(logsnrs)):
            x0 = D(y, t)[0]
            if i:  # correct y with x0
                (start, m0), *older = past
                h = (t - start) / 2
                ratios = [(level - start) / 2 / h for level, _ in older] + [1.0]
                w = terms("half" if len(ratios) == 1 else "solve", h, ratios)
                y = base + sum(c * (m - m0) for c, (_, m) in zip(w, [*older, (t, x0)], strict=True))
            past = [(t, x0), *past][:p]
            h = (s - t) / 2
            y = base = math.exp(-h) * y - math.expm1(-h) * x0
            if len(past) > 1:
                ratios = [(level - t) / 2 / h for level, _ in past[1:]]
                w = terms("half" if len(ratios) == 1 else "solve", h, ratios)
                w = [w[0] / ratios[0]] if len(ratios) == 1 else w
                y = base + sum(c * (m - x0) for c, (_, m) in zip(w, past[1:], strict=True))
        return y

    return method
