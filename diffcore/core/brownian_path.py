"""A Brownian motion W over the clock e^λ, by Lévy's construction on a binary tree of levels.

A level is mapped to the node k = round(2^DEPTH sigmoid(λ/4)) of the tree; k = 0 is pure noise and
k = 2^DEPTH the clean level. Each node m has one independent standard normal ξ_m, and W at a node
is a linear combination of the normals on the way to it. The functions below compute only the
coefficients; `Noise` draws the normals.
"""

import math
from functools import lru_cache

from torch import Tensor

from diffcore.schedules import Level

__all__ = ["DEPTH", "increment_coefficients", "node", "node_time", "path_coefficients"]

DEPTH = 20
"""Depth of the tree: levels closer than 1e-5 in λ near 0, or 1e-3 near ±22, have the same node."""


def node(level: Level) -> int:
    """The number of the node of a level, an integer from 0 (pure noise) to 2^DEPTH (clean).

    Raises:
        ValueError: the level is a map with one λ per element. Use path=False.
    """
    if isinstance(level.logsnr, Tensor):
        raise ValueError(
            "path=True needs one noise level for the whole batch, got a map of levels: use "
            "path=False"
        )
    return round(2**DEPTH / (1 + math.exp(min(-level.logsnr / 4, 700))))


def node_time(k: int) -> float:
    """The number e^λ at node k, the time of the Brownian motion: 0 at pure noise, inf if clean."""
    return (k / (2**DEPTH - k)) ** 4 if k < 2**DEPTH else math.inf


@lru_cache(4096)
def path_coefficients(k: int) -> dict[int, float]:
    """The coefficients {m: c_m} of W at node k.

        W(node_time(k)) = Σ_m c_m ξ_m

    The sum is over the nodes m that are bisected on the way to k. Lévy's construction: between l
    and r, W(m) = W(l) + (m-l)/(r-l) (W(r) - W(l)) + √((m-l)(r-m)/(r-l)) ξ_m, with m, l and r in
    time.
    """
    low, high = 0, 2**DEPTH
    below: dict[int, float] = {}
    above: dict[int, float] = {}
    while k not in (low, high):
        middle = (low + high) // 2
        start, now, end = node_time(low), node_time(middle), node_time(high)
        share = (now - start) / (end - start)  # 0 where the end is at infinite time
        W = {m: (1 - share) * below.get(m, 0.0) + share * above.get(m, 0.0) for m in below | above}
        W[middle] = math.sqrt((now - start) * (1 - share))
        if k < middle:
            high, above = middle, W
        else:
            low, below = middle, W
    return below


def increment_coefficients(t: Level, s: Level) -> dict[int, float]:
    """The coefficients {m: c_m} of the normalised increment of W between two levels.

        (W(s) - W(t)) / √(e^λ_s - e^λ_t) = Σ_m c_m ξ_m,  with s the cleaner of the two levels

    The sum is standard normal, and independent over intervals that do not overlap. The order of the
    arguments does not matter.

    Returns:
        The coefficients by the number of the node, without those that are 0.

    Raises:
        ValueError: one level is clean, or both have the same node. Use path=False.
    """
    low, high = sorted((node(t), node(s)))
    if high == 2**DEPTH:
        raise ValueError(
            f"path=True has no noise for a step between λ = {t.logsnr} and {s.logsnr}, since a "
            "step to the clean level needs none: end at a finite λ, or use path=False"
        )
    if low == high:
        raise ValueError(
            f"λ = {t.logsnr} and {s.logsnr} are closer than path=True resolves (1e-5 about λ = 0, "
            f"1e-3 about ±22): use a coarser grid, or path=False"
        )
    start, end = path_coefficients(low), path_coefficients(high)
    scale = math.sqrt(node_time(high) - node_time(low))
    between = {m: (end.get(m, 0.0) - start.get(m, 0.0)) / scale for m in sorted(start | end)}
    return {m: c for m, c in between.items() if c}
