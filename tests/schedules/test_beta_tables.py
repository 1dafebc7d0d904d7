"""Beta tables against diffusers (ᾱ to 1e-6) and a float64 computation (λ to 1e-9)."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.integrate import quad

from diffcore.io.specs import from_spec, to_spec
from diffcore.schedules import Discrete, ZeroTerminalSNR
from diffcore.schedules.beta_tables import Form
from tests.helpers.schedules import STABLE_DIFFUSION, index_times

TABLES = [
    Discrete(),
    Discrete(steps=4000, start=2.5e-5, end=0.005),
    STABLE_DIFFUSION,
    Discrete("scaled_linear", 49, 0.01, 0.3),
    Discrete("cosine"),
    Discrete("cosine", 100),
    Discrete("sigmoid"),
    Discrete("sigmoid", 49, 0.01, 0.3),
    Discrete((0.001, 0.2, 0.03, 0.5, 1e-6, 0.9, 0.7)),
]
ZERO_TERMINAL = [
    Discrete((0.1, 0.02, 0.5, 1.0)),
    Discrete((1e-4, 1.0), scaling="flow"),
    Discrete((*[0.01] * 99, 1.0)),
]
all_zero_terminal = pytest.mark.parametrize(
    "schedule", ZERO_TERMINAL, ids=["4 entries", "2 entries", "100 entries"]
)
all_tables = pytest.mark.parametrize("schedule", TABLES, ids=repr)
DIFFUSERS_FORMS = {"cosine": "squaredcos_cap_v2"}


def alpha_bar(schedule: Discrete) -> np.ndarray:
    """ᾱ_i in float64, from the definitions of the papers."""
    T = schedule.steps
    if schedule.betas == "cosine":
        bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(T)])
    elif schedule.betas == "linear":
        betas = schedule.start + (schedule.end - schedule.start) * np.arange(T) / (T - 1)
    elif schedule.betas == "sigmoid":
        x = -6 + 12 * np.arange(T) / (T - 1)
        betas = schedule.start + (schedule.end - schedule.start) / (1 + np.exp(-x))
    elif isinstance(schedule.betas, tuple):
        betas = np.array(schedule.betas)
    else:
        root = math.sqrt(schedule.start)
        betas = (root + (math.sqrt(schedule.end) - root) * np.arange(T) / (T - 1)) ** 2
    return np.cumprod(1 - betas)


def test_each_form_of_the_betas_is_tested():
    forms = {table.betas for table in TABLES if isinstance(table.betas, str)}
    assert forms == set(get_args(Form))


@all_tables
def test_lambda_at_each_index_is_the_float64_computation(schedule):
    bar = alpha_bar(schedule)
    level = schedule.level(index_times(schedule.steps))
    np.testing.assert_allclose(level.logsnr, np.log(bar) - np.log1p(-bar), rtol=0, atol=1e-9)
    np.testing.assert_allclose(level.alpha, np.sqrt(bar), rtol=1e-10)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - bar), rtol=1e-9)


@all_tables
def test_alpha_bar_is_that_of_diffusers(schedule):
    published = DDPMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.start,
        beta_end=schedule.end,
        **(
            {"trained_betas": schedule.betas}
            if isinstance(schedule.betas, tuple)
            else {"beta_schedule": DIFFUSERS_FORMS.get(schedule.betas, schedule.betas)}
        ),
    ).alphas_cumprod
    alphas_cumprod = schedule.level(index_times(schedule.steps)).alpha ** 2
    torch.testing.assert_close(alphas_cumprod, published.double(), rtol=0, atol=1e-6)


@all_tables
def test_a_time_that_is_an_index_up_to_rounding_is_that_index_bit_for_bit(schedule):
    i = torch.arange(schedule.steps, dtype=torch.float64)
    rounded = i / schedule.steps + 1 / schedule.steps
    assert not torch.equal(rounded, index_times(schedule.steps))
    assert torch.equal(
        schedule.logsnr(rounded.clamp(max=1)), schedule.logsnr(index_times(schedule.steps))
    )


@all_tables
def test_lambda_is_linear_between_indices(schedule):
    knots = schedule.logsnr(index_times(schedule.steps))
    for share in (0.25, 0.5):
        between = schedule.logsnr(index_times(schedule.steps)[:-1] + share / schedule.steps)
        torch.testing.assert_close(
            between, (1 - share) * knots[:-1] + share * knots[1:], rtol=1e-9, atol=1e-9
        )


@all_tables
def test_sigma_over_alpha_is_linear_from_clean_to_index_0(schedule):
    first = schedule.level(1 / schedule.steps)
    for share in (0.01, 0.3, 0.9):
        assert schedule.level(share / schedule.steps).ratio == pytest.approx(
            share * first.ratio, rel=1e-12
        )


@all_tables
def test_each_time_above_0_has_a_finite_level(schedule):
    t = torch.tensor([1e-300, 1e-13, 1e-12, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=1e-11, atol=0)


@all_tables
def test_the_first_end_is_clean_and_the_last_is_the_last_entry(schedule):
    bar = alpha_bar(schedule)[-1]
    assert schedule.logsnr(0.0) == math.inf
    assert schedule.logsnr(1.0) == pytest.approx(math.log(bar) - math.log1p(-bar), abs=1e-9)


def test_the_published_tables_have_their_known_ends():
    """ᾱ_T is 4e-5 for DDPM and 0.0047 for Stable Diffusion, whose σ/α is from 0.0292 to 14.6."""
    assert Discrete().level(1.0).alpha ** 2 == pytest.approx(4.04e-5, rel=0.01)
    clean, noise = STABLE_DIFFUSION.level(1 / 1000), STABLE_DIFFUSION.level(1.0)
    assert noise.alpha**2 == pytest.approx(0.00466, rel=0.01)
    assert clean.logsnr == pytest.approx(7.07, abs=0.005)
    assert (clean.ratio, noise.ratio) == pytest.approx((0.0292, 14.61), rel=0.01)


@all_tables
def test_a_table_equals_the_one_of_its_betas_and_the_one_of_its_alphas_cumprod(schedule):
    bar = alpha_bar(schedule)
    t = index_times(schedule.steps)
    from_bar = Discrete.from_alphas_cumprod(bar, scaling="flow")
    assert (from_bar.steps, from_bar.scaling) == (schedule.steps, "flow")
    expected = np.log(bar) - np.log1p(-bar)
    np.testing.assert_allclose(from_bar.logsnr(t), expected, rtol=0, atol=1e-12)
    from_betas = Discrete(from_bar.betas)
    assert torch.equal(from_betas.logsnr(t), from_bar.logsnr(t))
    assert Discrete.from_alphas_cumprod(bar.tolist()) == from_betas
    assert Discrete.from_alphas_cumprod(torch.from_numpy(bar)) == from_betas


def test_float32_betas_keep_the_digits_of_the_clean_end_that_alphas_cumprod_lose():
    scheduler, exact = DDPMScheduler(), Discrete()
    t = index_times(exact.steps)
    by_betas = Discrete(tuple(scheduler.betas.tolist())).logsnr(t) - exact.logsnr(t)
    by_product = Discrete.from_alphas_cumprod(scheduler.alphas_cumprod).logsnr(t) - exact.logsnr(t)
    assert by_betas.abs().max() < 3e-7
    assert by_product.abs().argmax() == 0
    # within 3e-8 / (1 - ᾱ) = 3e-4
    assert by_product.abs().max() == pytest.approx(1.66e-4, rel=0.01)


@all_zero_terminal
def test_a_last_beta_of_1_is_pure_noise_and_alpha_over_sigma_is_linear_before_it(schedule):
    T, level = schedule.steps, schedule.level(1.0)
    assert (level.logsnr, level.alpha, level.sigma) == (-math.inf, 0.0, 1.0)
    before = schedule.level((T - 1) / T)
    bar = np.cumprod(1 - np.array(schedule.betas))[-2]
    assert before.logsnr == pytest.approx(math.log(bar) - math.log1p(-bar), abs=1e-9)
    for share in (0.01, 0.3, 0.999):
        level = schedule.level((T - 1 + share) / T)
        assert 1 / level.ratio == pytest.approx((1 - share) / before.ratio, rel=1e-9)


@all_zero_terminal
def test_a_zero_terminal_table_decreases_and_has_an_inverse_and_a_density(schedule):
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    assert (logsnr.diff() < 0).all()
    torch.testing.assert_close(schedule.time(logsnr), t, rtol=0, atol=1e-12)
    for level in schedule.logsnr(torch.linspace(0.0031, 0.9973, 37, dtype=torch.float64)).tolist():
        left, right = schedule.time(level + 1e-6), schedule.time(level - 1e-6)
        assert schedule.density(level) == pytest.approx((right - left) / 2e-6, rel=1e-4)
    ends = sorted({-80.0, *schedule.logsnr(index_times(schedule.steps))[:-1].tolist(), 80.0})
    mass = sum(quad(schedule.density, a, b)[0] for a, b in zip(ends, ends[1:], strict=False))
    assert mass == pytest.approx(1, abs=1e-7)
    assert schedule.density(-math.inf) == 0 == schedule.density(math.inf)
    assert schedule.density(schedule.logsnr(1 / schedule.steps)) < math.inf


def test_a_table_rescaled_to_zero_terminal_snr_equals_the_one_of_its_alphas_cumprod():
    rescaled = ZeroTerminalSNR(STABLE_DIFFUSION)
    t = index_times(1000)
    table = Discrete.from_alphas_cumprod(rescaled.logsnr(t).sigmoid())
    assert table.logsnr(1.0) == -math.inf
    torch.testing.assert_close(table.logsnr(t), rescaled.logsnr(t), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        ZeroTerminalSNR(table).logsnr(t), table.logsnr(t), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("schedule", [*TABLES, *ZERO_TERMINAL[:2]], ids=repr)
def test_a_table_equals_the_one_that_is_read_from_its_json(schedule):
    assert from_spec(Discrete, json.loads(json.dumps(to_spec(schedule)))["init_args"]) == schedule
    assert hash(
        Discrete(
            schedule.betas, schedule.steps, schedule.start, schedule.end, scaling=schedule.scaling
        )
    )


def test_a_table_is_computed_once(monkeypatch):
    schedule = Discrete()
    monkeypatch.delattr(torch, "log1p")
    assert schedule.level(0.5).logsnr == schedule.logsnr(schedule.time(schedule.logsnr(0.5)))


def test_the_number_of_steps_is_1000_or_that_of_the_betas():
    assert (Discrete().steps, Discrete([0.1, 0.2]).steps, Discrete((0.1, 0.2), 2)) == (
        1000,
        2,
        Discrete((0.1, 0.2)),
    )
    assert Discrete() == Discrete(steps=1000)


@pytest.mark.parametrize(
    ("bar", "message"),
    [
        (
            [1.0, 0.5],
            r"alphas_cumprod\[0\] is 1.0 after 1.0, expected ᾱ that decrease strictly from below 1",
        ),
        ([0.9, 0.5, 0.5, 0.2], r"alphas_cumprod\[2\] is 0.5 after 0.5"),
        ([0.9, 0.5, 0.6], r"alphas_cumprod\[2\] is 0.6 after 0.5"),
        ([0.9, 0.0, 0.0], r"alphas_cumprod\[2\] is 0.0 after 0.0"),
        ([0.9, -0.1], r"alphas_cumprod\[1\] is -0.1"),
        ([0.9, math.nan], r"alphas_cumprod\[1\] is nan"),
        ([0.9], "steps is 1, expected a table of at least 2 levels"),
        ([], "steps is 0, expected a table of at least 2 levels"),
    ],
    ids=str,
)
def test_alphas_cumprod_that_do_not_decrease_are_refused_with_their_index(bar, message):
    with pytest.raises(ValueError, match=message):
        Discrete.from_alphas_cumprod(bar)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps is 1, expected a table of at least 2 levels"),
        ({"steps": 10**12}, "steps is 1000000000000, expected at most 1,000,000 levels"),
        ({"start": 0.0}, r"start and end are 0.0 and 0.02, expected 0 < start ≤ end < 1"),
        ({"start": 0.1}, r"start and end are 0.1 and 0.02"),
        ({"end": 1.0}, r"start and end are 0.0001 and 1.0"),
        (
            {"betas": "sqrt"},
            "betas is 'sqrt', expected one of linear, scaled_linear, cosine, sigmoid, or a tuple",
        ),
        ({"betas": "sigmoid", "start": 0.0}, "start and end are 0.0"),
        (
            {"betas": (0.1, 0.2), "steps": 1000},
            "steps is 1000, but betas has 2 entries: leave steps out",
        ),
        ({"betas": (0.1,)}, "steps is 1, expected a table of at least 2 levels"),
        ({"betas": ()}, "steps is 0, expected a table of at least 2 levels"),
        ({"betas": (0.1, 0.0, 0.2)}, r"betas\[1\] is 0.0, expected 0 < β < 1; .* .ZeroTerminalSNR"),
        ({"betas": (0.1, 1.0, 0.2)}, r"betas\[1\] is 1.0"),
        ({"betas": (0.1, 1.5)}, r"betas\[1\] is 1.5"),
        ({"betas": (-0.1, 0.5)}, r"betas\[0\] is -0.1"),
        ({"betas": (0.1, math.nan)}, r"betas\[1\] is nan"),
        ({"betas": (0.5, 0.5, 1e-20)}, r"betas\[2\] is 1e-20, too small to decrease ᾱ in float64"),
        ({"scaling": "edm"}, "scaling is 'edm', expected one of vp, ve, flow"),
    ],
    ids=str,
)
def test_arguments_that_define_no_table_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Discrete(**arguments)
