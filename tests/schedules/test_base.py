"""What every schedule promises: it is a distribution of λ, its inverse is exact, and its ends are
the ends.
"""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import diffcore.schedules
from diffcore.schedules import (
    Beta,
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Interpolated,
    Laplace,
    Level,
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
    alpha_sigma,
)

SCHEDULES: list[Schedule] = [
    Cosine(),
    Flow(),
    Laplace(),
    Laplace(1.0, 0.75, scaling="flow"),
    Normal(),
    Normal(2.4, 2.4, scaling="ve"),
    Cosine(1.0, 2.0, scaling="flow"),
    Cauchy(0.5, 0.7),
    LogLinear(),
    LogLinear.ve(),
    Rho(),
    Sigmoid(),
    Sigmoid(0.0, 3.0, 0.3, scaling="ve"),
    PowerCosine(0.2, 1.0, 1.5),
    PowerCosine(0.1, 0.8, 0.5, scaling="flow"),
    Mode(),
    Mode(-0.9, scaling="vp"),
    Beta(),
    Beta(0.5, 2.0, scaling="vp"),
    Discrete(),
    Discrete("scaled_linear", 1000, 0.00085, 0.012),
    Discrete("cosine", 50),
    Shifted(Cosine(), -2 * math.log(3)),
    Shifted(Discrete(), 1.5),
    ZeroTerminalSNR(Cosine()),
    ZeroTerminalSNR(Discrete()),
    ZeroTerminalSNR(Shifted(Discrete("cosine"), -1.0)),
    Truncated(Cauchy(), -8.0, 9.0),
    Interpolated(Cosine(), 1.0, -2.0),
    Interpolated(Discrete("cosine", 50), -1.0, 0.5),
    Mixture(Laplace()),
    Mixture(Normal(scaling="flow"), Cauchy(1.0), 0.4),
    Rescaled(Cosine(), "flow"),
]
FINITE = (LogLinear, Rho, Truncated)  # a finite λ at both ends
COARSE = (
    *FINITE,
    Mixture,
    Interpolated,
)  # t near 0 to an absolute 1e-14 only: λ is near a constant there, or a sum
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
every_scaling = pytest.mark.parametrize("scaling", ["vp", "flow", "ve"])
LEVELS = torch.cat(
    (torch.linspace(-80, 80, 161, dtype=torch.float64), torch.tensor([-300.0, 300.0]))
)
TIMES = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # between the entries of a table


def test_every_schedule_of_the_library_is_proved_here():
    concrete = {value for value in vars(diffcore.schedules).values() if isinstance(value, type)}
    concrete = {cls for cls in concrete if issubclass(cls, Schedule) and cls is not Schedule}
    assert concrete == {type(schedule) for schedule in SCHEDULES}


def test_vp_and_flow_are_normalised_to_1e_15():
    levels = torch.cat((LEVELS, torch.tensor([-math.inf, math.inf])))
    alpha, sigma = alpha_sigma(levels, "vp")
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    alpha, sigma = alpha_sigma(levels, "flow")
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha), rtol=0, atol=1e-15)


@every_scaling
def test_lambda_is_the_log_of_the_squared_ratio(scaling):
    alpha, sigma = alpha_sigma(LEVELS, scaling)
    torch.testing.assert_close(2 * alpha.log() - 2 * sigma.log(), LEVELS, rtol=1e-14, atol=1e-14)


def test_A4_alpha_and_sigma_are_root_half_at_lambda_0():
    assert alpha_sigma(torch.zeros(1), "vp") == pytest.approx(
        (math.sqrt(0.5), math.sqrt(0.5)), rel=1e-7
    )
    assert alpha_sigma(torch.zeros(1), "flow") == (0.5, 0.5)
    assert alpha_sigma(torch.zeros(1), "ve") == (1, 1)


@pytest.mark.parametrize("scaling", ["vp", "flow"])
def test_infinite_levels_are_pure_data_and_pure_noise(scaling):
    alpha, sigma = alpha_sigma(torch.tensor([math.inf, -math.inf]), scaling)
    assert alpha.tolist() == [1, 0]
    assert sigma.tolist() == [0, 1]


def test_ve_keeps_alpha_1_and_is_clean_at_plus_infinity():
    alpha, sigma = alpha_sigma(torch.tensor([-3.0, math.inf]), "ve")
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == pytest.approx([math.exp(1.5), 0])


def test_A6_sigma_survives_float32_where_sqrt_of_1_minus_alpha_squared_is_0():
    alpha, sigma = alpha_sigma(torch.tensor([40.0]), "vp")
    assert (1 - alpha**2).sqrt() == 0
    assert sigma.item() == pytest.approx(math.exp(-20), rel=1e-6)


def test_unknown_scaling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"scaling is 'VP', expected one of vp, ve, flow"):
        alpha_sigma(torch.zeros(1), "VP")


@every_schedule
def test_A4_cdf_of_quantile_is_the_identity(schedule):
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(schedule.cdf(schedule.quantile(u)), u, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.quantile(u), schedule.logsnr(1 - u), rtol=0, atol=0)


@every_schedule
def test_time_inverts_logsnr_in_both_tails(schedule):
    t = torch.cat(
        (
            torch.logspace(-10, -3, 40, dtype=torch.float64),
            TIMES,
            1 - torch.logspace(-3, -9, 40).double(),
        )
    )
    atol = 1e-14 if isinstance(schedule, COARSE) else 0
    if isinstance(schedule, Interpolated) and schedule.steps:
        atol = 1e-9  # a table snaps t to its entries within that
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=1e-12, atol=atol)


@every_schedule
def test_logsnr_falls_strictly(schedule):
    assert (schedule.logsnr(torch.linspace(0, 1, 20011, dtype=torch.float64)).diff() < 0).all()


@every_schedule
def test_density_is_minus_dt_dlambda(schedule):
    """Central differences of step 1e-4 have an error of p''/p 1e-8/6, within which no schedule here
    has a kink.
    """
    logsnr = schedule.logsnr(TIMES)
    slope = (schedule.time(logsnr - 1e-4) - schedule.time(logsnr + 1e-4)) / 2e-4
    torch.testing.assert_close(schedule.density(logsnr), slope, rtol=1e-6, atol=1e-11)


@every_schedule
def test_ends_are_clean_at_t_0_and_the_noisiest_level_at_t_1(schedule):
    first, last = schedule.logsnr(0.0), schedule.logsnr(1.0)
    assert first == math.inf or isinstance(schedule, FINITE)
    assert last == -math.inf or schedule.steps is not None or isinstance(schedule, FINITE)
    assert schedule.time(first) == pytest.approx(0, abs=1e-15)
    assert (schedule.time(math.inf), schedule.time(-math.inf)) == (0, 1)
    assert schedule.time(last) == pytest.approx(1, abs=1e-15)
    assert schedule.time(max(last - 5, -math.inf)) == 1  # below the levels that it has
    assert (schedule.cdf(math.inf), schedule.density(math.inf)) == (1, 0)


@every_schedule
def test_density_vanishes_at_minus_infinity(schedule):
    assert schedule.density(-math.inf) == 0


@every_schedule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_A6_low_precision_times_are_read_in_float64(schedule, dtype):
    t = torch.linspace(0.01, 0.99, 99).to(dtype)
    level, exact = schedule.level(t), schedule.level(t.double())
    for name in ("logsnr", "t", "alpha", "sigma"):
        assert getattr(level, name).dtype == torch.float64
        assert torch.equal(getattr(level, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=repr)
def test_A6_default_dtype_does_not_reach_the_tables(schedule, dtype):
    exact = schedule.logsnr(TIMES)
    fresh = eval(repr(schedule))  # prints as its constructor call; has no cached table
    assert fresh == schedule
    torch.set_default_dtype(dtype)
    try:
        logsnr, number = fresh.logsnr(TIMES), fresh.level(0.3).alpha
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logsnr, exact)
    assert number == schedule.level(0.3).alpha


def test_A6_the_smallest_knot_in_float32_still_adds_noise():
    x = torch.ones(1000)
    level = Discrete().level(torch.tensor([1 / 1000], dtype=torch.float64)).to(x)
    noised = level.alpha * x + level.sigma * torch.randn(
        1000, generator=torch.Generator().manual_seed(0)
    )
    assert (noised - x).std().item() == pytest.approx(
        0.01, rel=0.1
    )  # σ = √β_0 = 0.01; std of 1000 is known to 2 %


@every_schedule
def test_floats_give_floats_equal_to_tensors(schedule):
    t = torch.tensor([0.123, 0.5, 0.9], dtype=torch.float64)
    for name, argument in (
        ("logsnr", t),
        ("time", t * 9 - 4),
        ("density", t * 9 - 4),
        ("cdf", t),
        ("quantile", t),
    ):
        one = getattr(schedule, name)
        floats = [one(value) for value in argument.tolist()]
        assert all(type(value) is float for value in floats)
        assert floats == pytest.approx(one(argument).tolist(), rel=1e-14)


@every_schedule
def test_any_shape_stride_and_kind_of_number_is_read(schedule):
    maps = torch.rand(
        2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).transpose(1, 3)
    for one in (schedule.logsnr, schedule.time, schedule.density, schedule.cdf, schedule.quantile):
        torch.testing.assert_close(
            one(maps), one(maps.flatten()).view(2, 5, 4, 3), rtol=1e-14, atol=1e-300
        )
        assert one(torch.empty(0, 3)).shape == (0, 3)
        assert one(torch.tensor(0.5)).shape == ()
        assert one(torch.tensor(1)).item() == one(1)
    assert schedule.level(torch.tensor(0.5)).logsnr.item() == pytest.approx(
        schedule.level(0.5).logsnr, rel=1e-14
    )


@every_schedule
def test_level_at_a_time_and_at_its_lambda_are_one_level(schedule):
    for t in (0.007, 0.3, 0.77):
        level = schedule.level(t)
        alpha, sigma = alpha_sigma(
            torch.tensor(schedule.logsnr(t), dtype=torch.float64), schedule.scaling
        )
        assert (level.t, level.alpha, level.sigma, level.schedule) == (
            t,
            alpha.item(),
            sigma.item(),
            schedule,
        )
        again, blended = schedule.at(level.logsnr), schedule.at_blend(level.blend)
        for other in (again, blended):
            values = (other.logsnr, other.t, other.alpha, other.sigma)
            assert values == pytest.approx(
                (level.logsnr, level.t, level.alpha, level.sigma), rel=1e-10
            )


@every_scaling
def test_blend_and_ratio_are_those_of_lambda(scaling):
    logsnr = torch.tensor([-9.0, 0.0, 2.5, 30.0], dtype=torch.float64)
    level = Cosine(scaling=scaling).at(logsnr)
    torch.testing.assert_close(level.ratio, level.sigma / level.alpha, rtol=1e-14, atol=0)
    torch.testing.assert_close(level.blend, 1 / (1 + (logsnr / 2).exp()), rtol=1e-14, atol=0)
    for i, value in enumerate(logsnr.tolist()):
        assert Cosine(scaling=scaling).at(value).ratio == pytest.approx(
            math.exp(-value / 2), rel=1e-14
        )
        assert Cosine(scaling=scaling).at(value).blend == pytest.approx(
            level.blend[i].item(), rel=1e-14
        )


@pytest.mark.parametrize("scaling", ["vp", "flow"])
def test_blend_and_ratio_reach_both_ends(scaling):
    noise, clean = Cosine(scaling=scaling).level(1.0), Cosine(scaling=scaling).level(0.0)
    assert (noise.blend, noise.ratio) == (1, math.inf)
    assert (clean.blend, clean.ratio) == (0, 0)
    assert Cosine(scaling=scaling).at_blend(1.0).logsnr == -math.inf
    assert Cosine(scaling=scaling).at_blend(0.0).logsnr == math.inf


def test_level_casts_to_the_dtype_of_x_and_keeps_floats():
    x = torch.zeros(2, 1, 4, dtype=torch.bfloat16)
    level = Flow().level(torch.tensor([[[0.25]], [[0.75]]], dtype=torch.float64))
    cast = level.to(x)
    for name in ("logsnr", "t", "alpha", "sigma"):
        assert torch.equal(getattr(cast, name), getattr(level, name).bfloat16())
    assert cast.schedule == level.schedule
    assert (
        Flow().level(0.25).to(x)
        == Flow().level(0.25)
        == Level(2 * math.log(3), 0.25, 0.75, 0.25, Flow())
    )


@pytest.mark.parametrize("t", [-1e-9, 1.0001, math.nan])
def test_times_outside_0_and_1_are_refused(t):
    for schedule in (Cosine(), Discrete(), Shifted(Flow(), 1.0)):
        with pytest.raises(ValueError, match=r"t is .*expected times within \[0, 1\]"):
            schedule.logsnr(t)
        with pytest.raises(ValueError, match="expected times within"):
            schedule.level(torch.tensor([0.5, t]))


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
    assert schedule.training_times(
        torch.tensor([0.0, 1e-300, 1.0], dtype=torch.float64)
    ).tolist() == [
        1 / 50,
        1 / 50,
        1,
    ]


@every_schedule
def test_a_schedule_is_a_frozen_value_even_after_use(schedule):
    fresh = eval(repr(schedule))
    schedule.logsnr(0.5)
    assert fresh == schedule
    assert hash(fresh) == hash(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.steps = 3


@every_schedule
def test_A5_draws_follow_the_density(schedule):
    """The histogram of λ over a fine grid of t is the integral of p(λ) over each bin (Simpson's
    rule).
    """
    edges = np.linspace(schedule.quantile(0.02), schedule.quantile(0.98), 41)
    drawn = schedule.logsnr((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).numpy()
    share = np.histogram(drawn, edges)[0] / len(drawn)
    fine = np.linspace(edges[:-1], edges[1:], 2001)
    density = schedule.density(torch.from_numpy(fine)).numpy()
    integral = np.trapezoid(density, fine, axis=0)
    np.testing.assert_allclose(
        share, integral, rtol=0, atol=2e-5
    )  # a draw in 200 000 at either edge, and kinks
