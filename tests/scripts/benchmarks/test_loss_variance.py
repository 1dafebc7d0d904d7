"""Stratified noise levels lower the variance of the loss."""

import torch
from benchmarks.loss_variance import STD, Posterior, measure_table, variance_ratio

from diffcore.objectives.weighting import ELBO, MSE
from diffcore.schedules import Cosine, LogLinear, Truncated


def test_the_network_is_the_posterior_mean_of_v():
    """E[v | x] = α σ (1 - s²) x / (α² s² + σ²) for N(0, s²) in the vp scaling."""
    level, x = (
        Cosine().level(torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)),
        torch.randn(1, 1, 8, 8).double(),
    )
    alpha, sigma = level.alpha, level.sigma
    expected = alpha * sigma * (1 - STD**2) * x / (alpha**2 * STD**2 + sigma**2)
    torch.testing.assert_close(Posterior(level)(x, torch.zeros(1)), expected)


def test_stratified_levels_lower_the_variance_where_the_loss_depends_on_the_level():
    """The ELBO's loss falls by 5 orders over these levels; v's by less."""
    schedule = Truncated(LogLinear(), -5.0, 8.0)
    assert variance_ratio(schedule, ELBO(), steps=60) > 4
    assert (
        0.5
        < variance_ratio(schedule, MSE("v_prediction"), steps=60)
        < variance_ratio(schedule, ELBO(), steps=60)
    )


def test_the_table_has_one_row_for_each_schedule():
    lines = measure_table(3, [Cosine()]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| Cosine(")
