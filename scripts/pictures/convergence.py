"""Orders of convergence: the error of samplers on an exact flow over evaluations."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks.accuracy import problems
from benchmarks.sides.samplers import run_sampler

from diffcore.report.figures import create_figure, line_styles, save_figure
from diffcore.samplers import DDIM, AdamsMoulton, DPMSolverPP, Heun, Sampler, UniPC
from diffcore.schedules import Cosine, UniformBlend

SAMPLERS: dict[str, Sampler] = {
    "DDIM, order 1": DDIM(),
    "Heun, order 2": Heun(),
    "DPM-Solver++ 2M, order 2": DPMSolverPP("2M"),
    "UniPC(2), order 3": UniPC(2),
    "AdamsMoulton(3), order 4": AdamsMoulton(3),
}
COUNTS = (8, 16, 32, 64, 128, 256)
STARTS = 64


@cache
def measure_errors(
    counts: Sequence[int] = COUNTS, starts: int = STARTS
) -> dict[str, dict[int, float]]:
    """Measure median distances to the ends of the exact flow of a mixture in two dimensions.

    Args:
        counts: numbers of evaluations.
        starts: number of trajectories.

    Returns:
        Name -> evaluations -> distance.
    """
    problem, grid = problems(starts)["mixture"], UniformBlend(1.25, 0.5)
    errors: dict[str, dict[int, float]] = {}
    for name, sampler in SAMPLERS.items():
        for count in counts:
            ends = run_sampler(sampler, grid, Cosine(), problem, count)
            if ends is not None:
                x, evaluations = ends
                errors.setdefault(name, {})[evaluations] = problem.measure_error(x).median
    return errors


def draw_convergence(path: Path) -> None:
    """Write the errors of five samplers.

    Args:
        path: image to write.
    """
    figure, (axis,) = create_figure(1, width=7, height=4.4)
    for (name, points), style in zip(
        measure_errors().items(), line_styles(len(SAMPLERS)), strict=True
    ):
        axis.plot(list(points), list(points.values()), label=name, marker="o", **style)
    axis.set(
        xlabel="evaluations of the denoiser",
        ylabel="median distance to the exact flow's end",
        xscale="log",
        yscale="log",
    )
    axis.set_xticks(COUNTS, map(str, COUNTS))
    axis.minorticks_off()
    save_figure(figure, path)
