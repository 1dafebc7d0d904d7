"""ZeroTerminalSNR against Algorithm 1 of Lin et al. in numpy and in diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from diffcore.schedules import (
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Laplace,
    LogLinear,
    Mixture,
    Schedule,
    Shifted,
    ZeroTerminalSNR,
)
from tests.helpers.schedules import STABLE_DIFFUSION, index_times

TABLES = [
    Discrete(),
    STABLE_DIFFUSION,
    Discrete("cosine", 50),
    Discrete(scaling="flow"),
]
all_tables = pytest.mark.parametrize("table", TABLES, ids=repr)
t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def algorithm_1(logsnr: np.ndarray) -> np.ndarray:
    """√ᾱ at zero terminal SNR: subtract the last entry, and scale so that the first is kept."""
    root = np.sqrt(1 / (1 + np.exp(-logsnr)))
    first, last = root[0].copy(), root[-1].copy()
    return (root - last) * first / (first - last)


@all_tables
def test_zero_terminal_snr_is_algorithm_1(table):
    times = index_times(table.steps)
    root = algorithm_1(table.logsnr(times).numpy())
    logsnr = ZeroTerminalSNR(table).logsnr(times).numpy()
    assert logsnr[-1] == -math.inf
    np.testing.assert_allclose(np.sqrt(1 / (1 + np.exp(-logsnr[:-1]))), root[:-1], rtol=1e-11)
    np.testing.assert_allclose(
        logsnr[:-1], np.log(root[:-1] ** 2 / (1 - root[:-1] ** 2)), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("table", [Discrete(), Discrete(start=1e-3)], ids=repr)
def test_zero_terminal_snr_is_that_of_diffusers(table):
    betas = torch.linspace(table.start, table.end, table.steps, dtype=torch.float64)
    published = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    alpha_bar = ZeroTerminalSNR(table).level(index_times(table.steps)).alpha ** 2
    torch.testing.assert_close(alpha_bar, published, rtol=0, atol=1e-12)


@all_tables
def test_levels_cleaner_than_index_0_are_unchanged(table):
    early = torch.linspace(0, 1 / table.steps, 11, dtype=torch.float64)
    assert torch.equal(ZeroTerminalSNR(table).logsnr(early), table.logsnr(early))


@all_tables
def test_zero_terminal_snr_keeps_the_scaling_and_the_number_of_levels(table):
    zero = ZeroTerminalSNR(table)
    assert (zero.scaling, zero.steps) == (table.scaling, table.steps)
    assert (zero.level(1.0).alpha, zero.level(1.0).sigma) == (0, 1)


def test_a_continuous_schedule_is_rescaled_by_algorithm_1_too():
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    zero = ZeroTerminalSNR(LogLinear(-4.0, 9.0))
    root = algorithm_1((9 - 13 * times).numpy())
    np.testing.assert_allclose(zero.level(times).alpha, root, rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(zero.time(zero.logsnr(times)), times, rtol=1e-10, atol=1e-12)
    inside = zero.logsnr(times[1:-1])
    slope = (zero.time(inside - 1e-5) - zero.time(inside + 1e-5)) / 2e-5
    torch.testing.assert_close(zero.density(inside), slope, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Shifted(Laplace(), 2.0)], ids=repr)
def test_a_schedule_that_ends_in_noise_is_unchanged(schedule):
    zero = ZeroTerminalSNR(schedule)
    torch.testing.assert_close(zero.logsnr(t), schedule.logsnr(t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        zero.density(zero.logsnr(t)), schedule.density(schedule.logsnr(t)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shift", [-2.0, 1.0])
def test_the_order_of_transforms_is_the_order_of_the_arithmetic(shift):
    times = index_times(1000)[:-1]
    table = Discrete().logsnr(index_times(1000)).numpy()

    def logsnr(root: np.ndarray) -> np.ndarray:
        return np.log(root[:-1] ** 2 / (1 - root[:-1] ** 2))

    shift_last = Shifted(ZeroTerminalSNR(Discrete()), shift)
    shift_first = ZeroTerminalSNR(Shifted(Discrete(), shift))
    np.testing.assert_allclose(
        shift_last.logsnr(times), logsnr(algorithm_1(table)) + shift, rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
        shift_first.logsnr(times), logsnr(algorithm_1(table + shift)), rtol=0, atol=1e-9
    )
    for schedule in (shift_last, shift_first):
        assert schedule.logsnr(1.0) == -math.inf


def test_transforms_of_two_tables_share_no_cached_values():
    schedules: list[Schedule] = [
        ZeroTerminalSNR(Discrete()),
        ZeroTerminalSNR(Discrete(end=0.01)),
        Discrete(end=0.01),
    ]
    assert len({schedule.logsnr(0.5) for schedule in schedules}) == 3
    assert schedules[0] != schedules[1]


@pytest.mark.parametrize(
    "inner", [Cauchy(0.5, 2.0), Cosine(), Cauchy(scaling="flow"), Discrete()], ids=repr
)
def test_the_density_is_the_slope_of_the_time_at_levels_beyond_the_range_of_float64(inner):
    """σ² is below the smallest float64 from λ = 745 on, where a Cauchy density is still large."""
    schedule = ZeroTerminalSNR(inner)
    logsnr = torch.tensor([-900.0, -750.0, -20.0, 700.0, 744.0, 760.0, 5e3], dtype=torch.float64)
    density = schedule.density(logsnr)
    assert density.isfinite().all()
    h = logsnr.abs() * 1e-6
    slope = (schedule.time(logsnr - h) - schedule.time(logsnr + h)) / (2 * h)
    clean = logsnr > 0  # times near 1 have no digits for a difference
    torch.testing.assert_close(density[clean], slope[clean], rtol=1e-6, atol=1e-250)
    assert Mixture(schedule, Cauchy(), 0.2).logsnr(torch.tensor([1e-4])).isfinite().all()


def test_a_level_beyond_the_range_of_float64_is_the_inverse_of_its_time():
    schedule = ZeroTerminalSNR(Cauchy(0.5, 2.0))
    logsnr = torch.tensor([-2e3, -100.0, 100.0, 800.0, 1e5], dtype=torch.float64)
    torch.testing.assert_close(schedule.logsnr(schedule.time(logsnr)), logsnr, rtol=1e-10, atol=0)
