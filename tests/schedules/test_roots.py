"""Numerical inverses of monotone functions."""

import math

import pytest
import torch
from torch import Tensor

from diffcore.schedules.roots import invert, invert_by_newton, invert_in_logit_time


def test_a_monotone_function_is_inverted_to_the_last_bits():
    y = torch.tensor([-3.0, 0.0, 1e-9, 7.0], dtype=torch.float64)
    root = invert(lambda x: x**3, y, torch.full_like(y, -10), torch.full_like(y, 10))
    torch.testing.assert_close(root**3, y, rtol=1e-14, atol=1e-40)


def test_a_function_that_is_not_finite_has_no_silent_inverse():
    y = torch.tensor([0.5, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no inverse at \[0.5\].*choose less extreme parameters"):
        invert(lambda x: torch.where(x < 1, torch.nan, x), y, y * 0, y * 0 + 10)
    x = invert(
        lambda x: x,
        torch.tensor([math.nan, 20.0, 3.0]).double(),
        *torch.tensor([[0.0] * 3, [9.0] * 3]).double(),
    )
    assert x[0].isnan()
    assert x[1:].tolist() == [9, 3]


def test_times_are_solved_in_both_tails_and_at_infinite_levels():
    def logsnr(t: Tensor, rest: Tensor) -> Tensor:
        return 2 * (rest / t).log()

    values = torch.tensor([-200.0, -40.0, 0.0, 60.0], dtype=torch.float64)
    t = invert_in_logit_time(logsnr, values)
    torch.testing.assert_close(t, (-values / 2).sigmoid(), rtol=1e-13, atol=0)
    beyond = torch.tensor([1000.0], dtype=torch.float64)  # beyond the bound of logit t
    assert 0 < invert_in_logit_time(logsnr, beyond).item() < 1e-140
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert invert_in_logit_time(logsnr, ends).tolist() == [0, 1]


def test_newton_converges_at_a_jump_of_the_slope_a_flat_part_and_a_tail():
    def f(x: Tensor) -> Tensor:  # decreases to 0.5 at 0, is flat to 1, and decreases as exp
        tail = 0.5 * (1 - x.clamp(min=1)).exp()
        return torch.where(x < 0, 0.5 - x, torch.where(x < 1, 0.5, tail))

    def rate(x: Tensor) -> Tensor:
        return torch.where(x < 0, 1.0, torch.where(x < 1, 0.0, f(x)))

    y = torch.tensor([3.0, 0.5 + 1e-9, 0.5 - 1e-9, 0.1, 1e-20], dtype=torch.float64)
    root = invert_by_newton(f, rate, y, torch.full_like(y, -1000), torch.full_like(y, 900))
    torch.testing.assert_close(f(root), y, rtol=1e-14, atol=1e-15)
    flat, low, high = (torch.tensor([v], dtype=torch.float64) for v in (0.5, -10.0, 10.0))
    assert 0 <= invert_by_newton(f, rate, flat, low, high).item() <= 1
