"""Which knots are checked before sampling: the ends, and their neighbours if an end is infinite."""

import math

import pytest

from diffcore.core.process import Process, TimeConditioning
from diffcore.sampling.loop import check_levels
from diffcore.schedules import Cosine


def test_the_noisiest_finite_knot_after_pure_noise_is_checked():
    """Pure noise has the clamped number, and the knot after it overflows in float32."""
    schedule = Cosine()
    process = Process(schedule, time=TimeConditioning("sigma", 1.0, 200.0))
    levels = (-math.inf, -180.0, 0.0, 5.0, math.inf)
    with pytest.raises(ValueError, match="knot 1 is at λ = -180, where float32 overflows"):
        check_levels(process, tuple(map(schedule.at, levels)))
    check_levels(process, tuple(map(schedule.at, (-math.inf, *levels[2:]))))
