"""The controls of the page: choices, and the command-line words for which their values stand."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffcore.cli.commands.playground.request import PictureRequest
from diffcore.guidance import APG, CFG, AdaptiveGuidance, CFGZeroStar, Guidance, Interval, Rescale
from diffcore.io.specs import describe_component
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    DPMSolverPP,
    EulerAncestral,
    GradientEstimation,
    Heun,
    Sampler,
    UniPC,
)
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.schedules import (
    AlignYourSteps,
    BetaSpacing,
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Grid,
    Karras,
    Laplace,
    LogLinear,
    Normal,
    Quadratic,
    Schedule,
    Shifted,
    Sigmoid,
    Trailing,
    UniformLogSNR,
    ZeroTerminalSNR,
)

__all__ = ["AS_CONFIGURED", "GRIDS", "RULES", "SAMPLERS", "SCHEDULES", "Controls"]

SCHEDULES: tuple[Schedule, ...] = (
    Cosine(),
    Flow(),
    Laplace(),
    Cauchy(),
    Sigmoid(),
    Normal(),
    LogLinear(scaling="ve", low=-8.8),
    Discrete(),
    ZeroTerminalSNR(Discrete()),
    Shifted(Cosine(), -2.0),
)
SAMPLERS: tuple[Sampler, ...] = (
    DDIM(),
    DDIM(1.0),
    EulerAncestral(),
    Heun(),
    DPMSolverPP("2M"),
    DPMSolverPP("3M"),
    UniPC(2),
    AdamsBashforth(3),
    GradientEstimation(),
    DEFAULT_SAMPLER,
)
GRIDS: tuple[Grid, ...] = (
    DEFAULT_GRID,
    Trailing(),
    Quadratic(),
    BetaSpacing(),
    Karras(),
    UniformLogSNR(),
    AlignYourSteps(),
)
RULES: Mapping[str, Callable[[float], Guidance]] = {
    "CFG": CFG,
    "APG": APG,
    "CFGZeroStar": CFGZeroStar,
    "Rescale": lambda scale: Rescale(CFG(scale)),
    "AdaptiveGuidance": lambda scale: AdaptiveGuidance(CFG(scale)),
}
"""Name -> guidance rule with a scale w."""
AS_CONFIGURED = "as configured"
"""Name of a rule of a run that none of `RULES` is."""


class Controls(NamedTuple):
    """The values of the controls, in their order on the page.

    Args:
        model: name of a distribution, or folder of a run or of a pipeline.
        schedule: constructor call of the schedule, for distributions.
        sampler: constructor call of the sampler.
        grid: constructor call of the grid.
        steps: number of steps.
        rule: name in `RULES`, or `AS_CONFIGURED` for the rule that the model brings.
        scale: guidance scale w, unless the rule is as configured.
        low: σ/α down to which guidance acts; 0: to the end.
        high: σ/α from which guidance acts; 0: from the beginning.
        labels: class labels; none: unconditional.
        prompt: prompts of a text-conditioned pipeline, one a line.
        per_label: number of samples for each label or prompt.
        seed: seed of the first sample.
    """

    model: str
    schedule: str
    sampler: str
    grid: str
    steps: float
    rule: str
    scale: float
    low: float
    high: float
    labels: list[int]
    prompt: str
    per_label: float
    seed: float

    @classmethod
    def of(cls, model: str, request: PictureRequest) -> "Controls":
        """The values that stand for settings.

        Args:
            model: name of a distribution, or folder of a run or of a pipeline.
            request: settings.

        Returns:
            The values of the controls.
        """
        rule, low, high = request.guidance, 0.0, 0.0
        if isinstance(rule, Interval) and (rule.variable, rule.sigma_data) == ("sigma", None):
            low, high = (0.0 if bound in (None, float("inf")) else bound for bound in _bounds(rule))
            rule = rule.inner
        name, scale = _name_rule(rule)
        if name == AS_CONFIGURED:  # the interval is part of it
            low = high = 0.0
        return cls(
            model,
            describe_component(request.schedule),
            describe_component(request.sampler),
            describe_component(request.grid),
            request.steps,
            name,
            scale,
            low,
            high,
            list(request.labels),
            "\n".join(request.prompt),
            request.per_label,
            request.seed,
        )

    @property
    def words(self) -> list[str]:
        """Command-line words with the meaning of the values, for `parse_request`.

        Raises:
            ValueError: a number is empty, or the rule is unknown.
        """
        for name in ("steps", "scale", "low", "high", "per_label", "seed"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is empty, expected a number")
        words = [
            f"--schedule={self.schedule}",
            f"--sampler={self.sampler}",
            f"--grid={self.grid}",
            f"--steps={self.steps:g}",
            f"--labels={sorted(self.labels)}",
            f"--per_label={self.per_label:g}",
            f"--seed={int(self.seed)}",
            *(f"--prompt={line}" for line in self.prompt.splitlines() if line),
        ]
        guidance = self._guidance
        return words if guidance is None else [*words, f"--guidance={describe_component(guidance)}"]

    @property
    def _guidance(self) -> Guidance | None:
        """The guidance rule, or None for that of the model."""
        if self.rule == AS_CONFIGURED:
            return None
        if self.rule not in RULES:
            raise ValueError(f"the rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        rule = RULES[self.rule](float(self.scale))
        if not (self.low or self.high):
            return rule
        return Interval(rule, self.low or None, self.high or None)


def _bounds(rule: Interval) -> tuple[float, float]:
    """The bounds of an interval, which are numbers after its construction."""
    return float(rule.low or 0.0), float("inf" if rule.high is None else rule.high)


def _name_rule(rule: Guidance) -> tuple[str, float]:
    """The name in `RULES` and the scale that give a rule."""
    inner = rule.inner if isinstance(rule, Rescale | AdaptiveGuidance) else rule
    scale = getattr(inner, "scale", None)
    if isinstance(scale, int | float):
        for name, build in RULES.items():
            if build(float(scale)) == rule:
                return name, float(scale)
    return AS_CONFIGURED, 1.0
