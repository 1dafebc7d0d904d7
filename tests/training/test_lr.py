"""The learning rate is a pure function of the optimizer step."""

import math
from typing import get_args

import pytest

from diffcore.training.optimization.lr import LearningRate, Shape

STEPS = 110
SHAPES = get_args(Shape)


@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        ("constant", 0, 0.1),  # (step + 1) / warmup
        ("constant", 4, 0.5),
        ("constant", 9, 1.0),
        ("constant", 10, 1.0),
        ("constant", 10**6, 1.0),
        ("cosine", 4, 0.5),
        ("cosine", 10, 1.0),
        ("cosine", 35, (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 60, 0.5),
        ("cosine", 110, 0.0),
        ("cosine", 500, 0.0),
        ("rsqrt", 0, 0.1),
        ("rsqrt", 50, 1.0),
        ("rsqrt", 200, 0.5),
        ("rsqrt", 5000, 0.1),
    ],
)
def test_the_learning_rate_follows_its_formula(shape, step, expected):
    lr = LearningRate(peak=0.02, warmup=10, shape=shape, hold=50)
    assert lr(step, STEPS) == pytest.approx(0.02 * expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_learning_rate_of_a_step_does_not_depend_on_earlier_calls(shape):
    lr = LearningRate(1e-3, 20, shape, 40)
    forwards = [lr(step, STEPS) for step in range(STEPS)]
    assert [lr(step, STEPS) for step in reversed(range(STEPS))] == forwards[::-1]
    assert all(0 < value <= 1e-3 for value in forwards)
    assert forwards[:20] == sorted(forwards[:20])
    assert forwards[20:] == sorted(forwards[20:], reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 10), (10, 10), (20, 10)])
def test_without_warmup_or_with_warmup_for_the_whole_run_the_learning_rate_is_finite(
    shape, warmup, steps
):
    values = [LearningRate(1.0, warmup, shape)(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peak": 0.0}, "peak is 0.0"),
        ({"peak": math.inf}, "peak is inf"),
        ({"peak": math.nan}, "peak is nan"),
        ({"warmup": -1}, "warmup .* -1"),
        ({"hold": 0}, "hold .* 0"),
        ({"shape": "step"}, "shape is 'step', expected one of constant, cosine, rsqrt"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**fields)
