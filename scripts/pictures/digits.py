"""Pictures of a trained run of the recipe `digits`: samples, few evaluations, and fine-tuning."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.guidance import CFG
from diffcore.objectives import MinSNR, Objective, SampleKey
from diffcore.report.figures import create_figure, save_figure
from diffcore.run import Run
from diffcore.samplers import DDIM, AdamsMoulton, DPMSolverPP, Sampler, UniPC
from diffcore.sampling import sample
from diffcore.schedules import Trailing
from diffcore.training.data import Digits
from pictures.accuracy import plot_errors, read_summary
from pictures.tiles import show_tiles

RUN = Path("runs/digits")
SAMPLERS: dict[str, Sampler] = {
    "DDIM": DDIM(),
    "DPM-Solver++ 2M": DPMSolverPP("2M"),
    "UniPC(2)": UniPC(2),
    "AdamsMoulton(3)": AdamsMoulton(3),
}
COUNTS = (1, 2, 3, 4, 6, 8, 12, 25)
LABELS = (2, 3, 5, 8)
TUNING = (0, 5, 20, 60, 150)
"""Steps of fine-tuning after which samples are drawn."""
BATCH, LEARNING_RATE = 64, 3e-4


def draw_samples(path: Path) -> None:
    """Write samples of the run, one row for each class.

    Args:
        path: image to write.
    """
    figure, (axis,) = create_figure(1, width=4.4, height=5.2, minimum=0)
    names = [str(label) for label in range(10)]
    show_tiles(axis, _sample_classes(8).unflatten(0, (10, 8)), rows=names)
    save_figure(figure, path)


def draw_overview(path: Path, page: Path = Path("docs/benchmarks.md")) -> None:
    """Write samples of the run beside the error of samplers over network evaluations.

    Args:
        path: image to write.
        page: page with the table of errors.
    """
    figure, (left, right) = create_figure(2, width=5, height=3.8)
    show_tiles(left, _sample_classes(8).unflatten(0, (10, 8)).transpose(0, 1))
    left.set_title("samples after 450 training steps")
    title = "error of samplers, mixture in 64-D"
    plot_errors(right, read_summary(page.read_text("utf-8"))["64-D"], title)
    save_figure(figure, path)


def draw_few_steps(path: Path) -> None:
    """Write samples of four samplers over the number of steps, from common seeds.

    Args:
        path: image to write.
    """
    denoiser = Run(RUN).denoiser()
    figure, axes = create_figure(len(SAMPLERS), width=2.6, height=4.9)
    for axis, (name, sampler) in zip(axes, SAMPLERS.items(), strict=True):
        rows = [_sample(denoiser, LABELS, sampler, count) for count in COUNTS]
        show_tiles(axis, torch.stack(rows), rows=[str(count) for count in COUNTS])
        axis.set_title(name)
    axes[0].set_ylabel("steps, one evaluation of the network each")
    save_figure(figure, path)


def draw_fine_tuning(path: Path) -> None:
    """Write samples while the run is fine-tuned to inverted digits, from common seeds.

    Args:
        path: image to write.
    """
    figure, (axis,) = create_figure(1, width=6.6, height=3.3, minimum=0)
    show_tiles(axis, _tuned(), rows=[str(count) for count in TUNING])
    axis.set_ylabel("steps of fine-tuning")
    save_figure(figure, path)


@cache
def _tuned() -> Tensor:
    """Samples (rows, columns, 1, 8, 8) after each number of steps of `TUNING`."""
    denoiser = Run(RUN).denoiser()
    tuned, rows, step = Denoiser(deepcopy(denoiser.network), denoiser.process), [], 0
    for end in TUNING:
        tune(tuned, range(step, end))
        rows.append(_sample(tuned, range(10), DDIM(), 25, CFG(1.5)))
        step = end
    return torch.stack(rows)


def tune(denoiser: Denoiser, steps: range) -> None:
    """Train a network on inverted digits, x_0 in place of -x_0.

    Args:
        denoiser: network with its process; the network is changed.
        steps: numbers of the steps, which are the key of their random numbers.
    """
    denoiser.train()
    data, objective = Digits(), Objective(MinSNR(5.0))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=LEARNING_RATE)
    index = torch.arange(BATCH)
    for step in steps:
        rows = (step * BATCH + index) % len(data)
        draw = objective.draw(denoiser.process, SampleKey(0, step, index, BATCH))
        loss = objective(denoiser, -data.x0[rows], data.labels[rows], draw).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@cache
def _sample_classes(per_class: int) -> Tensor:
    """Samples (10 · per_class, 1, 8, 8) of each class in turn."""
    labels = [label for label in range(10) for _ in range(per_class)]
    return _sample(Run(RUN).denoiser(), labels, DDIM(), 25, CFG(1.5))


def _sample(
    denoiser: Denoiser, labels: Sequence[int], sampler: Sampler, steps: int, rule: CFG = CFG(1.0)
) -> Tensor:
    """Samples (N, 1, 8, 8) of labels, with seeds that count from 0."""
    denoiser.eval()
    seeds = range(len(labels))
    return sample(
        denoiser,
        sampler,
        Trailing(),
        steps,
        seeds=seeds,
        condition=list(labels),
        guidance=rule,
    ).x
