"""Equalities between multistep samplers, their behaviour at both ends, and maps of levels."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import get_args

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AlphaBlending,
    DPMSolverPP,
    Euler,
    GradientEstimation,
    Heun,
    State,
    UniPC,
)
from diffcore.samplers.adams import HeldQuantity, Variable
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Karras, Trailing, UniformBlend
from tests.helpers.oracles import SCALINGS, flow, mixture, process
from tests.helpers.products import sampled
from tests.samplers.test_base import SAMPLERS
from tests.samplers.test_orders import ORDERS

NOISE = Noise(torch.arange(64), (2,), dtype=torch.float64)
HELD_AND_VARIABLE = list(product(get_args(HeldQuantity), get_args(Variable)))


def integrate_from_noise(sampler, knots, oracle=None):
    oracle = oracle or mixture(process(knots[0].schedule))
    return integrate(oracle, sampler, knots[0].sigma * NOISE.start(), knots, NOISE)[0]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("grid", (Karras(), Trailing(), Explicit((4.0, 1.0, 0.0, -3.0))), ids=str)
def test_all_first_order_samplers_are_equal(grid, scaling):
    """DDIM, Euler, α-blending, DPM-Solver++(1) and each Adams-Bashforth(1) agree bit for bit."""
    if (grid, scaling) == (Trailing(), "ve"):
        pytest.skip("ve has no pure noise")
    knots = grid.knots(Cosine(scaling=scaling), 3 if isinstance(grid, Explicit) else 12)
    samplers = [AdamsBashforth(1, held, variable) for held, variable in HELD_AND_VARIABLE]
    samplers += [Euler(), AlphaBlending(1), DPMSolverPP("1"), GradientEstimation(1.0)]
    expected = integrate_from_noise(DDIM(), knots)
    assert all(torch.equal(integrate_from_noise(sampler, knots), expected) for sampler in samplers)


def knots_in_u(*u):
    return Explicit(tuple(-2 * math.log(value) for value in u)).knots(Cosine(), len(u) - 1)


@pytest.mark.parametrize(
    ("one", "other", "knots"),
    [
        (
            GradientEstimation(1.5),
            AdamsBashforth.lms(2),
            knots_in_u(*(5 - i / 4 for i in range(19))),
        ),
        (GradientEstimation(1.5), AdamsBashforth.ipndm(2), knots_in_u(30, 20, 7, 3, 2.5, 1, 0.1)),
        (
            DPMSolverPP("3M"),
            AdamsBashforth(3, "x0", "logsnr"),
            knots_in_u(30, 20, 7, 3, 2.5, 1, 0.1),
        ),
    ],
    ids=str,
)
def test_samplers_with_the_same_formula_are_equal(one, other, knots):
    torch.testing.assert_close(
        integrate_from_noise(one, knots), integrate_from_noise(other, knots), rtol=1e-11, atol=1e-11
    )


def test_the_order_2_predictor_of_unipc_is_dpm_solver_2m():
    """Adams-Bashforth(2) in (x_0, λ) has e^{-h} - 1 + h where these two have h (1 - e^{-h})/2."""
    t1, t, s = Explicit((-3.0, -1.0, 0.5)).knots(Cosine(), 2)
    x0, before, eps = NOISE.start(), NOISE.step(0), NOISE.step(1)

    def slope(sampler):
        state = sampler.advance(State(NOISE.step(2), t1, (t, s)), Prediction(before, eps), NOISE)
        if isinstance(sampler, UniPC):  # subtract the term of the corrector
            half = (
                s.sigma
                / t.sigma
                * t.alpha
                * (1 - t1.alpha * t.sigma / (t1.sigma * t.alpha))
                / 2
                * (x0 - before)
            )
            return (
                sampler.advance(state, Prediction(x0, eps), NOISE).x
                - Prediction(x0, eps).at(s)
                - half
            )
        return sampler.advance(state, Prediction(x0, eps), NOISE).x - Prediction(x0, eps).at(s)

    torch.testing.assert_close(slope(UniPC(2)), slope(DPMSolverPP("2M")), rtol=1e-11, atol=1e-11)
    h, flat = 0.75, -math.expm1(-0.75)
    ratio = (h - flat) / (h * flat / 2)
    exact = slope(AdamsBashforth(2, "x0", "logsnr"))
    torch.testing.assert_close(exact, ratio * slope(DPMSolverPP("2M")), rtol=1e-11, atol=1e-11)


def test_unipc_is_adams_moulton_for_x0_over_logsnr_except_for_its_secants():
    """From the third step on, UniPC(3) predicts with three values and corrects with four.

    The test begins this step with equal states and memory.
    """
    levels = Explicit((-3.0, -2.2, -1.0, 0.0, 0.9, 2.0)).knots(Cosine(), 5)
    unipc, moulton = (
        sampler.start(levels[0].sigma * NOISE.start(), levels, NOISE)
        for sampler in (UniPC(3), AdamsMoulton(3, "x0", "logsnr"))
    )
    for step in range(5):
        if step == 3:  # the steps before use secants; from here both have one state
            assert not torch.equal(unipc.x, moulton.x)
            moulton = replace(unipc, memory=type(moulton.memory)(3, *unipc.memory))
        unipc, moulton = (
            sampler.advance(state, mixture()(state.x, state.level), NOISE)
            for sampler, state in ((UniPC(3), unipc), (AdamsMoulton(3, "x0", "logsnr"), moulton))
        )
    torch.testing.assert_close(moulton.x, unipc.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("steps", "k"), [(1, 1), (9, 1), (10, 2), (19, 2), (20, 3), (40, 3)])
def test_a_run_of_few_steps_uses_fewer_values_with_the_option_every(steps, k):
    knots = UniformBlend(1.25, 0.5).knots(Cosine(), steps)
    x, _ = integrate(mixture(), AdamsMoulton(3, every=10), NOISE.start(), knots, NOISE)
    assert torch.equal(x, integrate(mixture(), AdamsMoulton(k), NOISE.start(), knots, NOISE)[0])


@cache
def clean_end():
    """The clean end of the exact flow from the noise at a = 0.9."""
    return flow(mixture(process(Flow())), 0.9 * NOISE.start(), Flow().level(0.9), Flow().level(0.0))


@pytest.mark.parametrize(
    "sampler", (AlphaBlending(2), Heun(), AdamsBashforth.lms(2), AdamsBashforth.flow(2)), ids=str
)
def test_order_2_holds_down_to_the_clean_level_on_uniform_a(sampler):
    errors = []
    for n in (128, 256):
        knots = tuple(Flow().level(0.9 * (n - i) / n) for i in range(n + 1))
        errors.append((integrate_from_noise(sampler, knots) - clean_end()).norm(dim=1).median())
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    ("held", "variable", "k"),
    sampled(get_args(HeldQuantity), get_args(Variable), (2, 3, 4, 5), count=20),
)
def test_k_predictions_integrate_polynomials_of_degree_below_k(held, variable, k):
    """For f = v^(k-1) in the variable of the method, the step is the exact integral."""
    logsnrs = (-3.0, -2.2, -1.5, -0.1, 0.8, 1.7)
    knots = Explicit(logsnrs).knots(Cosine(), 5)
    sampler = AdamsBashforth(k, held, variable)
    exact = {
        "u": lambda q: math.exp(-q / 2),
        "a": lambda q: 1 / (1 + math.exp(q / 2)),
        "logsnr": lambda q: q,
        "t": lambda q: 2 / math.pi * math.atan(math.exp(-q / 2)),
    }
    measure = {
        "eps": lambda q: math.exp(-q / 2),
        "x0": lambda q: math.exp(q / 2),
        "velocity": exact["a"],
    }[held]
    nodes = list(range(6)) if variable == "index" else [exact[variable](q) for q in logsnrs]
    state, one = (
        State(torch.zeros(1, 1), knots[0], knots[1:]),
        torch.ones(1, 1, dtype=torch.float64),
    )
    for node in nodes[:5]:
        f, zero = one * node ** (k - 1), 0 * one
        prediction = {
            "eps": Prediction(zero, f),
            "x0": Prediction(f, zero),
            "velocity": Prediction(-f, zero),
        }[held]
        state = sampler.advance(state, prediction, NOISE)
    correction = (state.x - prediction.at(knots[-1])).item()
    t, s = logsnrs[-2:]
    if variable == "index":
        integral = (measure(s) - measure(t)) * (5**k - 4**k) / k
    else:  # trapezoidal rule in m with 20,000 points
        q = torch.linspace(t, s, 20001, dtype=torch.float64).tolist()
        integral = sum(
            (exact[variable](a) ** (k - 1) + exact[variable](b) ** (k - 1))
            / 2
            * (measure(b) - measure(a))
            for a, b in pairwise(q)
        )
    flat = (measure(s) - measure(t)) * nodes[4] ** (k - 1)
    last = knots[-1]
    scale = {"eps": last.alpha, "x0": last.sigma, "velocity": last.alpha + last.sigma}[held]
    assert correction == pytest.approx(scale * (integral - flat), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (AdamsBashforth.lms(4), 0),
        (AdamsBashforth.deis(4), 0),
        (DPMSolverPP("3M"), 0),
        (AdamsBashforth.deis(4, "t"), 1),
        (AdamsBashforth.ipndm(4), 1),
        (AdamsBashforth.flow(4), 1),
    ],
    ids=str,
)
def test_the_prediction_at_pure_noise_is_kept_only_if_the_variable_is_finite(sampler, kept):
    knots = Trailing().knots(Flow(), 6)
    state, lengths = sampler.start(NOISE.start(), knots, NOISE), []
    while not state.done:
        state = sampler.advance(state, mixture(process(Flow()))(state.x, state.level), NOISE)
        lengths.append(len(state.memory))
    longest = 2 if isinstance(sampler, DPMSolverPP) else 3
    assert lengths == [min(i + kept, longest) for i in range(6)]


@pytest.mark.parametrize(
    "sampler", [sampler for sampler in SAMPLERS if sampler in ORDERS and sampler != DDIM()], ids=str
)
def test_each_sample_of_a_map_of_levels_has_its_own_knots(sampler):
    """With one float64 level per sample, each sample equals that of a run over its knots."""
    oracle, x = mixture(), NOISE.start()[:3]
    rows = [(-4.0, -2.5, -1.0, 0.0, 1.5), (-3.0, -2.0, -0.5, 0.2, 2.0), (-6.0, -1.0, 0.0, 3.0, 4.0)]
    alone = torch.cat(
        [
            integrate(oracle, sampler, x[i : i + 1], Explicit(row).knots(Cosine(), 4), NOISE)[0]
            for i, row in enumerate(rows)
        ]
    )
    knots = tuple(
        Cosine().at(torch.tensor(column, dtype=torch.float64)[:, None])
        for column in zip(*rows, strict=True)
    )
    together = sampler.start(x, knots, NOISE)
    while not together.done:
        together = sampler.advance(together, oracle(together.x, together.level), NOISE)
    torch.testing.assert_close(together.x, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdamsBashforth(0), "k is 0"),
        (lambda: AdamsBashforth(6), "k is 6"),
        (lambda: AdamsMoulton(5), "k is 5, expected 1 to 4"),
        (lambda: AdamsMoulton(3, every=-1), "every is -1, expected a number of steps"),
        (lambda: AdamsBashforth(2, "v"), "held is"),
        (lambda: AdamsBashforth(2, "eps", "sigma"), "variable is"),
        (lambda: DPMSolverPP("4M"), "variant is"),
        (lambda: UniPC(4), "p is 4"),
        (lambda: UniPC(2, "bh3"), "B is"),
        (lambda: GradientEstimation(0.0), "gamma is"),
        (lambda: GradientEstimation(2.0, 1.0), "mu is"),
    ],
)
def test_options_out_of_range_are_rejected(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("steps", "k"), ((8, 1), (12, 2), (19, 2), (20, 3)))
def test_a_sampler_that_forgets_keeps_the_number_of_values_of_its_run(steps, k):
    """With `every` a run of n steps uses 1 + n // every values, also after a change of guidance."""
    oracle, knots = mixture(), UniformBlend(1.25, 0.5).knots(Cosine(), steps)
    ends = []
    for sampler in (AdamsMoulton(3, every=10), AdamsMoulton(k)):
        state = sampler.start(NOISE.start(), knots, NOISE)
        while not state.done:
            state = sampler.advance(state, oracle(state.x, state.level), NOISE)
            if state.step == 3:
                state = sampler.forget(state)
        ends.append(state.x)
    assert torch.equal(*ends)
