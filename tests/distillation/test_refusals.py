"""Objectives of few-step networks refuse what does not fit before the training."""

import math
from dataclasses import replace

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process, TimeConditioning
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
from diffcore.networks import Perceptron
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.level_sampling import SecondMoment
from diffcore.objectives.losses import SquaredError
from diffcore.objectives.variational import Variational
from diffcore.objectives.weighting import EDM
from diffcore.schedules import Discrete, Flow, Karras, Trailing, Truncated, Within
from diffcore.training.network_checks import check_network
from tests.helpers.oracles import mixture, process

CONSISTENCY = process(Flow(), classes=0, prediction="flow_prediction", estimate="consistency")
MEAN = replace(CONSISTENCY, estimate="mean_velocity")
OBJECTIVES = {
    Consistency: CONSISTENCY,
    ContinuousConsistency: CONSISTENCY,
    MeanFlow: MEAN,
    Shortcut: MEAN,
}
UNREAD = {
    "weight": EDM(),
    "corrected": True,
    "resampler": SecondMoment(),
    "perturbation": 0.1,
    "offset": 0.1,
    "reference_size": 32.0,
    "variational": Variational(),
}


@pytest.mark.parametrize("cls", OBJECTIVES)
@pytest.mark.parametrize("name", UNREAD)
def test_an_option_that_an_objective_does_not_read_is_refused(cls, name):
    with pytest.raises(ValueError, match=rf"{name} is .*, which {cls.__name__} does not read"):
        cls(**{name: UNREAD[name]})


def test_the_loss_is_an_option_of_consistency_alone():
    assert Consistency(loss=SquaredError()).loss == SquaredError()
    for cls in (ContinuousConsistency, MeanFlow, Shortcut):
        with pytest.raises(ValueError, match=r"loss is Pseudo"):
            cls(loss=type("Pseudo", (SquaredError,), {"__repr__": lambda self: "Pseudo"})())


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_the_estimate_of_the_process_must_be_that_of_the_objective(cls):
    cls().check(OBJECTIVES[cls])
    wrong = MEAN if OBJECTIVES[cls] == CONSISTENCY else CONSISTENCY
    for other in (wrong, replace(wrong, estimate="posterior_mean")):
        with pytest.raises(ValueError, match=rf"set process.estimate to {cls.ESTIMATE}"):
            cls().check(other)


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_a_teacher_of_another_process_is_refused(cls):
    own = OBJECTIVES[cls]
    cls(teacher=OracleTeacher(mixture(process(classes=0)))).check(own)
    other = OracleTeacher(mixture(process(classes=0, low=-3.0)))
    with pytest.raises(ValueError, match=r"process.low of the student is -1.0"):
        cls(teacher=other).check(own)


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_a_loss_with_a_teacher_needs_its_networks(cls):
    objective, own = cls(teacher=OracleTeacher(mixture(process(classes=0)))), OBJECTIVES[cls]
    draw = objective.draw(own, SampleKey(0, 0, torch.arange(4), 4))
    denoiser = Denoiser(Perceptron([2], 8, 1), own)
    with pytest.raises(ValueError, match=r"pass networks that contain it"):
        objective(denoiser, torch.zeros(4, 2), None, draw)


@pytest.mark.parametrize("cls", (ContinuousConsistency, MeanFlow))
def test_the_levels_of_a_table_are_refused_where_they_are_differentiated(cls):
    table = replace(OBJECTIVES[cls], schedule=Discrete(), prediction="v_prediction")
    with pytest.raises(ValueError, match=r"use Discrete\(.*\) in Truncated"):
        cls().check(table)
    cls().check(replace(table, schedule=Truncated(Discrete(), -9.0, 9.0)))


REFUSED = [
    (lambda: KnotIntervals(first=0), r"first and last are 0 and 1280"),
    (lambda: KnotIntervals(first=8, last=4), r"first at most last"),
    (lambda: KnotIntervals(period=0), r"period is 0"),
    (lambda: ShrinkingIntervals(q=1.0), r"q is 1.0, expected a factor above 1"),
    (lambda: ShrinkingIntervals(k=-1.0), r"k and b are -1"),
    (lambda: ShrinkingIntervals(stages=0), r"expected at least 1"),
    (lambda: Consistency(order=3), r"order is 3, expected 1 or 2"),
    (lambda: ContinuousConsistency(warmup=-1), r"warmup is -1"),
    (lambda: ContinuousConsistency(normalisation=0.0), r"normalisation is 0"),
    (lambda: MeanFlow(share=0.0), r"share is 0"),
    (lambda: MeanFlow(power=-1.0), r"power and floor"),
    (lambda: MeanFlow(omega=0.0), r"omega and kappa are 0"),
    (lambda: MeanFlow(kappa=1.0), r"kappa within"),
    (lambda: Shortcut(steps=0), r"steps is 0, expected a power of 2"),
    (lambda: Shortcut(steps=12), r"steps is 12"),
    (lambda: Shortcut(share=1.0), r"share is 1"),
    (lambda: Shortcut(target="mean"), r"target is 'mean', expected one of average, own"),
    (lambda: Consistency(target="ema"), r"target is 'ema', expected one of average, own"),
    (lambda: Derivative("forward"), r"expected jvp or difference"),
    (lambda: Derivative(step=0.0), r"step is 0"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_values_out_of_range_are_refused_with_what_is_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_knots_at_which_the_network_or_the_weight_is_undefined_are_refused():
    refused = {
        r"weighting to MSE": (KnotIntervals(Trailing(), 4, 4), CONSISTENCY),
        r"does not end clean": (KnotIntervals(Within(Karras(), high=3.0), 4, 4), CONSISTENCY),
        r"pure noise": (
            KnotIntervals(Trailing(), 4, 4, weighting=EDM()),
            replace(CONSISTENCY, prediction="epsilon"),
        ),
    }
    for message, (intervals, own) in refused.items():
        with pytest.raises(ValueError, match=message):
            Consistency(intervals=intervals).check(own)


def test_the_guidance_of_mean_flow_needs_dropped_conditions_and_no_teacher():
    with pytest.raises(ValueError, match=r"set the guidance of the teacher"):
        MeanFlow(omega=2.0, teacher=OracleTeacher(mixture()))
    with pytest.raises(ValueError, match=r"set its dropout, such as 0.1"):
        MeanFlow(omega=2.0).check(replace(MEAN, classes=2, dropout=0.0))
    MeanFlow(omega=2.0).check(replace(MEAN, classes=2, dropout=0.1))


def test_a_shortcut_starts_at_pure_noise_which_the_process_must_express():
    with pytest.raises(ValueError, match=r"Shortcut's longest step is pure noise"):
        Shortcut().check(replace(MEAN, prediction="epsilon"))


def test_a_network_of_one_time_is_refused_with_the_adapter_that_helps():
    with pytest.raises(ValueError, match=r"end_time.*diffcore.networks.TwoTimes"):
        check_network(Perceptron([2], 8, 1), lambda network: network, MEAN)


def test_time_conditioning_that_cannot_express_a_clean_end_is_refused():
    with pytest.raises(ValueError, match=r"set a clamp"):
        replace(MEAN, time=TimeConditioning("logsnr", -0.125))
    assert math.isinf(Process().time.clamp)
