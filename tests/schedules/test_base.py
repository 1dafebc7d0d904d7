"""The contract of a schedule: a distribution of λ with an exact inverse and exact ends."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import diffcore.schedules
from diffcore.schedules import (
    Cosine,
    Discrete,
    Interpolated,
    LogLinear,
    Mixture,
    Rho,
    Schedule,
    Shifted,
    Truncated,
    ZeroTerminalSNR,
)
from tests.helpers.products import sampled
from tests.helpers.schedules import SCHEDULES, all_schedules, concrete_classes

BOUNDED = (LogLinear, Rho, Truncated)
"""Schedules with a finite λ at both ends."""
COARSE = (*BOUNDED, Mixture, Interpolated)
"""Schedules whose t near 0 is known to an absolute 1e-14 only: λ is near a constant, or a sum."""
TIMES = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
"""Times between the entries of a table."""


def evaluate_repr(schedule: Schedule) -> Schedule:
    """A new schedule from the constructor call that `repr` prints."""
    return eval(repr(schedule), dict(vars(diffcore.schedules)))


def test_the_shared_list_contains_every_schedule_of_the_package():
    assert {type(schedule) for schedule in SCHEDULES} == set(concrete_classes(Schedule))


@all_schedules
def test_the_cdf_of_a_quantile_is_its_probability(schedule):
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(schedule.cdf(schedule.quantile(u)), u, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.quantile(u), schedule.logsnr(1 - u), rtol=0, atol=0)


@all_schedules
def test_time_inverts_logsnr_in_both_tails(schedule):
    clean = torch.logspace(-10, -3, 40, dtype=torch.float64)
    noisy = 1 - torch.logspace(-3, -9, 40).double()
    t = torch.cat((clean, TIMES, noisy))
    atol = 1e-14 if isinstance(schedule, COARSE) else 0
    if isinstance(schedule, Interpolated) and schedule.steps:
        atol = 1e-9  # a table snaps t to its entries within that
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=1e-12, atol=atol)


@all_schedules
def test_logsnr_decreases_strictly(schedule):
    assert (schedule.logsnr(torch.linspace(0, 1, 20011, dtype=torch.float64)).diff() < 0).all()


@all_schedules
def test_density_is_minus_dt_dlambda(schedule):
    """Central differences of step 1e-4 have an error of p''/p 1e-8/6; no kink is that near."""
    logsnr = schedule.logsnr(TIMES)
    slope = (schedule.time(logsnr - 1e-4) - schedule.time(logsnr + 1e-4)) / 2e-4
    torch.testing.assert_close(schedule.density(logsnr), slope, rtol=1e-6, atol=1e-11)


@all_schedules
def test_draws_follow_the_density(schedule):
    """The histogram of λ over a fine grid of t is the integral of p(λ) over each bin."""
    edges = np.linspace(schedule.quantile(0.02), schedule.quantile(0.98), 41)
    draws = schedule.logsnr((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).numpy()
    share = np.histogram(draws, edges)[0] / len(draws)
    fine = np.linspace(edges[:-1], edges[1:], 2001)
    density = schedule.density(torch.from_numpy(fine)).numpy()
    integral = np.trapezoid(density, fine, axis=0)
    # a draw in 200 000 at either edge, and kinks
    np.testing.assert_allclose(share, integral, rtol=0, atol=2e-5)


@all_schedules
def test_the_ends_are_clean_at_t_0_and_the_noisiest_level_at_t_1(schedule):
    first, last = schedule.logsnr(0.0), schedule.logsnr(1.0)
    assert first == math.inf or isinstance(schedule, BOUNDED)
    assert last == -math.inf or schedule.steps is not None or isinstance(schedule, BOUNDED)
    assert schedule.time(first) == pytest.approx(0, abs=1e-15)
    assert (schedule.time(math.inf), schedule.time(-math.inf)) == (0, 1)
    assert schedule.time(last) == pytest.approx(1, abs=1e-15)
    assert schedule.time(max(last - 5, -math.inf)) == 1  # noisier than the schedule
    assert (schedule.cdf(math.inf), schedule.density(math.inf)) == (1, 0)


@all_schedules
def test_density_vanishes_at_minus_infinity(schedule):
    assert schedule.density(-math.inf) == 0


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    sampled(SCHEDULES, [torch.bfloat16, torch.float16, torch.float32], count=len(SCHEDULES)),
)
def test_times_of_low_precision_are_evaluated_in_float64(schedule, dtype):
    t = torch.linspace(0.01, 0.99, 99).to(dtype)
    level, exact = schedule.level(t), schedule.level(t.double())
    for name in ("logsnr", "t", "alpha", "sigma"):
        assert getattr(level, name).dtype == torch.float64
        assert torch.equal(getattr(level, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=repr)
def test_the_default_dtype_does_not_change_a_schedule(schedule, dtype):
    exact = schedule.logsnr(TIMES)
    fresh = evaluate_repr(schedule)  # has no cached table
    assert fresh == schedule
    torch.set_default_dtype(dtype)
    try:
        logsnr, number = fresh.logsnr(TIMES), fresh.level(0.3).alpha
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logsnr, exact)
    assert number == schedule.level(0.3).alpha


@all_schedules
def test_floats_give_floats_equal_to_tensors(schedule):
    t = torch.tensor([0.123, 0.5, 0.9], dtype=torch.float64)
    for method, argument in (
        (schedule.logsnr, t),
        (schedule.time, t * 9 - 4),
        (schedule.density, t * 9 - 4),
        (schedule.cdf, t),
        (schedule.quantile, t),
    ):
        floats = [method(value) for value in argument.tolist()]
        assert all(type(value) is float for value in floats)
        assert floats == pytest.approx(method(argument).tolist(), rel=1e-14)


@all_schedules
def test_arguments_of_any_shape_stride_and_dtype_are_accepted(schedule):
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator).transpose(1, 3)
    for method in (
        schedule.logsnr,
        schedule.time,
        schedule.density,
        schedule.cdf,
        schedule.quantile,
    ):
        torch.testing.assert_close(
            method(t), method(t.flatten()).view(2, 5, 4, 3), rtol=1e-14, atol=1e-300
        )
        assert method(torch.empty(0, 3)).shape == (0, 3)
        assert method(torch.tensor(0.5)).shape == ()
        assert method(torch.tensor(1)).item() == method(1)
    logsnr = schedule.level(torch.tensor(0.5)).logsnr.item()
    assert logsnr == pytest.approx(schedule.level(0.5).logsnr, rel=1e-14)


def test_a_continuous_schedule_draws_the_time_itself():
    u = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Cosine().training_times(u), u)


@pytest.mark.parametrize(
    "schedule", [Discrete(steps=50), Shifted(ZeroTerminalSNR(Discrete(steps=50)), 1.0)], ids=repr
)
def test_a_table_draws_each_of_its_entries_equally_often_and_nothing_else(schedule):
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    entries = (schedule.training_times(u) * 50).round() - 1
    assert torch.equal(entries, torch.arange(50).repeat_interleave(4).double())
    assert torch.equal(schedule.training_times(u), (entries + 1) / 50)
    ends = torch.tensor([0.0, 1e-300, 1.0], dtype=torch.float64)
    assert schedule.training_times(ends).tolist() == [1 / 50, 1 / 50, 1]


@all_schedules
def test_a_schedule_is_a_frozen_value_even_after_use(schedule):
    fresh = evaluate_repr(schedule)
    schedule.logsnr(0.5)
    assert fresh == schedule
    assert hash(fresh) == hash(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.steps = 3
