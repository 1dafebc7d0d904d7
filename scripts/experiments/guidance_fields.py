"""Pictures of guided fields and samples of a mixture in two dimensions with exact predictions.

The samples are conditioned on class 0, which has a common and a rare component, each beside a
component of class 1.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    AutoGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    ComposedConditions,
    Guidance,
    Interval,
    Label,
    MinorityGuidance,
    Rescale,
    Step,
)
from diffcore.report.figures import create_figure, save_figure
from diffcore.samplers import DDIM, PredictorCorrector, Sampler
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction
from diffcore.schedules import Cosine, Level, Trailing

PROCESS = Process(Cosine(), shape=(2,), sigma_data=1.0, classes=2, dropout=0.1)
MEANS = torch.tensor([[-0.2, 1.1], [1.2, -0.3], [-1.1, 0.2], [0.2, -1.0]])
SPREAD = 0.07 * torch.eye(2).expand(4, 2, 2)
WEIGHTS, LABELS = torch.tensor([0.35, 0.15, 0.25, 0.25]), torch.tensor([0, 0, 1, 1])
MIXTURE = GaussianMixture(MEANS, SPREAD, WEIGHTS, LABELS, PROCESS)
WEAKER = GaussianMixture(MEANS, 4 * SPREAD, WEIGHTS, LABELS, PROCESS)
COMPONENTS = GaussianMixture(MEANS[:2], SPREAD[:2], WEIGHTS[:2], torch.arange(2), PROCESS)
"""The components of class 0: 0 is common, 1 is rare."""
CLEAN = PROCESS.schedule.at(math.inf)
SPAN = 2.4
COUNT, STEPS = 400, 40


def class_of(x: Tensor, level: Level) -> Tensor:
    """The logits (N, 2) of the classes of noisy x."""
    return _logits(MIXTURE, x, level)


def class_of_x0(x0: Tensor, level: Level) -> Tensor:
    """The logits (N, 2) of the classes of clean data, as an ordinary classifier computes them."""
    return _logits(MIXTURE, x0, CLEAN)


def rarity_of(x: Tensor, level: Level) -> Tensor:
    """The logits (N, 2) of the components of class 0, the exact classifier of MinorityGuidance."""
    return _logits(COMPONENTS, x, level)


class GuidedSampler(NamedTuple):
    """A guidance rule and the sampler that uses it."""

    rule: Guidance
    sampler: Sampler = DDIM()


PANELS = {
    "conditional, w = 1": GuidedSampler(CFG(1.0)),
    "CFG, w = 3": GuidedSampler(CFG(3.0)),
    "Rescale(CFG), φ = 0.7": GuidedSampler(Rescale(CFG(3.0))),
    "APG, w = 3": GuidedSampler(APG(3.0)),
    "Interval(CFG), (0.3, 1.6]": GuidedSampler(Interval(CFG(3.0), sigma=(0.3, 1.6))),
    "AdaptiveGuidance(CFG), 0.97": GuidedSampler(AdaptiveGuidance(CFG(3.0), 0.97)),
    "AutoGuidance, w = 2": GuidedSampler(AutoGuidance(2.0, WEAKER)),
    "CFG from label 1, w = 1.5": GuidedSampler(CFG(1.5, Label(1))),
    "Composed: less of label 1": GuidedSampler(ComposedConditions((1,), (-0.25,), 2.0)),
    "CFGPlusPlus, w = 0.6": GuidedSampler(CFGPlusPlus(0.6)),
    "CFGZeroStar, w = 3": GuidedSampler(CFGZeroStar(3.0)),
    "CFG(3), 5 corrections": GuidedSampler(
        CFG(3.0), PredictorCorrector(corrections=5, guides="corrector")
    ),
    "classifier of x_0, w = 2": GuidedSampler(ClassifierGuidance(class_of_x0, 2.0, input="x0")),
    "GFCG, w = 3": GuidedSampler(GFCG(class_of_x0, 3.0)),
    "MinorityGuidance, w = 1": GuidedSampler(MinorityGuidance(rarity_of, 1.0, label=1)),
}


def draw_fields(path: Path, logsnr: float = 0.0) -> None:
    """Write the change of points x/α by a step to half of the noise, for each rule.

    Args:
        path: image to write.
        logsnr: λ of the points.
    """
    figure, axes = _panels()
    for axis, (title, panel) in zip(axes, PANELS.items(), strict=True):
        plot_field(axis, panel, PROCESS.schedule.at(logsnr))
        axis.set_title(title, fontsize=9)
    save_figure(figure, path, dpi=80)


def draw_samples(path: Path) -> None:
    """Write samples of class 0 by each rule from common seeds.

    Args:
        path: image to write.
    """
    figure, axes = _panels()
    for axis, (title, panel) in zip(axes, PANELS.items(), strict=True):
        axis.set_title(f"{title}: {plot_samples(axis, panel):.0%} rare", fontsize=9)
    save_figure(figure, path, dpi=80)


def plot_field(axis: Any, panel: GuidedSampler, here: Level) -> None:
    """Draw the change of points x/α by a first-order step to half of the noise.

    Args:
        axis: axes of matplotlib.
        panel: guidance rule.
        here: noise level of the points.
    """
    there = PROCESS.schedule.at(float(here.logsnr) + 2 * math.log(2))
    y = _lattice(13)
    change = _next(panel.rule, y, here, there) - y
    _contours(axis, here)
    axis.quiver(
        *y.T, *change.T, angles="xy", scale_units="xy", scale=2.5, width=0.004, color=_ink()
    )


def plot_samples(axis: Any, panel: GuidedSampler) -> float:
    """Draw samples of class 0.

    Args:
        axis: axes of matplotlib.
        panel: guidance rule with its sampler.

    Returns:
        The share of samples in the rare component.
    """
    x = draw_class_0(panel)
    _contours(axis, CLEAN)
    axis.plot(*x.T, ".", color=_ink(), markersize=2.5)
    return float((x[:, 0] > 0.5).float().mean())


def draw_class_0(panel: GuidedSampler) -> Tensor:
    """Draw (COUNT, 2) samples of class 0."""
    labels = torch.zeros(COUNT, dtype=torch.int64)
    return sample(
        MIXTURE,
        panel.sampler,
        Trailing(),
        STEPS,
        seeds=range(COUNT),
        condition=labels,
        guidance=panel.rule,
        batch_size=COUNT,
    ).x


def _next(rule: Guidance, y: Tensor, here: Level, there: Level) -> Tensor:
    """The first-order step in y = x/α, after an evaluation that fills the memory of the rule."""
    x, labels, memory = here.alpha * y, torch.zeros(len(y), dtype=torch.int64), None
    for index in (0, 1):
        step = Step(PROCESS, here, here, there, index, 2)
        prediction, memory, _ = guided_prediction(MIXTURE, rule, x, here, labels, memory, step)
    return prediction.at(there) / there.alpha


def _panels() -> tuple[Any, Any]:
    figure, axes = create_figure(5, math.ceil(len(PANELS) / 5), width=3.1, height=3.2)
    return figure, axes[: len(PANELS)]


def _ink() -> str:
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def _contours(axis: Any, level: Level) -> None:
    """Draw the densities of y = x/α: class 0 filled, class 1 dashed."""
    from matplotlib.colors import LinearSegmentedColormap

    greys = LinearSegmentedColormap.from_list("", [axis.get_facecolor(), _ink()])
    filled = {"colors": [greys(share) for share in (0.12, 0.25, 0.4)]}
    lines = {"colors": [greys(0.65)], "linestyles": "dashed" if level.sigma else "solid"}
    y = _lattice(81)
    for label, draw, style in ((0, axis.contourf, filled), (1, axis.contour, lines)):
        density = (
            MIXTURE.log_density(level.alpha * y, level, torch.full((len(y),), label))
            .exp()
            .view(81, 81)
        )
        levels = float(density.max()) * torch.tensor([0.05, 0.3, 0.7, 1.0])
        draw(*(c.view(81, 81) for c in y.T), density, levels=levels, **style)
    axis.set(xlim=(-SPAN, SPAN), ylim=(-SPAN, SPAN), aspect="equal")


def _lattice(count: int) -> Tensor:
    """(count², 2) points of the square."""
    line = torch.linspace(-SPAN, SPAN, count)
    return torch.cartesian_prod(line, line)


def _logits(oracle: GaussianMixture, x: Tensor, level: Level) -> Tensor:
    prior = torch.stack(
        [oracle.log_weights[oracle.labels == label].logsumexp(0) for label in (0, 1)]
    )
    each = [oracle.log_density(x, level, torch.full((len(x),), label)) for label in (0, 1)]
    return torch.stack(each, 1) + prior
