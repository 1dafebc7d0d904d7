"""A study of guidance on the digits: what each rule makes of its scale w.

Every run has the same small network; its average samples 500 digits by each rule at each w, over the same λ knots. The weaker
network of autoguidance is the average of a run of a third of the parameters and an eighth of the steps.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore.cli.figures import create_figure, line_styles, save_figure
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.evaluation.digits import scan
from diffcore.evaluation.metrics import Reader, frechet_distance
from diffcore.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    AutoGuidance,
    Guidance,
    Interval,
    Rescale,
    find_weaker_networks,
)
from diffcore.samplers import DDIM
from diffcore.sampling.generation import evaluating, sample
from diffcore.sampling.loop import watch
from diffcore.training.data import Digits
from experiments.training import ARMS, KNOTS, averaged, network, rows, trainer

TABLES = (
    ("test", "Fréchet distance to the held-out scans", 0),
    ("train", "Fréchet distance to the training scans", 0),
    ("recognised", "Share recognised", 3),
    ("saturation", "Share of pixels at or beyond the bounds", 3),
    ("excess", "Mean excess over the bounds", 4),
    ("evaluations", "Evaluations a sample, in batches of 100", 1),
)
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
STEPS = 20
POINTS = (100, 800)
"""Optimizer steps of the weaker network, and of the network."""
SMALLER = (16, 32)
"""Channels of the weaker network."""
BATCHES = (1, 10, 100)
"""Samples that are integrated together, which decide what AdaptiveGuidance saves."""
THRESHOLD = 0.95
"""Of AdaptiveGuidance's cosine of v: at w = 3 all of a hundred samples pass it by λ = -0.6 (`diffcore.sampling.loop.watch`)."""
CONDITIONAL = "conditional"
ADAPTIVE = "AdaptiveGuidance(CFG)"
MARKERS = "osD^v<>"
TITLES = {
    "test": "Fréchet distance to the held-out scans",
    "recognised": "share recognised",
    "saturation": "share of pixels at or beyond the bounds",
    "evaluations": "evaluations a sample, in batches of 100",
}


class Pair(NamedTuple):
    """A run's network, and a smaller one that has learned less."""

    strong: Denoiser
    weaker: Denoiser


def _interval(rule: Guidance) -> Guidance:
    """The interval published for EDM2, in units of the data's deviation."""
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
"""What is compared, as functions of w and the weaker network. At w = 1 each is the conditional model."""


def trained(seed: int, points: tuple[int, int] = POINTS) -> Pair:
    """The averaged networks of two runs of one seed."""
    with TemporaryDirectory() as folder:
        start = partial(trainer, ARMS["cosine, v, Min-SNR"], "stratified", seed, Path(folder))
        return Pair(
            averaged(start(points[1], network)),
            averaged(start(points[0], partial(network, SMALLER))),
        )


def measure(denoiser: Denoiser, guidance: Guidance, seed: int, count: int = 500) -> dict[str, Any]:
    """What a rule makes of the digits.

    train, test: Fréchet distance to the training scans and to the held-out ones; recognised: share that a support vector
    machine reads as its label; saturation: share of pixels with |x| ≥ 1, before they are clamped; excess: mean of
    max(|x| - 1, 0); evaluations: of the network for each sample, by the number of samples that are integrated together (of
    the first ones, where they differ).
    """
    labels = torch.arange(count) % 10
    seeds = range(seed * 10**6, seed * 10**6 + count)
    made = sample(
        denoiser,
        DDIM(),
        KNOTS,
        STEPS,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=max(BATCHES),
    )
    used = dict.fromkeys(BATCHES, made.evaluations)
    if isinstance(guidance, AdaptiveGuidance):
        alone = seeds[: 2 * max(BATCHES)]
        asked = references(denoiser, guidance, torch.tensor(alone), labels[: len(alone)])
        used = {size: len(made.knots) - 1 + shared(asked, size) for size in BATCHES}
    return {
        **quality(made.x, labels),
        "evaluations": {str(size): value for size, value in used.items()},
    }


def quality(x: Tensor, labels: Tensor) -> dict[str, float]:
    """Distances, share recognised, saturation and excess of samples."""
    train, test = Digits("train"), Digits("test")
    return {
        "train": frechet_distance(scan(x), scan(train.x0)),
        "test": frechet_distance(scan(x), scan(test.x0)),
        "recognised": Reader(train.x0, train.labels).recognised(x.clamp(-1, 1), labels),
        "saturation": float((x.abs() >= 1).float().mean()),
        "excess": float((x.abs() - 1).clamp(min=0).mean()),
    }


def references(denoiser: Denoiser, rule: AdaptiveGuidance, seeds: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many evaluations of the reference each sample alone would need, until it agrees."""
    knots = KNOTS.knots(denoiser.process.schedule, STEPS)
    noise = Noise(seeds, denoiser.process.shape)
    x = noise.first_sample(knots[0], denoiser.process.sigma_data)
    with evaluating(denoiser, *find_weaker_networks(rule)):
        path = list(watch(denoiser, DDIM(), x, knots, noise, rule, labels))
    agreed = [rule.cosine(seen) >= rule.threshold for seen in path if seen.references]
    if not agreed:
        return torch.zeros(len(seeds), dtype=torch.int64)
    before = torch.stack(agreed).cumsum(0) == 0
    return (before.sum(0) + 1).clamp(max=len(agreed))


def shared(asked: Tensor, size: int) -> float:
    """Mean evaluations of the reference where `size` samples go together: as many as the last of them needs."""
    return mean(float(chunk.max()) for chunk in asked.split(size) for _ in chunk)


def study(
    out: Path, seeds: Iterable[int], scales: Iterable[float] = SCALES, count: int = 500
) -> Iterator[str]:
    """Measure every rule, w and seed that `out` does not hold yet, a line of JSON each; w = 1 is one model for all rules."""
    done = {(row["rule"], row["scale"], row["seed"]) for row in rows(out)}
    cells = [
        (CONDITIONAL, 1.0),
        *((name, scale) for scale in scales if scale != 1 for name in RULES),
    ]
    for seed in seeds:
        missing = [cell for cell in cells if (*cell, seed) not in done]
        if not missing:
            continue
        pair = trained(seed)
        for name, scale in missing:
            rule = CFG() if name == CONDITIONAL else RULES[name](scale, pair.weaker)
            found = {
                "rule": name,
                "scale": scale,
                "seed": seed,
                **measure(pair.strong, rule, seed, count),
            }
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            yield json.dumps(found)


def values(
    measured: list[dict[str, Any]], rule: str, scale: float, what: str, size: int = max(BATCHES)
) -> list[float]:
    """One measurement of each seed; evaluations where `size` samples go together."""
    name = CONDITIONAL if scale == 1 else rule
    found = [row[what] for row in measured if (row["rule"], row["scale"]) == (name, scale)]
    return [value[str(size)] for value in found] if what == "evaluations" else found


def table(measured: list[dict[str, Any]], what: str, digits: int = 1) -> str:
    """Mean over seeds of one measurement, and half its range: a row a rule, a column a scale, as Markdown."""
    scales = sorted({row["scale"] for row in measured})
    lines = [
        "| rule | " + " | ".join(f"w = {scale:g}" for scale in scales) + " |",
        "|---|" + "---|" * len(scales),
    ]
    for name in RULES:
        cells = [_cell(values(measured, name, scale, what), digits) for scale in scales]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def savings(measured: list[dict[str, Any]]) -> str:
    """Evaluations that AdaptiveGuidance leaves out of CFG's, by batch, and both distances to the held-out scans."""
    scales = sorted({row["scale"] for row in measured if row["rule"] == ADAPTIVE})
    heads = [
        "w",
        "CFG",
        *(f"batch {size}" for size in BATCHES),
        "distance, CFG",
        "distance, AdaptiveGuidance",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for scale in scales:
        full = mean(values(measured, "CFG", scale, "evaluations"))
        used = [mean(values(measured, ADAPTIVE, scale, "evaluations", size)) for size in BATCHES]
        saved = [f"{value:.1f} (-{1 - value / full:.0%})" for value in used]
        distances = [_cell(values(measured, name, scale, "test"), 1) for name in ("CFG", ADAPTIVE)]
        lines.append("| " + " | ".join([f"{scale:g}", f"{full:g}", *saved, *distances]) + " |")
    return "\n".join(lines)


def draw(measured: list[dict[str, Any]], out: Path) -> None:
    """Write a picture of each measurement over w, named after it."""
    scales = sorted({row["scale"] for row in measured})
    for what, title in TITLES.items():
        made, (axis,) = create_figure(1)
        for (name, style), marker in zip(
            zip(RULES, line_styles(len(RULES)), strict=True), MARKERS, strict=True
        ):
            found = {scale: values(measured, name, scale, what) for scale in scales}
            curve = {scale: mean(each) for scale, each in found.items() if each}
            axis.plot(list(curve), list(curve.values()), label=name, marker=marker, **style)
        axis.set(
            title=title,
            xlabel="w",
            xscale="log",
            xticks=scales,
            xticklabels=[f"{scale:g}" for scale in scales],
        )
        axis.minorticks_off()
        save_figure(made, out / f"guidance-{what}.png")


def _cell(found: list[float], digits: int) -> str:
    return f"{mean(found):.{digits}f} ± {(max(found) - min(found)) / 2:.{digits}f}" if found else ""
