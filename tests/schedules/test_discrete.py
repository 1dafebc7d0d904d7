"""Beta tables against diffusers' (float32: ᾱ to 1e-6) and against a float64 recomputation (λ to 1e-9)."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffcore.schedules import Discrete

TABLES = [
    Discrete(),
    Discrete(steps=4000, start=2.5e-5, end=0.005),
    Discrete("scaled_linear", 1000, 0.00085, 0.012),
    Discrete("scaled_linear", 49, 0.01, 0.3),
    Discrete("cosine"),
    Discrete("cosine", 100),
]
every_table = pytest.mark.parametrize("schedule", TABLES, ids=repr)
DIFFUSERS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def alpha_bar(schedule: Discrete) -> np.ndarray:
    """ᾱ_i in float64, from the papers' definitions."""
    T = schedule.steps
    if schedule.betas == "cosine":
        bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(T)])
    elif schedule.betas == "linear":
        betas = schedule.start + (schedule.end - schedule.start) * np.arange(T) / (T - 1)
    else:
        root = math.sqrt(schedule.start)
        betas = (root + (math.sqrt(schedule.end) - root) * np.arange(T) / (T - 1)) ** 2
    return np.cumprod(1 - betas)


def index_times(schedule: Discrete) -> torch.Tensor:
    return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps


@every_table
def test_A3_lambda_at_every_index_is_the_float64_recomputation(schedule):
    bar = alpha_bar(schedule)
    level = schedule.level(index_times(schedule))
    np.testing.assert_allclose(level.logsnr, np.log(bar) - np.log1p(-bar), rtol=0, atol=1e-9)
    np.testing.assert_allclose(level.alpha, np.sqrt(bar), rtol=1e-10)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - bar), rtol=1e-9)


@every_table
def test_alpha_bar_is_that_of_diffusers(schedule):
    theirs = DDPMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.start,
        beta_end=schedule.end,
        beta_schedule=DIFFUSERS[schedule.betas],
    ).alphas_cumprod
    ours = schedule.level(index_times(schedule)).alpha ** 2
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-6)


@every_table
def test_A6_a_time_that_is_an_index_up_to_rounding_is_that_index_bit_for_bit(schedule):
    i = torch.arange(schedule.steps, dtype=torch.float64)
    rounded = i / schedule.steps + 1 / schedule.steps
    assert not torch.equal(rounded, index_times(schedule))
    assert torch.equal(schedule.logsnr(rounded.clamp(max=1)), schedule.logsnr(index_times(schedule)))


@every_table
def test_lambda_is_linear_between_indices(schedule):
    knots = schedule.logsnr(index_times(schedule))
    for share in (0.25, 0.5):
        between = schedule.logsnr(index_times(schedule)[:-1] + share / schedule.steps)
        torch.testing.assert_close(between, (1 - share) * knots[:-1] + share * knots[1:], rtol=1e-9, atol=1e-9)


@every_table
def test_sigma_over_alpha_is_linear_from_clean_to_index_0(schedule):
    first = schedule.level(1 / schedule.steps)
    for share in (0.01, 0.3, 0.9):
        assert schedule.level(share / schedule.steps).ratio == pytest.approx(share * first.ratio, rel=1e-12)


@every_table
def test_the_ends_are_clean_and_the_last_entry(schedule):
    bar = alpha_bar(schedule)[-1]
    assert schedule.logsnr(0.0) == math.inf
    assert schedule.logsnr(1.0) == pytest.approx(math.log(bar) - math.log1p(-bar), abs=1e-9)


def test_the_published_tables_end_where_their_users_know():
    """ᾱ_T of DDPM is 4e-5, of Stable Diffusion 0.0047; its first level is λ = 7.07 (σ/α from 0.0292 to 14.6)."""
    assert Discrete().level(1.0).alpha ** 2 == pytest.approx(4.04e-5, rel=0.01)
    stable = Discrete("scaled_linear", 1000, 0.00085, 0.012)
    assert stable.level(1.0).alpha ** 2 == pytest.approx(0.00466, rel=0.01)
    assert stable.logsnr(1 / 1000) == pytest.approx(7.07, abs=0.005)
    assert (stable.level(1 / 1000).ratio, stable.level(1.0).ratio) == pytest.approx((0.0292, 14.61), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps is 1, expected a table of at least 2 levels"),
        ({"start": 0.0}, r"start and end are 0.0 and 0.02, expected 0 < start ≤ end < 1"),
        ({"start": 0.1}, r"start and end are 0.1 and 0.02"),
        ({"end": 1.0}, r"start and end are 0.0001 and 1.0"),
        ({"betas": "sqrt"}, "betas is 'sqrt', expected linear, scaled_linear or cosine"),
        (
            {"scaling": "edm"},
            "scaling is 'edm', expected one of vp, ve, flow",
        ),  # Would be a bug: Discrete builds with it
    ],
    ids=str,
)
def test_tables_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Discrete(**arguments)
