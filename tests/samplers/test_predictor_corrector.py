"""Langevin correctors preserve the exact marginal, and predictor-corrector guidance has the limits
of its paper.
"""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverSDE, PredictorCorrector, Restart
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from tests.helpers.oracles import Pair, covariance, gaussian, mixture

NOISE = Noise(torch.arange(4), (2,), dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
COV = covariance(0.8, 0.2, 0.7)


@pytest.mark.parametrize("snr", (None, 0.16, 0.5))
def test_a_correction_is_a_langevin_step_with_reduced_noise(snr):
    """x + τ σ² s + √(2τ - τ²) σ z, s = -ε/σ, at the level that the predictor reached."""
    oracle = mixture()
    t, s, _ = knots = Explicit((-2.0, -1.0, 1.0)).knots(oracle.process.schedule, 2)
    sampler = PredictorCorrector(DDIM(), 1, snr)
    state = sampler.advance(
        sampler.start(NOISE.start(), knots, NOISE), oracle(NOISE.start(), t), NOISE
    )
    prediction = oracle(state.x, s)
    after = sampler.advance(state, prediction, NOISE)
    tau = 1 - s.sigma / s.alpha * t.alpha / t.sigma if snr is None else 2 * snr**2
    z = (after.x - state.x - tau * s.sigma**2 * (-prediction.eps / s.sigma)) / (
        s.sigma * math.sqrt(2 * tau - tau**2)
    )
    torch.testing.assert_close(z, NOISE.branch(1).step(1), rtol=1e-10, atol=1e-10)
    assert (after.level, after.remaining, after.step) == (state.level, state.remaining, state.step)


def corrected_covariance(oracle, level, ratio, count):
    """Covariance after `count` corrections at one level, from the exact marginal there."""
    sampler = PredictorCorrector(snr=math.sqrt((1 - ratio) / 2))
    cov = level.alpha**2 * COV + level.sigma**2 * EYE
    A, B = [], []
    for x, z in ((EYE, 0 * EYE), (0 * EYE, EYE)):
        prediction = oracle(x, level)
        zero = oracle(torch.zeros(1, 2, dtype=torch.float64), level)
        linear = Prediction(prediction.x0 - zero.x0, prediction.eps - zero.eps)
        (A if z.sum() == 0 else B).append(corrected(sampler, linear, level, z).mT)
    for _ in range(count):
        cov = A[0] @ cov @ A[0].mT + B[0] @ B[0].mT
    return cov


def corrected(sampler, prediction, level, z):
    """x after one correction of z at the level, with the noise z."""

    class FixedNoise:
        def branch(self, index):
            return self

        def between(self, t, s, step):
            return z

    state = sampler.start(z, (level, Cosine().at(9.0)), FixedNoise())
    pending = state.memory._replace(corrections=1)
    return sampler.advance(
        type(state)(z, level, state.remaining, 1, pending), prediction, FixedNoise()
    ).x


@pytest.mark.parametrize("logsnr", (-2.0, 1.0, 5.0))
def test_many_corrections_preserve_the_marginal_in_the_limit_of_small_steps(logsnr):
    """In the limit each variance V becomes V (1+ρ)/(2 - (1-ρ) σ²/V), a bias below (1-ρ)/2."""
    oracle = gaussian([1.0, -0.5], COV)
    level = oracle.process.schedule.at(logsnr)
    exact = level.alpha**2 * COV + level.sigma**2 * EYE
    for ratio in (0.9, 0.95):
        eigenvalues = torch.linalg.eigvalsh(corrected_covariance(oracle, level, ratio, 20000))
        V = torch.linalg.eigvalsh(exact)
        torch.testing.assert_close(
            eigenvalues, V * (1 + ratio) / (2 - (1 - ratio) * level.sigma**2 / V), rtol=1e-9, atol=0
        )
        assert ((eigenvalues / V - 1).abs() <= (1 - ratio) / 2).all()


def test_a_point_mass_is_preserved_exactly_by_any_step():
    """For a point mass V = σ², so that (1+ρ)/(2 - (1-ρ)) = 1."""
    level = Cosine().at(0.0)
    z = NOISE.start()
    prediction = Prediction(torch.ones(4, 2, dtype=torch.float64), z)
    for snr in (0.16, 0.7):
        A = corrected(
            PredictorCorrector(snr=snr),
            Prediction(prediction.x0, EYE[:1].expand(4, 2)),
            level,
            0 * z,
        )
        rho = 1 - 2 * snr**2
        torch.testing.assert_close(
            A, level.alpha * prediction.x0 + level.sigma * rho * EYE[:1].expand(4, 2)
        )


@pytest.mark.parametrize("corrections", (0, 1, 3))
@pytest.mark.parametrize("predictor", (DDIM(), AlphaBlending(2), DPMSolverSDE(2)), ids=str)
def test_the_number_of_evaluations_is_exact(predictor, corrections):
    oracle, sampler = mixture(), PredictorCorrector(predictor, corrections)
    for steps in (1, 2, 5):
        knots = Trailing().knots(oracle.process.schedule, steps)
        x, evaluations = integrate(oracle, sampler, NOISE.start(), knots, NOISE)
        assert (
            evaluations
            == sampler.evaluations(knots)
            == predictor.evaluations(knots) + corrections * (steps - 1)
        )
        if corrections == 0 and predictor == AlphaBlending(2):
            assert torch.equal(x, integrate(oracle, predictor, NOISE.start(), knots, NOISE)[0])


BASIS = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
LABELS = torch.zeros(2, dtype=torch.int64)
UNIT = SimpleNamespace(between=lambda t, s, step: BASIS.flip(0), branch=lambda index: UNIT)


@cache  # all corrections at a knot have the same linear prediction
def predicted(w, level):
    return guided_prediction(Pair(), CFG(w), BASIS, level, LABELS, None)[0]


def propagated_variance(sampler, w, steps):
    """The variance at λ = 12 from the one at λ = -12.

    Each advance is A x + B z. Sample 0, with x = 1 and z = 0, gives A; sample 1 gives B.
    """
    knots = Explicit(tuple(-12 + 24 * i / steps for i in range(steps + 1))).knots(Flow(), steps)
    state, variance = sampler.start(BASIS, knots, UNIT), knots[0].alpha ** 2 + knots[0].sigma ** 2
    while not state.done:
        state = replace(state, x=BASIS)
        prediction = predicted(w if sampler.uses_guidance(state) else 1.0, state.level)
        state = sampler.advance(state, prediction, UNIT)
        A, B = state.x.flatten().tolist()
        variance = A**2 * variance + B**2
    return variance / knots[-1].alpha ** 2


def variance(sampler, w, steps):
    """Variance of the guided samples, extrapolated twice to vanishing steps."""
    return (
        8 * propagated_variance(sampler, w, steps)
        - 6 * propagated_variance(sampler, w, steps // 2)
        + propagated_variance(sampler, w, steps // 4)
    ) / 3


@pytest.mark.parametrize("w", (1.5, 2.0, 3.0))
def test_pcg_with_one_correction_is_cfg_in_the_limit_of_the_sde(w):
    """CFG(2w-1) on the corrector is CFG(w) of the SDE (2408.09000, theorem 3)."""
    sde = (2 - 2 ** (2 - 2 * w)) / (2 * w - 1)
    assert variance(DDIM(1.0), w, 160) == pytest.approx(sde, rel=3e-3)
    assert variance(
        PredictorCorrector(DDIM(), 1, guides="corrector"), 2 * w - 1, 160
    ) == pytest.approx(sde, rel=3e-3)


@pytest.mark.parametrize(("corrections", "expected"), ((1, 0.75), (10, 0.674), (100, 0.667)))
def test_more_corrections_approach_the_powered_density(corrections, expected):
    """p_c^γ p_u^(1-γ) has the variance 2/(γ+1) = 0.6667 for γ = 2.

    At K = 1 the variance is 0.75, that of CFG(1.5) of the SDE.
    """
    pcg = PredictorCorrector(DDIM(), corrections, guides="corrector")
    assert variance(pcg, 2.0, 160) == pytest.approx(expected, abs=1e-3)


def test_with_guidance_on_the_corrector_the_predictor_needs_no_reference():
    labels, knots = torch.zeros(4, dtype=torch.int64), Trailing().knots(Flow(), 6)
    noise = Noise(torch.arange(4), (1,), dtype=torch.float64)
    for guides, expected in (("both", 2 * (6 + 2 * 5)), ("corrector", 6 + 2 * 2 * 5)):
        sampler = PredictorCorrector(DDIM(), 2, guides=guides)
        assert (
            integrate(Pair(), sampler, noise.start(), knots, noise, CFG(3.0), labels)[1] == expected
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corrections": -1}, "corrections is"),
        ({"snr": 0.0}, "snr is"),
        ({"snr": 0.8}, "snr is"),
        ({"guides": "predictor"}, "guides is"),
        ({"inner": Restart()}, r"put the corrector inside it, Restart\(PredictorCorrector"),
    ],
)
def test_options_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrector(**arguments)
