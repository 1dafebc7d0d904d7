"""Each loss has gradient zero at the exact answer, and not elsewhere."""

import math
from dataclasses import replace

import pytest

from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    KnotIntervals,
    MeanFlow,
    OracleTeacher,
    Shortcut,
    ShrinkingIntervals,
)
from diffcore.distillation.derivative import Derivative
from diffcore.objectives.losses import SquaredError
from diffcore.schedules import Cosine, Flow, Normal
from tests.helpers.exact_students import ExactStudent, loss_gradients
from tests.helpers.oracles import covariance, gaussian, mixture, process

SCHEDULES = {
    "flow": Flow(),
    "vp": Cosine(),
    "ve": Normal(2.0, 2.8, scaling="ve"),
}
SHORT = KnotIntervals(first=512, last=512)
DISTILLED = {  # objective -> largest gradient at the exact answer relative to that elsewhere
    "knots": (Consistency(intervals=SHORT), 2e-3),
    "knots, order 1": (Consistency(intervals=SHORT, loss=SquaredError(), order=1), 0.05),
    "shrinking": (Consistency(intervals=ShrinkingIntervals(period=1)), 1e-3),
    "continuous": (ContinuousConsistency(warmup=0, normalisation=math.inf), 2e-3),
    "continuous, normalised": (ContinuousConsistency(warmup=0), 0.02),
    "mean flow": (MeanFlow(share=0.75), 0.02),
    "shortcut": (Shortcut(steps=64), 0.05),
}


def oracle_of(name, schedule="flow"):
    record = process(SCHEDULES[schedule], classes=0)
    if name == "mixture":
        return mixture(record)
    return gaussian([0.3, -0.5], covariance(0.8, 0.4, 0.7), record)


def ratio_of_gradients(objective, oracle, **options):
    """|gradient| at the exact answer over that elsewhere, and its greatest t statistic."""
    student = ExactStudent(oracle, objective.ESTIMATE)
    mean, error = loss_gradients(objective, oracle, student, **options)
    student.move_away()
    elsewhere, _ = loss_gradients(objective, oracle, student, **options)
    return float(mean.norm() / elsewhere.norm()), float((mean / error).abs().max())


@pytest.mark.parametrize("name", DISTILLED)
def test_with_an_exact_teacher_the_exact_answer_has_no_gradient(name):
    objective, tolerance = DISTILLED[name]
    oracle = oracle_of("mixture")
    objective = replace(objective, teacher=OracleTeacher(oracle))
    ratio, _ = ratio_of_gradients(objective, oracle, parts=2, count=64, step=9)
    assert ratio < tolerance


@pytest.mark.parametrize("schedule", ("vp", pytest.param("ve", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", ("knots", "continuous", "mean flow"))
def test_the_exact_answer_has_no_gradient_in_every_scaling(name, schedule):
    objective, tolerance = DISTILLED[name]
    oracle = oracle_of("gaussian", schedule)
    objective = replace(objective, teacher=OracleTeacher(oracle))
    ratio, _ = ratio_of_gradients(objective, oracle, parts=2, count=32)
    assert ratio < tolerance


FROM_DATA = {
    "knots": Consistency(intervals=SHORT, loss=SquaredError()),
    "shrinking": Consistency(intervals=ShrinkingIntervals(period=1), loss=SquaredError()),
    "continuous": ContinuousConsistency(warmup=0, normalisation=math.inf),
    "continuous, difference": ContinuousConsistency(
        warmup=0, normalisation=math.inf, derivative=Derivative("difference")
    ),
    "mean flow": MeanFlow(share=0.75, power=0.0),
    "mean flow, difference": MeanFlow(share=0.75, power=0.0, derivative=Derivative("difference")),
    "shortcut": Shortcut(),
}


SLOW = {"continuous", "mean flow"}  # forward mode through the integration of the flow


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FROM_DATA],
)
def test_from_data_the_gradient_at_the_exact_answer_has_mean_zero(name):
    """Within four standard errors, and elsewhere it is beyond six."""
    objective, oracle = FROM_DATA[name], oracle_of("mixture")
    student = ExactStudent(oracle, objective.ESTIMATE, steps=6)
    options = {"parts": 16, "count": 128, "step": 9}
    mean, error = loss_gradients(objective, oracle, student, **options)
    assert ((mean / error).abs() < 4).all()
    student.move_away()
    elsewhere, error = loss_gradients(objective, oracle, student, **options)
    assert (elsewhere / error).abs().max() > 6
