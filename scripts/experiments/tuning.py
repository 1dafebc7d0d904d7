"""How much closer tuned knots are, on exact denoisers, digits and a tiny pipeline network.

For each problem, guidance scale and number of evaluations, `GridTuning` fits knots on some seeds
and chooses between tuned and untuned on others. Both are then measured on test seeds that neither
saw, beside samplers of diffusers on the same flow. The distance is the root mean square per element
to the solved flow, and a row's error is its median.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from benchmarks.accuracy import plane, spectra
from benchmarks.sides.schedulers import SCHEDULERS, ConfiguredScheduler
from benchmarks.table import markdown_table
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.evaluation.flow.exact_flow import rms_distance, solve_flow
from diffcore.evaluation.flow.grid_tuning import (
    GRIDS,
    SAMPLERS,
    Candidate,
    GridTuning,
    HeldOut,
)
from diffcore.evaluation.flow.knot_tuning import KnotProblem
from diffcore.guidance import CFG
from diffcore.report.figures import create_figure, line_styles, save_figure
from diffcore.run import Run
from diffcore.samplers import AdamsBashforth, AdamsMoulton, Sampler, UniPC
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.sampling.loop import guided_prediction
from diffcore.schedules import BetaSpacing, Discrete, Grid, Level, Trailing
from experiments.study import continue_study

COUNTS = (4, 5, 6, 8, 10)
SCALES = {"mixture": (1.0,), "64-D": (1.0,), "decades": (1.0,), "digits": (1.0, 3.0, 7.5)}
SCALES["tiny Stable Diffusion"] = (7.5,)
DIFFUSERS = ("UniPC", "DPM++ 2M", "DPM++ 3M", "EDM DPM++", "DEIS", "IPNDM", "flow Heun", "LMS")
"""Beginnings of the names of diffusers' methods that were closest in docs/benchmarks.md."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples and steps.

    Args:
        fitted: samples to which knots are fitted.
        held_out: samples on which the choice is made.
        test: samples that are measured.
        flow_steps: number of steps of the solved flow.
        starts: number of samplers that are tuned.
        iterations: number of steps of each fit of knots, half of those of coefficients.
        samplers: samplers to try.
        grids: grids to try.
        methods: beginnings of the names of diffusers' methods that are measured.
    """

    fitted: int = 48
    held_out: int = 32
    test: int = 64
    flow_steps: int = 200
    starts: int = 2
    iterations: int = 8
    samplers: tuple[Sampler, ...] = SAMPLERS
    grids: tuple[Grid, ...] = GRIDS
    methods: tuple[str, ...] = DIFFUSERS


NETWORK = Sizes(
    fitted=12,
    held_out=16,
    test=24,
    flow_steps=60,
    starts=1,
    iterations=4,
    samplers=(AdamsMoulton(1), AdamsMoulton(2), AdamsBashforth.flow(2), UniPC(2)),
    grids=(DEFAULT_GRID, Trailing(), BetaSpacing()),
    methods=("UniPC", "flow Heun", "DPM++ 2M midpoint"),
)
"""Networks cost more: fewer samples, samplers and grids."""
SIZES = {
    "mixture": Sizes(fitted=96),  # of two elements each
    "digits": NETWORK,
    "tiny Stable Diffusion": NETWORK,
}
"""Numbers of the problems that do not have those of `Sizes()`."""


def decades() -> GaussianMixture:
    """Create a mixture of 12 Gaussians in 64-D with eigenvalues over four decades.

    Returns:
        The exact denoiser.
    """
    generator = torch.Generator().manual_seed(1)
    means = 0.5 * torch.randn(12, 64, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(torch.randn(12, 64, 64, generator=generator, dtype=torch.float64))
    variances = 0.5 * 10 ** torch.linspace(0, -4, 64, dtype=torch.float64)
    return GaussianMixture(means, (axes * variances) @ axes.mT, process=Process(shape=(64,)))


class Prompted(nn.Module):
    """A tiny network of Stable Diffusion under the embedding of a prompt (label 0), or none (1)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.unet: Any = diffusers.UNet2DConditionModel(  # type: ignore[no-untyped-call]
            sample_size=16,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        torch.random.set_rng_state(state)
        self.register_buffer("embeddings", torch.randn(2, 5, 8, generator=generator))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        """The output for x (B, 4, 16, 16) at times (B,) under labels (B,)."""
        embedded = self.get_buffer("embeddings")[class_labels]
        output: Tensor = self.unet(x, time, encoder_hidden_states=embedded).sample
        return output


def tiny_pipeline() -> Denoiser:
    """The denoiser of a tiny, untrained network of a StableDiffusionPipeline.

    Returns:
        The denoiser, of one prompt.
    """
    table = Discrete("scaled_linear", start=0.00085, end=0.012)
    process = Process(table, "epsilon", shape=(4, 16, 16), sigma_data=1.0, classes=1, dropout=0.1)
    return Denoiser(Prompted(), process).eval()


def problem_builders(run: Path) -> dict[str, Callable[[], DenoiserProtocol]]:
    """The exact denoisers and networks of the studies of knots.

    Args:
        run: folder of a run of the digits recipe.

    Returns:
        Name -> function that builds the denoiser.
    """
    return {
        "mixture": plane,
        "64-D": spectra,
        "decades": decades,
        "digits": lambda: Run(run).denoiser(),
        "tiny Stable Diffusion": tiny_pipeline,
    }


def study_cells(
    names: Sequence[str], scales: Mapping[str, Sequence[float]], counts: Sequence[int]
) -> list[tuple[str, float, int]]:
    """The cells of a study of knots, in the order in which they are measured.

    Args:
        names: names of problems.
        scales: guidance scales of each problem.
        counts: numbers of evaluations.

    Returns:
        Problem, scale and number of evaluations of each cell.
    """
    return [(name, scale, count) for name in names for scale in scales[name] for count in counts]


def run_study(out: Path, run: Path, only: Sequence[str] = ()) -> Iterator[str]:
    """Measure the cells that the file of measurements lacks.

    Args:
        out: file of measurements.
        run: folder of a run of the digits recipe.
        only: names of problems; none: all.

    Yields:
        The lines that were appended.
    """
    builders = problem_builders(run)
    cells = study_cells(only or list(builders), SCALES, COUNTS)

    @cache
    def problem(name: str, scale: float) -> "TuningProblem":
        return TuningProblem.solve(builders[name](), scale, SIZES.get(name, Sizes()))

    def measure(name: str, scale: float, count: int) -> Iterable[Mapping[str, Any]]:
        return [problem(name, scale).measure(count)]

    yield from continue_study(out, ("problem", "scale", "evaluations"), cells, measure)


@dataclass(frozen=True)
class TuningProblem:
    """A network with guidance, and three sets of samples with the ends of their flow.

    Args:
        fitted: samples to which knots are fitted.
        held_out: samples on which the choice is made.
        test: samples that are measured.
        sizes: numbers of samples and steps.
    """

    fitted: KnotProblem
    held_out: KnotProblem
    test: KnotProblem
    sizes: Sizes

    @classmethod
    def solve(cls, denoiser: DenoiserProtocol, scale: float, sizes: Sizes) -> "TuningProblem":
        """Solve the flow of all samples.

        Args:
            denoiser: network with its process, or an exact denoiser.
            scale: guidance scale w.
            sizes: numbers of samples and steps.

        Returns:
            The problem.
        """
        counts = (sizes.fitted, sizes.held_out, sizes.test)
        total, classes, rule = sum(counts), denoiser.process.classes, CFG(scale)
        labels = torch.arange(total) % classes if classes else None
        flow = solve_flow(denoiser, range(total), labels, rule, sizes.flow_steps)
        parts, start = [], 0
        for count in counts:
            rows = slice(start, start + count)
            condition = None if labels is None else labels[rows]
            seeds = range(total)[rows]
            parts.append(
                KnotProblem(denoiser, rule, seeds, flow.x[rows], condition, count, 0, flow.error)
            )
            start += count
        return cls(*parts, sizes)

    def measure(self, count: int) -> dict[str, Any]:
        """Tune one number of evaluations, and measure on the test samples.

        Args:
            count: number of evaluations.

        Returns:
            Plain data.
        """
        tuning = GridTuning(
            self.fitted,
            self.held_out,
            self.sizes.samplers,
            self.sizes.grids,
            starts=self.sizes.starts,
            iterations=self.sizes.iterations,
        ).tune(count)
        others = {
            f"{entry.method}, {entry.grid}": self.measure_scheduler(entry, count)
            for entry in SCHEDULERS
            if entry.method.startswith(self.sizes.methods)
        }
        finite = {name: value for name, value in others.items() if value is not None}
        best = min(finite, key=lambda name: finite[name].median) if finite else ""
        default = Candidate(DEFAULT_SAMPLER, DEFAULT_GRID, count, 0.0)
        return {
            "chosen": tuning.chosen.name,
            "untuned": tuning.untuned.name,
            "diffusers": best,
            "is_better": tuning.is_better,
            "flow_error": self.test.error,
            "errors": {
                "chosen": self._test(tuning.chosen),
                "untuned": self._test(tuning.untuned),
                "default": self._test(default),
                "diffusers": finite[best]._asdict() if best else None,
            },
        }

    def _test(self, candidate: Candidate) -> dict[str, float]:
        arguments = candidate.sampler, candidate.grid, candidate.steps
        return HeldOut.of(self.test.distances(*arguments))._asdict()

    def measure_scheduler(self, entry: ConfiguredScheduler, count: int) -> HeldOut | None:
        """Measure a scheduler of diffusers on the test samples.

        Args:
            entry: the scheduler.
            count: largest number of evaluations.

        Returns:
            The distances; None if not even one step is possible or a sample is not finite.
        """
        ends = entry.run(_Guided(self.test), count)  # type: ignore[arg-type]
        if ends is None or not ends[0].isfinite().all():
            return None
        return HeldOut.of(rms_distance(ends[0], self.test.ends))


class _Guided:
    """The part of `benchmarks.accuracy.Problem` that a scheduler of diffusers needs.

    Args:
        problem: samples of a network with guidance.
    """

    def __init__(self, problem: KnotProblem) -> None:
        self.problem, self.oracle = problem, self._predict

    def at(self, level: Level) -> Tensor:
        """x at the first level of a scheduler, from the same noise as ours.

        A first-order step leads there from the noisiest level: x_0 is nearly constant so far from
        the data.
        """
        problem = self.problem
        process = problem.denoiser.process
        noise = Noise(torch.tensor(problem.seeds), process.shape, dtype=torch.float64)
        first = process.schedule.level(1.0)
        x = noise.first_sample(first, process.sigma_data)
        if float(level.logsnr) <= float(first.logsnr):
            return x * float(level.sigma) / float(first.sigma)
        return self._own(x, first).at(level)

    def _predict(self, x: Tensor, level: Level) -> Prediction:
        schedule = self.problem.denoiser.process.schedule
        logsnr = min(float(level.logsnr), float(schedule.cleanest.logsnr))
        own = schedule.at(max(logsnr, schedule.logsnr(1.0)))
        norm = (float(own.alpha) ** 2 + float(own.sigma) ** 2) ** 0.5
        other = (float(level.alpha) ** 2 + float(level.sigma) ** 2) ** 0.5
        return self._own(x * norm / other, own)

    @torch.no_grad()
    def _own(self, x: Tensor, level: Level) -> Prediction:
        problem = self.problem
        condition = None if problem.condition is None else torch.as_tensor(problem.condition)
        given = guided_prediction(problem.denoiser, problem.guidance, x, level, condition, None)
        return replace(given[0], x0=given[0].x0.double(), eps=given[0].eps.double())


def format_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    """The errors of each row, and the ratios.

    Args:
        measurements: measurements of the study.

    Returns:
        The table as Markdown.
    """
    rows = []
    for row in measurements:
        errors = {name: value and value["median"] for name, value in row["errors"].items()}
        ratios = [errors["untuned"] / errors["chosen"], None]
        if errors["diffusers"]:
            ratios[1] = errors["diffusers"] / errors["chosen"]
        numbers = [errors[name] for name in ("chosen", "untuned", "default", "diffusers")]
        rows.append(
            [
                row["problem"],
                f"{row['scale']:g}",
                str(row["evaluations"]),
                *("" if number is None else f"{number:.2g}" for number in numbers),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                row["untuned"],
            ]
        )
    header = ["problem", "w", "evaluations", "tuned", "untuned", "default", "diffusers"]
    return markdown_table([*header, "untuned / tuned", "diffusers / tuned", "best untuned"], rows)


def draw(measurements: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the errors over evaluations.

    Args:
        measurements: measurements of the study.
        path: file of the picture.
    """
    sides = ("chosen", "untuned", "default", "diffusers")
    keys = list(dict.fromkeys((row["problem"], row["scale"]) for row in measurements))
    figure, all_axes = create_figure(len(keys), width=3.4, height=3.2)
    for axes, (name, scale) in zip(all_axes, keys, strict=True):
        rows = [row for row in measurements if (row["problem"], row["scale"]) == (name, scale)]
        for side, style in zip(sides, line_styles(len(sides)), strict=True):
            errors = {row["evaluations"]: row["errors"][side] for row in rows}
            points = [(count, errors[count]) for count in sorted(errors) if errors[count]]
            x, y = zip(*((count, error["median"]) for count, error in points), strict=True)
            axes.plot(x, y, label="tuned" if side == "chosen" else side, marker="o", **style)
        axes.set(title=f"{name}, w = {scale:g}", xlabel="evaluations", yscale="log")
    all_axes[0].set_ylabel("median distance to the flow")
    save_figure(figure, path, dpi=110)
