"""Properties of random compositions of transforms: each is a schedule and a value."""

import json
import math

import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffcore.io.specs import from_spec, to_spec
from diffcore.schedules import (
    Beta,
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Interpolated,
    Laplace,
    LogLinear,
    Mixture,
    Mode,
    Normal,
    PowerCosine,
    Rescaled,
    Rho,
    Schedule,
    Shifted,
    Sigmoid,
    Truncated,
    ZeroTerminalSNR,
)
from tests.helpers.schedules import SCALINGS, concrete_classes

SCALING = st.sampled_from(SCALINGS)
MEAN, WIDTH = st.floats(-3, 3), st.floats(0.3, 4)
BASES: dict[type[Schedule], st.SearchStrategy[Schedule]] = {
    Beta: st.builds(Beta, st.floats(0.7, 3), st.floats(0.7, 3)),
    Cauchy: st.builds(Cauchy, MEAN, WIDTH),
    Cosine: st.builds(Cosine, MEAN, st.floats(0.5, 2), scaling=SCALING),
    Discrete: st.builds(
        Discrete, st.sampled_from(["linear", "scaled_linear", "cosine"]), st.integers(10, 60)
    ),
    Flow: st.builds(Flow, scaling=SCALING),
    Laplace: st.builds(Laplace, MEAN, WIDTH),
    LogLinear: st.builds(LogLinear, st.floats(-12, -1), st.floats(1, 14)),
    Mode: st.builds(Mode, st.floats(-0.9, 1.5)),
    Normal: st.builds(Normal, MEAN, WIDTH, scaling=SCALING),
    PowerCosine: st.builds(PowerCosine, st.floats(0, 0.3), st.floats(0.6, 1), st.floats(0.5, 2)),
    Rho: st.builds(Rho, rho=st.floats(2, 9)),
    Sigmoid: st.builds(Sigmoid, st.floats(-4, 0), st.floats(0.5, 4), st.floats(0.4, 2)),
}
"""Schedules that hold no other schedule, with drawn settings."""


def transforms_of(
    inner: st.SearchStrategy[Schedule],
) -> dict[type[Schedule], st.SearchStrategy[Schedule]]:
    """Each transform of drawn inner schedules."""
    wide = inner.filter(lambda schedule: schedule.cdf(5.0) - schedule.cdf(-5.0) > 0.05)
    return {
        Interpolated: st.builds(Interpolated, inner, st.floats(0, 3), st.floats(-3, 0)),
        Mixture: st.builds(Mixture, inner, share=st.floats(0.05, 0.9)),
        Rescaled: st.builds(Rescaled, inner, SCALING),
        Shifted: st.builds(Shifted, inner, st.floats(-4, 4)),
        Truncated: st.builds(Truncated, wide, st.just(-5.0), st.just(5.0)),
        ZeroTerminalSNR: st.builds(ZeroTerminalSNR, inner),
    }


BASE = st.one_of(*BASES.values())
TRANSFORM = st.one_of(*transforms_of(BASE).values())
SCHEDULES = st.one_of(BASE, TRANSFORM, *transforms_of(TRANSFORM).values())
INSIDE = torch.linspace(0, 1, 203, dtype=torch.float64)[1:-1]


class ScheduleHolder:
    """A component with a schedule as its argument, as `Process` has."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule


def test_the_compositions_contain_every_schedule_of_the_package():
    assert sorted([*BASES, *transforms_of(BASE)], key=lambda cls: cls.__name__) == (
        concrete_classes(Schedule)
    )


@settings(max_examples=80, deadline=None)
@given(SCHEDULES)
@example(Mixture(Interpolated(LogLinear(-1.0, 1.0), 0.0, 0.0), share=0.25))
def test_a_composition_decreases_has_an_inverse_and_keeps_its_ends(schedule):
    logsnr = schedule.logsnr(INSIDE)
    first, last = schedule.logsnr(0.0), schedule.logsnr(1.0)
    assert (logsnr.diff() < 0).all()
    assert first >= logsnr[0]
    assert last <= logsnr[-1]
    torch.testing.assert_close(schedule.time(logsnr), INSIDE, rtol=0, atol=1e-8)
    assert (schedule.density(logsnr) >= 0).all()
    for clean, noisy in ((math.inf, -math.inf), (first + 1, last - 1)):
        if schedule.steps is None:  # a table has levels cleaner than its first
            assert schedule.time(clean) < 1e-100
        assert abs(schedule.time(noisy) - 1) < 1e-14


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_the_density_of_a_composition_integrates_to_the_difference_of_times(schedule):
    """∫ p dλ between two levels is the difference of their times, by the trapezoid rule."""
    t = torch.linspace(0.2, 0.8, 4001, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    integral = torch.trapezoid(schedule.density(logsnr), logsnr)  # from high to low: negative
    assert abs(-integral.item() - 0.6) < 2e-3  # kinks of tables and floors


@settings(max_examples=25, deadline=None)
@given(SCHEDULES)
def test_a_composition_equals_the_one_that_is_read_from_its_yaml_and_json(schedule):
    plain = to_spec(schedule)
    specs = [json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))]
    for spec in specs:
        copy = from_spec(ScheduleHolder, {"schedule": spec}).schedule
        assert copy == schedule
        assert copy.logsnr(0.3) == schedule.logsnr(0.3)
