"""The methods of `diffcore distil`: objective, process and sampler of a student, and its training.

The learning rates and lengths are those with which the digits of docs/few-step.md were distilled;
options override them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffcore.core.estimate import require_posterior_mean
from diffcore.core.process import Process

__all__ = ["METHODS", "REFLOW", "Method", "check_teacher_process", "find_method"]

Spec = dict[str, Any]
"""Plain data {class_path, init_args} of a component."""


def _no_arguments(steps: int, is_pipeline: bool) -> Spec:
    return {}


@dataclass(frozen=True)
class Method:
    """A method of distillation.

    Args:
        summary: what the student learns, for the report.
        estimate: what the pair of the student is (`Process.estimate`).
        sampler: class of the student's sampler.
        grid: spec of the knots of a student of a run. Those of a pipeline are its table's entries.
        arguments: function (sampling steps, whether the teacher is a pipeline) -> arguments of the
            objective beside the teacher.
        settings: settings of the training of a student of a run.
        has_teacher: whether the objective evaluates the teacher.
        accepts_pipelines: whether the network of a diffusers pipeline can be the student.
        accepts_guidance_range: whether the scale of the teacher's guidance can be an input of the
            student.
        interval: range of c (t - r) of a network of two times (`TwoTimes.scale`). A derivative by
            the time contains that of the sinusoids, which are slow if it is small.
    """

    summary: str
    estimate: str
    sampler: str
    grid: Spec
    arguments: Callable[[int, bool], Spec] = _no_arguments
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_teacher: bool = True
    accepts_pipelines: bool = True
    accepts_guidance_range: bool = False
    interval: float = 1000.0

    def objective(self, name: str, teacher: Spec, steps: int, is_pipeline: bool) -> Spec:
        """The spec of the objective.

        Args:
            name: name of the method, which is the class of the objective.
            teacher: spec of the teacher.
            steps: number of sampling steps of the student.
            is_pipeline: whether the teacher is a diffusers pipeline.

        Returns:
            Plain data {class_path, init_args}.
        """
        given = {"teacher": teacher} if self.has_teacher else {}
        return {"class_path": name, "init_args": given | self.arguments(steps, is_pipeline)}

    def process(self, teacher: Spec) -> Spec:
        """The fields of the student's process, whose condition is not dropped: it is not guided.

        Args:
            teacher: fields of the teacher's process.

        Returns:
            Plain data by name.
        """
        return teacher | {"estimate": self.estimate, "dropout": 0.0}


REFLOW = "Reflow"
"""Method whose training data are the teacher's flow."""
EVEN: Spec = {"class_path": "UniformBlend", "init_args": {"rho": 1.0, "center": 1.0}}
"""Knots of equal steps in σ/(α+σ), on which straight flows are exact."""
DENSE: Spec = {"class_path": "UniformBlend", "init_args": {"rho": 1.25, "center": 0.5}}
"""Knots from pure noise to clean, densest in λ at σ/α = 0.5."""
SHORT: Spec = {
    "lr": {"peak": 3e-4, "warmup": 20, "shape": "cosine"},
    "ema": {"decay": 0.97},
    "steps": 240,
}
"""Training that starts from the weights of the teacher."""
LATENT_INTERVALS = 40
"""Number of intervals of a pipeline; their ends contain the knots of 1, 2, 4 and 8 steps."""
INTERVALS = 8
"""Smallest number of intervals of the flow, between whose ends consistency is trained."""


def _consistency(steps: int, is_pipeline: bool) -> Spec:
    """Consistency distillation: of LCM for a pipeline, else on a multiple of the sampling knots."""
    count = LATENT_INTERVALS if is_pipeline else steps * math.ceil(INTERVALS / steps)
    intervals = {
        "grid": "Trailing" if is_pipeline else DENSE,
        "first": count,
        "last": count,
        "weighting": {"class_path": "MSE", "init_args": {"target": "sample"}},
    }
    spec = {"class_path": "KnotIntervals", "init_args": intervals}
    return {"intervals": spec, "order": 1 if is_pipeline else 2}


def _mean_flow(steps: int, is_pipeline: bool) -> Spec:
    """MeanFlow with the derivative as a difference, which needs no forward mode."""
    return {"share": 0.75, "derivative": {"method": "difference"}}


def _shortcut(steps: int, is_pipeline: bool) -> Spec:
    """Shortest steps and a share of long ones for a short training."""
    return {"steps": max(16, 2 ** math.ceil(math.log2(steps))), "share": 0.5}


def _distribution_matching(steps: int, is_pipeline: bool) -> Spec:
    return {"student": {"steps": steps, "grid": "Trailing" if is_pipeline else DENSE}}


METHODS: dict[str, Method] = {
    "Consistency": Method(
        "each point of the teacher's flow is mapped to its clean end",
        "consistency",
        "Consistency",
        DENSE,
        _consistency,
        SHORT,
        accepts_guidance_range=True,
    ),
    "DistributionMatching": Method(
        "samples are to be distributed as the teacher's, by the difference of two scores",
        "consistency",
        "Consistency",
        DENSE,
        _distribution_matching,
        SHORT | {"lr": {"peak": 1e-4, "warmup": 10, "shape": "cosine"}, "steps": 100},
    ),
    "MeanFlow": Method(
        "the mean velocity of the teacher's flow between two levels",
        "mean_velocity",
        "DDIM",
        EVEN,
        _mean_flow,
        SHORT,
        accepts_pipelines=False,
        accepts_guidance_range=True,
        interval=10.0,
    ),
    "Shortcut": Method(
        "steps of the teacher's flow that agree with two steps of half the length",
        "mean_velocity",
        "DDIM",
        EVEN,
        _shortcut,
        SHORT,
        accepts_pipelines=False,
        accepts_guidance_range=True,
    ),
    REFLOW: Method(
        "the straight lines between noise and the ends of the teacher's flow",
        "posterior_mean",
        "DDIM",
        EVEN,
        settings=SHORT,
        has_teacher=False,
        accepts_pipelines=False,
    ),
}
"""Name of each method -> its record."""


def find_method(name: str) -> Method:
    """Find a method by its name.

    Args:
        name: name of the method.

    Returns:
        Its record.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name or 'missing'}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def check_teacher_process(name: str, process: Process) -> None:
    """Check that a student of a method can start from the teacher's network.

    Args:
        name: name of the method.
        process: process of the teacher.

    Raises:
        ValueError: the teacher is a student itself, learns a variance, or predicts x_0, from which
            a point of the flow cannot be computed at the clean level.
    """
    require_posterior_mean(process, f"{name} of a teacher")
    is_map = METHODS[name].estimate != "posterior_mean"
    if is_map and (process.prediction == "sample" or process.variance == "learned"):
        what = "predicts sample" if process.prediction == "sample" else "has a learned variance"
        raise ValueError(
            f"the teacher {what}, of which a student of {name} cannot start: train a teacher that "
            "predicts v_prediction or flow_prediction with a fixed variance, or use Reflow"
        )
