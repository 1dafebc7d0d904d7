"""Each deterministic sampler equals its published formula in every scaling, with every prediction
type, and at both ends.
"""

import math
from itertools import product

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AlphaBlending,
    DPMSolverPP,
    Euler,
    GradientEstimation,
    Heun,
    TunedMultistep,
    UniPC,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Karras, Level, Trailing
from tests.helpers import sampler_formulas as formulas
from tests.helpers.oracles import PREDICTION_TYPES, SCALINGS, ExactNetwork, mixture, process
from tests.samplers.test_orders import ORDERS

FORMULAS = {
    DDIM(): formulas.euler,
    Euler(): formulas.euler,
    AlphaBlending(1): formulas.euler,
    DPMSolverPP("1"): formulas.euler,
    AdamsBashforth.lms(1): formulas.euler,
    Heun(): formulas.heun,
    DPMSolverPP("2S"): formulas.singlestep,
    DPMSolverPP("2M"): formulas.multistep_2,
    DPMSolverPP("3M"): formulas.multistep_3(2),
    DPMSolverPP("3M published"): formulas.multistep_3(1),
    **{AdamsBashforth.lms(k): formulas.adams(k, "eps", formulas.u) for k in (2, 3, 4, 5)},
    **{AdamsBashforth.deis(k): formulas.adams(k, "eps", lambda logsnr: logsnr) for k in (2, 3, 4)},
    **{AdamsBashforth.deis(k, "t"): formulas.adams(k, "eps", formulas.cosine_time) for k in (2, 3)},
    **{
        AdamsBashforth(k, "x0", "logsnr"): formulas.adams(k, "x0", lambda logsnr: logsnr)
        for k in (2, 3, 5)
    },
    **{AdamsBashforth.ipndm(k): formulas.ipndm(k) for k in (2, 4)},
    **{UniPC(p, B): formulas.unipc(p, B) for p in (1, 2, 3) for B in ("bh1", "bh2")},
    **{
        AdamsMoulton(2, held, "logsnr"): formulas.moulton(2, held, lambda logsnr: logsnr)
        for held in formulas.SCALES
    },
    AdamsMoulton(2, "eps", "u"): formulas.moulton(2, "eps", formulas.u),
    AdamsMoulton(3, "x0", "t"): formulas.moulton(3, "x0", formulas.cosine_time),
    AdamsMoulton(3, "eps", "index"): formulas.moulton(3, "eps", None),
    GradientEstimation(): formulas.gradient_estimation(2.0),
    GradientEstimation(1.5): formulas.gradient_estimation(1.5),
}
IN_A = {AdamsBashforth.flow(k): formulas.flow(k) for k in (2, 3, 4, 5)}
IN_A |= {AdamsMoulton(k): formulas.flow_moulton(k) for k in (1, 2, 3, 4)}
IN_A |= {
    AdamsMoulton(3, every=2): lambda v, z, a: formulas.flow_moulton(min(3, 1 + (len(a) - 1) // 2))(
        v, z, a
    )
}
GRIDS = [
    *((Trailing(), n) for n in (1, 2, 3, 5)),  # from α = 0
    (Karras(), 3),
    (Explicit((-5.0, -3.2, -1.0, 0.5, 2.5, 3.0)), 5),
    (Explicit((3.0, 2.0, 1.2, 0.0, -2.5)), 4),  # towards noise
]
NOISE = Noise(torch.arange(4), (2,), dtype=torch.float64)
ORACLE = mixture()


def D(y, logsnr):
    return ORACLE(y, Cosine(scaling="ve").at(logsnr)).pair


def expected(formula, knots):
    """x at the last knot, from standard noise times n at the first, n² = α²/4 + σ²."""
    noise, last, logsnrs, past = NOISE.start(), knots[-1], [knot.logsnr for knot in knots], []
    if knots[0].alpha == 0:  # the first-order step, whose value is not kept
        x0, eps = ORACLE(noise, knots[0])
        if last is knots[1]:
            return x0
        y, logsnrs, past = x0 + formulas.u(logsnrs[1]) * eps, logsnrs[1:], [(1.0, eps)]
    else:
        y = math.hypot(0.5, formulas.u(logsnrs[0])) * noise
    finite = [logsnr for logsnr in logsnrs if logsnr < math.inf]
    y = formula(D, y, finite, past)
    return last.alpha * y if len(finite) == len(logsnrs) else D(y, finite[-1])[0]


def expected_in_a(formula, knots):
    """x at the last knot for the forms that hold ε - x_0."""
    first, last = knots[0], knots[-1]

    def velocity(z, a):
        logsnr = math.inf if a == 0 else -math.inf if a == 1 else 2 * math.log((1 - a) / a)
        x0, eps = ORACLE(z, Level(logsnr, a, 1 - a, a, Flow()))
        return eps - x0

    z = math.hypot(first.alpha / 2, first.sigma) / (first.alpha + first.sigma) * NOISE.start()
    return (last.alpha + last.sigma) * formula(
        velocity, z, [formulas.a(knot.logsnr) for knot in knots]
    )


def test_every_deterministic_sampler_has_a_formula():
    """The midpoint rule is tested in test_blending, tuned coefficients in test_tuned_multistep."""
    plain = {sampler for sampler in ORDERS if not isinstance(sampler, TunedMultistep)}
    assert {*FORMULAS, *IN_A, AlphaBlending(2)} == plain


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(True, id="each process on one grid"),
        pytest.param(False, id="all processes on all grids", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("sampler", [*FORMULAS, *IN_A], ids=str)
def test_a_run_equals_the_formula_or_is_rejected(sampler, spread):
    """A process is a scaling with a prediction type."""
    for number, (grid, n) in enumerate(GRIDS):
        knots = grid.knots(Cosine(), n)
        reference = (
            expected_in_a(IN_A[sampler], knots)
            if sampler in IN_A
            else expected(FORMULAS[sampler], knots)
        )
        begins_at_noise = isinstance(grid, Trailing)
        predictions = PREDICTION_TYPES if begins_at_noise else ("v_prediction", "epsilon")
        processes = list(product(SCALINGS, predictions))
        kept = slice(number % 4, None, 4 if begins_at_noise else 3) if spread else slice(None)
        for scaling, prediction in processes[kept]:
            check(sampler, grid.knots(Cosine(scaling=scaling), n), prediction, reference)


def check(sampler, knots, prediction, reference):
    first, last = knots[0], knots[-1]
    record = process(first.schedule, prediction=prediction)
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    if first.logsnr == -math.inf and (prediction == "epsilon" or record.schedule.scaling == "ve"):
        with pytest.raises(ValueError, match="pure noise"):
            integrate(denoiser, sampler, NOISE.start(), knots, NOISE)
        return
    x, evaluations = integrate(
        denoiser, sampler, math.hypot(first.alpha / 2, first.sigma) * NOISE.start(), knots, NOISE
    )
    x = x / math.hypot(last.alpha, last.sigma)  # as in vp
    torch.testing.assert_close(
        x, reference, rtol=1e-7, atol=1e-8, msg=lambda m: f"{prediction}, {knots}: {m}"
    )
    assert evaluations == sampler.evaluations(knots)
