"""The error of samples that caches make, over the work that they save, on networks of digits."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.table import markdown_table
from torch.utils.flop_counter import FlopCounterMode

from diffcore.caches import Cache, CachedDenoiser, DeepCache, FirstBlockCache
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.guidance import CFG
from diffcore.run import Run
from diffcore.samplers import DPMSolverPP
from diffcore.sampling import sample

__all__ = ["CacheError", "draw_errors", "format_rows", "measure_caches"]

SCALES = (1.0, 3.0)
DEEP = [DeepCache(every, order) for order in (0, 1, 2) for every in (2, 3, 4, 6)]
FIRST = [
    FirstBlockCache(threshold, is_sum, order)
    for is_sum, order in ((False, 0), (True, 0), (True, 1))
    for threshold in (0.03, 0.1, 0.2, 0.4)
]


class CacheError(NamedTuple):
    """A measurement.

    Args:
        network: name of the network.
        scale: w of classifier-free guidance.
        method: the cache, or `steps` for the same sampler with fewer steps.
        setting: N, the threshold, or the number of steps.
        work: share of the floating-point operations of the exact run.
        reused: share of the calls of the network that reused features.
        error: root mean square of the difference to the exact run, over the standard deviation of
            its samples; median over the samples.
    """

    network: str
    scale: float
    method: str
    setting: float
    work: float
    reused: float
    error: float


def measure_caches(networks: dict[str, Path], count: int, steps: int) -> list[CacheError]:
    """Measure caches, and the same sampler with fewer steps, against the run without a cache.

    Args:
        networks: name -> folder of a run.
        count: number of samples.
        steps: sampler steps of the exact run.

    Returns:
        One row for each network, scale and cache.
    """
    rows = []
    for network, folder in networks.items():
        denoiser = Run(folder).denoiser()
        caches: Sequence[Cache] = DEEP if network == "U-Net" else [*DEEP, *FIRST]
        for scale in SCALES:
            exact, all_work = _draw(denoiser, scale, count, steps)
            for fewer in (steps // 2, steps // 3, steps // 4):
                x, work = _draw(denoiser, scale, count, fewer)
                share = work / all_work
                error = _error(x, exact)
                rows.append(CacheError(network, scale, "steps", fewer, share, 0.0, error))
            for cache in caches:
                cached = CachedDenoiser(denoiser, cache)
                x, work = _draw(cached, scale, count, steps)
                reused, error = cached.counts.reused_share, _error(x, exact)
                name, setting = _describe(cache)
                row = CacheError(network, scale, name, setting, work / all_work, reused, error)
                rows.append(row)
    return rows


def _draw(
    denoiser: DenoiserProtocol, scale: float, count: int, steps: int
) -> tuple[torch.Tensor, float]:
    """Samples, and the floating-point operations of one network call after another."""
    with FlopCounterMode(display=False) as counter:
        x = sample(
            denoiser,
            DPMSolverPP("2M"),
            steps=steps,
            seeds=range(count),
            condition=[seed % 10 for seed in range(count)],
            guidance=CFG(scale),
            batch_size=count,
        ).x
    return x, float(counter.get_total_flops())


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    squares = (x - exact).flatten(1).square().mean(1)
    return float((squares.sqrt() / exact.std()).median())


def _describe(cache: Cache) -> tuple[str, float]:
    if isinstance(cache, DeepCache):
        return f"DeepCache, order {cache.order}", cache.every
    assert isinstance(cache, FirstBlockCache)
    kind = "accumulated" if cache.accumulate else "first block"
    return f"{kind}, order {cache.order}", cache.threshold


def format_rows(rows: Sequence[CacheError]) -> str:
    """The measurements as a table in Markdown."""
    cells = [
        [
            row.network,
            f"{row.scale:g}",
            row.method,
            f"{row.setting:g}",
            f"{row.work:.2f}",
            f"{row.reused:.0%}",
            f"{row.error:.4f}",
        ]
        for row in rows
    ]
    header = ["network", "w", "method", "N, τ or steps", "work", "reused calls", "error"]
    return markdown_table(header, cells)


def draw_errors(rows: Sequence[CacheError], path: Path) -> None:
    """Draw error over work, one panel for each network and scale.

    Args:
        rows: measurements.
        path: image to write.
    """
    from diffcore.report.figures import create_figure, line_styles, save_figure

    panels = list(dict.fromkeys((row.network, row.scale) for row in rows))
    figure, axes = create_figure(2, (len(panels) + 1) // 2, height=4)
    methods = list(dict.fromkeys(row.method for row in rows))
    styles = dict(zip(methods, line_styles(len(methods)), strict=True))
    for axis, panel in zip(axes, panels, strict=False):
        for method in methods:
            found = [
                row for row in rows if (row.network, row.scale, row.method) == (*panel, method)
            ]
            found = [row for row in found if row.error > 0]  # a cache that reused nothing is exact
            found.sort(key=lambda row: row.work)
            if found:
                work, error = [row.work for row in found], [row.error for row in found]
                axis.plot(work, error, marker="o", label=method, **styles[method])
        axis.set(
            yscale="log",
            title=f"{panel[0]}, w = {panel[1]:g}",
            xlabel="work over that of the exact run",
            ylabel="error over the samples' deviation",
        )
    save_figure(figure, path)
