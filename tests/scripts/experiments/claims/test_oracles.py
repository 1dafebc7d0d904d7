"""The study of samplers on exact denoisers."""

import torch
from benchmarks.accuracy import Problem, plane
from experiments.claims.oracles import EVALUATIONS, METHODS, measure

from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import integrate
from diffcore.schedules import UniformBlend, Within


def test_groups_of_starts_are_measured_by_the_median_of_each():
    rows = list(measure("2-D", [0, 1], 3))
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, group) for method in METHODS for group in (0, 1)
    }
    assert all(list(row["errors"]) == [str(count) for count in EVALUATIONS] for row in rows)
    assert rows[0]["errors"] != rows[len(METHODS)]["errors"]
    first, second = (
        next(row["errors"]["20"] for row in rows if row["method"] == f"AlphaBlending({order})")
        for order in (1, 2)
    )
    assert second < first / 5


def test_the_first_order_of_alpha_blending_is_ddim():
    problem = Problem(plane(), 4)
    knots = Within(UniformBlend(), low=-10.0).knots(problem.schedule, 6)
    ends = [
        integrate(problem.oracle, sampler, problem.at(knots[0]), knots, problem.noise)[0]
        for sampler in (DDIM(), AlphaBlending(1))
    ]
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-12)
