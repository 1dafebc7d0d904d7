"""Properties of transforms composed at random: still a schedule, and still a value."""

import json
import math

import torch
import yaml
from hypothesis import given, settings
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

SCALING = st.sampled_from(["vp", "flow", "ve"])
MEAN, WIDTH = st.floats(-3, 3), st.floats(0.3, 4)
BASES = st.one_of(
    st.builds(Cosine, MEAN, st.floats(0.5, 2), scaling=SCALING),
    st.builds(Flow, scaling=SCALING),
    st.builds(Laplace, MEAN, WIDTH),
    st.builds(Normal, MEAN, WIDTH, scaling=SCALING),
    st.builds(Cauchy, MEAN, WIDTH),
    st.builds(LogLinear, st.floats(-12, -1), st.floats(1, 14)),
    st.builds(Rho, rho=st.floats(2, 9)),
    st.builds(Sigmoid, st.floats(-4, 0), st.floats(0.5, 4), st.floats(0.4, 2)),
    st.builds(PowerCosine, st.floats(0, 0.3), st.floats(0.6, 1), st.floats(0.5, 2)),
    st.builds(Mode, st.floats(-0.9, 1.5)),
    st.builds(Beta, st.floats(0.7, 3), st.floats(0.7, 3)),
    st.builds(
        Discrete, st.sampled_from(["linear", "scaled_linear", "cosine"]), st.integers(10, 60)
    ),
)


def transformed(inner: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        st.builds(Shifted, inner, st.floats(-4, 4)),
        st.builds(Rescaled, inner, SCALING),
        st.builds(Mixture, inner, share=st.floats(0.05, 0.9)),
        st.builds(Interpolated, inner, st.floats(0, 3), st.floats(-3, 0)),
        st.builds(ZeroTerminalSNR, inner),
        inner.filter(lambda s: s.cdf(5.0) - s.cdf(-5.0) > 0.05).map(
            lambda s: Truncated(s, -5.0, 5.0)
        ),
    )


SCHEDULES = st.one_of(BASES, transformed(BASES), transformed(transformed(BASES)))
INSIDE = torch.linspace(0, 1, 203, dtype=torch.float64)[1:-1]


@settings(max_examples=80, deadline=None)
@given(SCHEDULES)
def test_a_composed_schedule_falls_inverts_and_keeps_its_ends(schedule):
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
def test_the_density_of_a_composed_schedule_integrates_to_the_times_between(schedule):
    """∫ p dλ between two levels is the difference of their times, by Simpson's rule in t: ∫ p(λ(t))
    |dλ/dt| dt.
    """
    t = torch.linspace(0.2, 0.8, 4001, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    integral = torch.trapezoid(schedule.density(logsnr), logsnr)  # from high to low: negative
    assert abs(-integral.item() - 0.6) < 2e-3  # kinks of tables and floors


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_a_composed_schedule_round_trips_through_yaml_and_json(schedule):
    plain = to_spec(schedule)
    read = [json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))]
    for data in read:
        again = from_spec(Holder, {"schedule": data}).schedule
        assert again == schedule
        assert again.logsnr(0.3) == schedule.logsnr(0.3)


class Holder:
    """What a process does with a schedule: take one of any kind."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
