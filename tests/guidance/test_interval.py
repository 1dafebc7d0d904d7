"""Guidance in an interval of noise levels: every grid converges to the same result."""

import math
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.editing.inpainting import RePaint
from diffcore.guidance import APG, CFG, GuidanceWrapper, Interval, Step
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AlphaBlending,
    DPMSolverPP,
    GradientEstimation,
    PredictorCorrector,
    Restart,
    UniPC,
)
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Cosine, Explicit, Karras, Trailing, UniformBlend, UniformLogSNR
from tests.helpers.oracles import ExactNetwork, Pair, flow, mixture, process

ORACLE, SEEDS, LABELS = mixture(), range(48), [0, 1] * 24
RULE = Interval(CFG(4.0), sigma=(0.19, 1.61))
GRIDS = {
    "karras": Karras(0.002, 500.0),
    "uniform": UniformLogSNR(-2 * math.log(500), -2 * math.log(0.002)),
    "trailing": Trailing(),
}


@dataclass(frozen=True)
class WithoutKnots(Interval):
    """Its bounds are not added to the knots, as in implementations that select existing steps."""

    def levels(self, process):
        return ()


@dataclass(frozen=True)
class StepFraction(GuidanceWrapper):
    """Guides in a fraction of the steps, as the guiders of diffusers do."""

    start: float = 0.25
    stop: float = 0.6

    def required_references(self, step, memory):
        return self.inner.required_references(step, memory) if self.inside(step) else ()

    def combine(self, inputs, memory):
        return (
            self.inner.combine(inputs, memory)
            if self.inside(inputs.step)
            else (inputs.conditional, memory)
        )

    def inside(self, step):
        return self.start <= step.index / step.total < self.stop


def draw(rule, grid, n, sampler=AlphaBlending(2)):
    return sample(
        ORACLE,
        sampler,
        grid,
        n,
        seeds=SEEDS,
        condition=LABELS,
        guidance=rule,
        dtype=torch.float64,
        batch_size=48,
    )


@cache
def exact():
    """The flow by DOP853: conditional from pure noise to σ/α = 1.61, CFG to 0.19, conditional."""
    rows = torch.tensor(LABELS)
    x = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64).start()
    for w, *ends in ((1.0, -math.inf, 1.61), (4.0, 1.61, 0.19), (1.0, 0.19, math.inf)):
        start, end = (
            ORACLE.process.schedule.at(-2 * math.log(e) if 0 < e < math.inf else e) for e in ends
        )
        x = flow(partial(cfg, w, rows), x, start, end)
    return x


def cfg(w, labels, x, level):
    c, u = ORACLE(x, level, labels), ORACLE(x, level)
    return Prediction(*(b + w * (a - b) for a, b in zip(c, u, strict=True)))


def error(rule, grid, n):
    return (draw(rule, grid, n).x - exact()).norm(dim=1).mean().item()


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_converges_to_one_result(name):
    coarse, fine = (error(RULE, GRIDS[name], n) for n in (64, 192))
    assert fine < 2e-3
    assert fine < coarse / 3  # second order, down to what starting at σ/α = 500 leaves


def test_a_step_fraction_converges_to_another_result_on_each_grid():
    results = [draw(StepFraction(CFG(4.0)), grid, 192).x for grid in GRIDS.values()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (results[i] - results[j]).norm(dim=1).mean() > 0.04


def test_bounds_among_the_knots_halve_the_error_at_16_karras_steps():
    without = WithoutKnots(CFG(4.0), low=0.19, high=1.61)
    assert error(RULE, Karras(), 16) < 0.5 * error(without, Karras(), 16)


def test_the_bounds_are_knots_and_are_recorded():
    made = draw(RULE, Karras(), 16)
    ratios = [knot.ratio for knot in made.knots]
    assert len(made.knots) == 19
    assert min(abs(r - 0.19) for r in ratios) < 1e-12
    assert min(abs(r - 1.61) for r in ratios) < 1e-12
    assert ratios == sorted(ratios, reverse=True)


def test_a_bound_that_is_a_knot_already_or_outside_the_run_is_not_added():
    grid = Explicit((-4.0, -1.0, 2.0, math.inf))
    assert len(draw(Interval(CFG(2.0), logsnr=(-1.0, 2.0 + 1e-12)), grid, 3).knots) == 4
    assert len(draw(Interval(CFG(2.0), logsnr=(-7.0, 3.0)), grid, 3).knots) == 5


@pytest.mark.parametrize("rising", (False, True))
def test_knots_stay_in_their_order(rising):
    logsnrs = (-3.0, 0.0, 3.0) if rising is False else (3.0, 0.0, -3.0)
    knots = Explicit(logsnrs).knots(Cosine(), 2)
    added = [knot.logsnr for knot in insert_levels(knots, (1.0, -1.0, 0.0, 5.0))]
    assert added == [-3.0, -1.0, 0.0, 1.0, 3.0][:: -1 if rising else 1]


@pytest.mark.parametrize("rising", (False, True))
def test_a_step_within_the_bounds_is_guided_in_both_directions(rising):
    """Steps between 1.61 and 0.19 are guided; steps beyond the bounds are not."""
    ratios = [5.0, 1.61, 0.6, 0.19, 0.05]
    levels = [Cosine().at(-2 * math.log(r)) for r in ratios]
    pairs = list(zip(levels, levels[1:], strict=False))
    record = process()
    modes = [
        bool(
            RULE.required_references(Step(record, a, *((b, a) if rising else (a, b))), None)
        )  # the level within the step does not matter
        for a, b in pairs
    ]
    assert modes == [False, True, True, False]


def test_both_evaluations_of_a_midpoint_step_are_in_one_mode():
    """The midpoint of the step from 2 to 1.5 is inside (0.1, 1.8], but the step is not."""
    record = process()
    network = ExactNetwork(mixture(record), record)
    knots = Explicit(tuple(-2 * math.log(r) for r in (4.0, 2.0, 1.5, 0.5))).knots(
        record.schedule, 3
    )
    noise = Noise(torch.arange(3), (2,), dtype=torch.float64)
    rule = Interval(CFG(2.0), sigma=(0.1, 1.8))
    integrate(
        Denoiser(network, record),
        AlphaBlending(2),
        noise.start(),
        knots,
        noise,
        rule,
        torch.zeros(3, dtype=torch.int64),
    )
    assert [len(x) // 3 for x, _, _ in network.calls] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("sampler", (DDIM(), AlphaBlending(2)), ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_evaluations_used_equal_those_planned_and_a_guided_step_costs_twice(grid, sampler):
    made = draw(RULE, grid, 24, sampler)
    inside = sum(0.19 * (1 + 1e-9) < knot.ratio <= 1.61 * (1 + 1e-9) for knot in made.knots[:-1])
    each = 2 if sampler != DDIM() else 1
    assert made.evaluations == made.planned == each * (len(made.knots) - 1 + inside)


@pytest.mark.parametrize("sigma_data", (None, 0.25))
def test_sigma_is_of_the_process_or_of_data_of_a_stated_deviation(sigma_data):
    """(0.4, 3] for data of deviation 0.25 is (0.8, 6] for this process's 0.5."""
    rule = Interval(CFG(2.0), sigma=(0.4, 3.0), sigma_data=sigma_data)
    ratios = [math.exp(-logsnr / 2) for logsnr in rule.levels(process())]
    assert ratios == pytest.approx([6.0, 0.8] if sigma_data else [3.0, 0.4])


def test_bounds_of_sigma_and_of_logsnr_are_one_interval():
    by_sigma = Interval(CFG(4.0), sigma=(math.exp(-1.5), math.exp(0.5)))
    by_logsnr = Interval(CFG(4.0), logsnr=(-1.0, 3.0))
    assert torch.equal(
        draw(by_sigma, Karras(), 8).x, draw(by_logsnr, Karras(), 8).x
    ) or torch.allclose(draw(by_sigma, Karras(), 8).x, draw(by_logsnr, Karras(), 8).x, atol=1e-12)


def test_the_ways_to_write_an_interval_are_one_value():
    assert Interval(APG(4.0), sigma=(0.19, 1.61)) == Interval(APG(4.0), 0.19, 1.61)
    assert Interval(APG(4.0), logsnr=(-1.0, 3.0)) == Interval(APG(4.0), -1.0, 3.0, "logsnr")
    assert Interval(CFG(2.0)).levels(process()) == ()


def test_nested_intervals_are_their_intersection():
    both = Interval(Interval(CFG(3.0), sigma=(0.1, 1.0)), sigma=(0.4, 5.0))
    one = Interval(CFG(3.0), sigma=(0.4, 1.0))
    grid = Explicit(tuple(-2 * math.log(r) for r in (9.0, 5.0, 2.0, 1.0, 0.6, 0.4, 0.2, 0.1, 0.02)))
    assert torch.equal(draw(both, grid, 8).x, draw(one, grid, 8).x)
    assert both.levels(process()) == pytest.approx(
        [-2 * math.log(bound) for bound in (5.0, 0.4, 1.0, 0.1)]
    )


def test_exact_variance_of_an_interval_on_two_gaussians():
    """The flow of y = x/α multiplies y by ratios of √(v + u²), v and u = σ/α at the bounds."""
    low, high, w = 0.3, 2.0, 3.0
    noise, labels = (
        Noise(torch.arange(3), (1,), dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
    )
    pair = Pair()
    rule = Interval(CFG(w), sigma=(low, high))
    knots = insert_levels(Trailing().knots(pair.process.schedule, 200), rule.levels(pair.process))
    x, _ = integrate(pair, AlphaBlending(2), noise.start(), knots, noise, rule, labels)
    ratio = (1 + low**2) * (2 + high**2) / ((1 + high**2) * (2 + low**2))
    torch.testing.assert_close(
        (x / noise.start()) ** 2, torch.full_like(x, ratio ** (w - 1)), rtol=2e-4, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 2.0, "high": 1.0}, "low and high are 2.0 and 1.0.*swap"),
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"low": -0.1, "high": 1.0}, "0 ≤ low"),
        ({"low": math.nan, "high": 1.0}, "low and high are nan"),
        ({"sigma": (3.0, 1.0)}, "low < high"),
        ({"sigma": (0.1, 1.0), "low": 0.2}, "beside other bounds"),
        ({"sigma": (0.1, 1.0), "logsnr": (0.2, 1.0)}, "beside other bounds"),
        ({"logsnr": (-1.0, 1.0), "sigma_data": 0.5}, "sigma_data is 0.5"),
        ({"low": 0.1, "sigma_data": 0.0}, "sigma_data is 0.0"),
        ({"variable": "steps"}, "variable is 'steps'"),
    ],
    ids=str,
)
def test_wrong_bounds_are_refused_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Interval(CFG(2.0), **arguments)


MULTISTEP = (
    DPMSolverPP("2M"),
    DPMSolverPP("3M"),
    UniPC(2),
    AdamsBashforth.lms(3),
    AdamsBashforth.ipndm(4),
    AdamsBashforth.flow(2),
    AdamsMoulton(2),
    AdamsMoulton(3, every=10),
    GradientEstimation(1.5),
)


@pytest.mark.parametrize("sampler", MULTISTEP, ids=str)
def test_no_polynomial_goes_through_both_sides_of_a_bound(sampler):
    """At 32 and 64 steps knots lie close to a bound; extrapolation across it errs by tenths."""
    errors = [
        (draw(RULE, UniformBlend(1.25, 0.5), n, sampler).x - fine()).norm(dim=1).median()
        for n in (32, 64)
    ]
    assert errors[1] < errors[0] / 3
    assert errors[1] < 3e-3


@pytest.mark.parametrize("around", ("corrector", "restart", "repaint"))
def test_a_wrapped_sampler_drops_its_history_at_a_bound_too(around):
    inner = DPMSolverPP("2M")
    sampler = {
        "corrector": PredictorCorrector(inner, corrections=0),
        "restart": Restart(inner, ()),
        "repaint": RePaint(inner, torch.zeros(2), torch.zeros(2, dtype=torch.bool), resamplings=1),
    }[around]
    grid = UniformBlend(1.25, 0.5)
    assert torch.equal(draw(RULE, grid, 32, sampler).x, draw(RULE, grid, 32, inner).x)


@cache
def fine():
    """The guided flow, nearly exact."""
    return draw(RULE, UniformBlend(1.25, 0.5), 1000).x
