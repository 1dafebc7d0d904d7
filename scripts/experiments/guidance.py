"""How the scale w of each guidance rule changes samples of digits.

All runs share one small network; its average draws 500 digits by each rule at each w over common λ
knots. The weaker network of autoguidance is the average of a run with a third of the parameters and
an eighth of the steps.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table, mean_and_half_range
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.evaluation.label_accuracy import LabelClassifier
from diffcore.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    AutoGuidance,
    Guidance,
    Interval,
    Rescale,
    find_networks,
)
from diffcore.report.figures import create_figure, line_styles, save_figure
from diffcore.samplers import DDIM
from diffcore.sampling.generation import evaluation_mode, sample
from diffcore.sampling.loop import watch
from diffcore.training.data import Digits
from experiments.study import continue_study, sample_seeds, small_unet, train_averaged
from experiments.training import KNOTS, VARIANTS, digits_trainer, digits_unet, scan_distances

TABLES = (
    ("test", "Fréchet distance to the held-out scans", 0),
    ("train", "Fréchet distance to the training scans", 0),
    ("recognised", "Share recognised", 3),
    ("saturation", "Share of pixels at or beyond the bounds", 3),
    ("excess", "Mean excess over the bounds", 4),
    ("evaluations", "Evaluations a sample, in batches of 100", 1),
)
"""Measured quantity, title and digits of each table."""
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
STEPS = 20
TRAINING_STEPS = (100, 800)
"""Optimizer steps of the weaker network, and of the network."""
WEAKER_CHANNELS = (16, 32)
BATCHES = (1, 10, 100)
"""Numbers of samples that are drawn together, on which the savings of AdaptiveGuidance depend."""
THRESHOLD = 0.95
"""Cosine of v at which AdaptiveGuidance stops: at w = 3, a hundred samples pass it by λ = -0.6."""
CONDITIONAL = "conditional"
ADAPTIVE = "AdaptiveGuidance(CFG)"
MARKERS = "osD^v<>"
TITLES = {
    "test": "Fréchet distance to the held-out scans",
    "recognised": "share recognised",
    "saturation": "share of pixels at or beyond the bounds",
    "evaluations": "evaluations a sample, in batches of 100",
}
"""Measured quantity and title of each picture."""


class NetworkPair(NamedTuple):
    """The network of a run, and a smaller one with shorter training."""

    strong: Denoiser
    weaker: Denoiser


def _interval(rule: Guidance) -> Guidance:
    """The interval published for EDM2, in units of the data's standard deviation."""
    return Interval(rule, low=0.19, high=1.61, sigma_data=0.5)


RULES: dict[str, Callable[[float, Denoiser], Guidance]] = {
    "CFG": lambda w, weaker: CFG(w),
    "Rescale(CFG)": lambda w, weaker: Rescale(CFG(w)),
    "APG": lambda w, weaker: APG(w),
    "Interval(CFG)": lambda w, weaker: _interval(CFG(w)),
    "Interval(APG)": lambda w, weaker: _interval(APG(w)),
    "AutoGuidance": AutoGuidance,
    ADAPTIVE: lambda w, weaker: AdaptiveGuidance(CFG(w), THRESHOLD),
}
"""Compared rules as functions of w and the weaker network; w = 1 is the conditional model."""


def train_pair(seed: int, steps: tuple[int, int] = TRAINING_STEPS) -> NetworkPair:
    """Train both networks.

    Args:
        seed: seed of both runs.
        steps: optimizer steps of the weaker network, and of the network.

    Returns:
        Their averages.
    """
    with TemporaryDirectory() as folder:
        start = partial(digits_trainer, VARIANTS["cosine, v, Min-SNR"], "stratified", seed)
        weaker_unet = partial(small_unet, 8, 1, WEAKER_CHANNELS, 11)
        return NetworkPair(
            train_averaged(start(Path(folder, "strong"), steps[1], digits_unet)),
            train_averaged(start(Path(folder, "weaker"), steps[0], weaker_unet)),
        )


def measure(denoiser: Denoiser, guidance: Guidance, seed: int, count: int = 500) -> dict[str, Any]:
    """Measure the samples of a rule, and their cost.

    Args:
        denoiser: trained network.
        guidance: the rule.
        seed: seed of the samples.
        count: number of samples.

    Returns:
        `measure_quality` of the samples; and evaluations: network evaluations of each sample by the
        number of samples that are drawn together (over the first samples, if the number matters).
    """
    labels = torch.arange(count) % 10
    seeds = sample_seeds(seed, count)
    samples = sample(
        denoiser,
        DDIM(),
        KNOTS,
        STEPS,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=max(BATCHES),
    )
    evaluations = dict.fromkeys(BATCHES, samples.evaluations)
    if isinstance(guidance, AdaptiveGuidance):
        first = seeds[: 2 * max(BATCHES)]
        counts = count_references(denoiser, guidance, torch.tensor(first), labels[: len(first)])
        steps = len(samples.knots) - 1
        evaluations = {size: steps + shared_count(counts, size) for size in BATCHES}
    return {
        **measure_quality(samples.x, labels),
        "evaluations": {str(size): value for size, value in evaluations.items()},
    }


def measure_quality(x: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure samples of digits.

    Args:
        x: (N, 1, 8, 8) samples, which may exceed [-1, 1].
        labels: (N,) digits that they were conditioned on.

    Returns:
        train, test: Fréchet distance to the training and to the held-out scans; recognised: share
        that a support vector machine assigns to their labels; saturation: share of pixels with
        |x| ≥ 1; excess: mean of max(|x| - 1, 0).
    """
    scans, (to_train, to_test) = Digits("train"), scan_distances(x)
    classifier = LabelClassifier(scans.x0, scans.labels)
    return {
        "train": to_train,
        "test": to_test,
        "recognised": classifier.accuracy(x.clamp(-1, 1), labels),
        "saturation": float((x.abs() >= 1).float().mean()),
        "excess": float((x.abs() - 1).clamp(min=0).mean()),
    }


def count_references(
    denoiser: Denoiser, rule: AdaptiveGuidance, seeds: Tensor, labels: Tensor
) -> Tensor:
    """Count the evaluations of the reference that each sample needs if it is drawn alone.

    Args:
        denoiser: trained network.
        rule: the adaptive rule.
        seeds: (N,) seeds of the samples.
        labels: (N,) digits.

    Returns:
        (N,) counts.
    """
    knots = KNOTS.knots(denoiser.process.schedule, STEPS)
    noise = Noise(seeds, denoiser.process.shape)
    x = noise.first_sample(knots[0], denoiser.process.sigma_data)
    with evaluation_mode(denoiser, *find_networks(rule)):
        path = list(watch(denoiser, DDIM(), x, knots, noise, rule, labels))
    agrees = [rule.cosine(seen) >= rule.threshold for seen in path if seen.references]
    if not agrees:
        return torch.zeros(len(seeds), dtype=torch.int64)
    before = torch.stack(agrees).cumsum(0) == 0
    return (before.sum(0) + 1).clamp(max=len(agrees))


def shared_count(counts: Tensor, size: int) -> float:
    """The mean count if samples are drawn together: a batch needs the largest count of its samples.

    Args:
        counts: (N,) counts of the samples alone.
        size: number of samples in a batch.

    Returns:
        The mean over samples.
    """
    return mean(float(batch.max()) for batch in counts.split(size) for _ in batch)


def run_study(
    out: Path, seeds: Iterable[int], scales: Iterable[float] = SCALES, count: int = 500
) -> Iterator[str]:
    """Measure all rules, scales and seeds that a file does not contain yet; w = 1 is one cell.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the samples.
        scales: values of w.
        count: number of samples.

    Yields:
        The lines that are appended to the file.
    """
    rules = [
        (CONDITIONAL, 1.0),
        *((name, scale) for scale in scales if scale != 1 for name in RULES),
    ]
    pair_of = lru_cache(maxsize=1)(train_pair)

    def measure_cell(name: str, scale: float, seed: int) -> list[dict[str, Any]]:
        pair = pair_of(seed)
        rule = CFG() if name == CONDITIONAL else RULES[name](scale, pair.weaker)
        return [measure(pair.strong, rule, seed, count)]

    cells = [(*rule, seed) for seed in seeds for rule in rules]
    return continue_study(out, ("rule", "scale", "seed"), cells, measure_cell)


def values_of(
    measurements: list[dict[str, Any]],
    rule: str,
    scale: float,
    quantity: str,
    size: int = max(BATCHES),
) -> list[float]:
    """Select one quantity of a rule.

    Args:
        measurements: content of the study's file.
        rule: name of the rule.
        scale: value of w.
        quantity: name of the quantity.
        size: number of samples drawn together, for the evaluations.

    Returns:
        The value for each seed.
    """
    name = CONDITIONAL if scale == 1 else rule
    values = [row[quantity] for row in measurements if (row["rule"], row["scale"]) == (name, scale)]
    return [value[str(size)] for value in values] if quantity == "evaluations" else values


def format_table(measurements: list[dict[str, Any]], quantity: str, digits: int = 1) -> str:
    """Format one quantity: mean over seeds and half the range, for each rule and scale.

    Args:
        measurements: content of the study's file.
        quantity: name of the quantity.
        digits: digits after the decimal point.

    Returns:
        The table as Markdown.
    """
    scales = sorted({row["scale"] for row in measurements})
    rows = []
    for name in RULES:
        cells = [values_of(measurements, name, scale, quantity) for scale in scales]
        rows.append([name, *(mean_and_half_range(cell, digits) for cell in cells)])
    return markdown_table(["rule", *(f"w = {scale:g}" for scale in scales)], rows)


def format_savings(measurements: list[dict[str, Any]]) -> str:
    """Format the evaluations that AdaptiveGuidance saves, by batch, and both distances.

    Args:
        measurements: content of the study's file.

    Returns:
        The table as Markdown.
    """
    scales = sorted({row["scale"] for row in measurements if row["rule"] == ADAPTIVE})
    batches = [f"batch {size}" for size in BATCHES]
    header = ["w", "CFG", *batches, "distance, CFG", "distance, AdaptiveGuidance"]
    rows = []
    for scale in scales:
        full = mean(values_of(measurements, "CFG", scale, "evaluations"))
        used = [
            mean(values_of(measurements, ADAPTIVE, scale, "evaluations", size)) for size in BATCHES
        ]
        saved = [f"{value:.1f} (-{1 - value / full:.0%})" for value in used]
        distances = [
            mean_and_half_range(values_of(measurements, name, scale, "test"), 1)
            for name in ("CFG", ADAPTIVE)
        ]
        rows.append([f"{scale:g}", f"{full:g}", *saved, *distances])
    return markdown_table(header, rows)


def draw(measurements: list[dict[str, Any]], folder: Path) -> None:
    """Write a picture of each quantity over w, named after it.

    Args:
        measurements: content of the study's file.
        folder: folder of the pictures.
    """
    for quantity in TITLES:
        draw_quantity(measurements, quantity, folder / f"guidance-{quantity}.png")


def draw_quantity(measurements: list[dict[str, Any]], quantity: str, path: Path) -> None:
    """Draw a quantity over w, a line for each rule.

    Args:
        measurements: content of the study's file.
        quantity: name of the quantity, a key of `TITLES`.
        path: image to write.
    """
    scales = sorted({row["scale"] for row in measurements})
    figure, (axis,) = create_figure(1)
    for name, style, marker in zip(RULES, line_styles(len(RULES)), MARKERS, strict=True):
        values = {scale: values_of(measurements, name, scale, quantity) for scale in scales}
        curve = {scale: mean(each) for scale, each in values.items() if each}
        axis.plot(list(curve), list(curve.values()), label=name, marker=marker, **style)
    labels = [f"{scale:g}" for scale in scales]
    axis.set(title=TITLES[quantity], xlabel="w", xscale="log", xticks=scales, xticklabels=labels)
    axis.minorticks_off()
    save_figure(figure, path)
