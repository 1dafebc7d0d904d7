"""AdaptiveGuidance stops once both predictions agree; LinearAG predicts the reference."""

import math
from typing import get_args

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import PredictionType
from diffcore.guidance import APG, CFG, AdaptiveGuidance, LinearAG
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate, watch
from diffcore.schedules import Trailing, UniformLogSNR
from tests.helpers.oracles import ExactNetwork, Pair, mixture, process

RECORD = process()
ORACLE = mixture(RECORD)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
KNOTS = UniformLogSNR(-6.0, 6.0).knots(RECORD.schedule, 24)
START = NOISE.first_sample(KNOTS[0], 0.5)


def ddim_per_sample(w, threshold):
    """DDIM of each sample alone, guided until the cosine of v has reached the threshold once."""
    results, stops = [], []
    for x, label in zip(START[:, None], LABELS[:, None], strict=True):
        stopped = None
        for i, (t, s) in enumerate(zip(KNOTS, KNOTS[1:], strict=False)):
            c, u = ORACLE(x, t, label), ORACLE(x, t)
            guided_x0 = c.x0 if stopped is not None else u.x0 + w * (c.x0 - u.x0)
            v_c, v_u = (t.alpha * p.eps - t.sigma * p.x0 for p in (c, u))
            if stopped is None and (v_c * v_u).sum() / (v_c.norm() * v_u.norm()) >= threshold:
                stopped = i
            x = s.alpha * guided_x0 + s.sigma * (x - t.alpha * guided_x0) / t.sigma
        results.append(x)
        stops.append(stopped)
    return torch.cat(results), stops


@pytest.mark.parametrize("threshold", (0.9, 0.99, 0.999))
def test_each_sample_is_guided_until_its_own_predictions_agree(threshold):
    x, _ = integrate(
        ORACLE, DDIM(), START, KNOTS, NOISE, AdaptiveGuidance(CFG(3.0), threshold), LABELS
    )
    expected, stops = ddim_per_sample(3.0, threshold)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)
    assert len(set(stops)) > 1 or threshold == 0.9  # samples stop at different steps


def test_the_reference_is_evaluated_until_the_last_sample_agrees():
    rule = AdaptiveGuidance(CFG(3.0), 0.9)
    _, stops = ddim_per_sample(3.0, 0.9)
    network = ExactNetwork(mixture(RECORD), RECORD)
    _, evaluations = integrate(Denoiser(network, RECORD), DDIM(), START, KNOTS, NOISE, rule, LABELS)
    assert evaluations == 24 + max(stops) + 1
    assert evaluations < 48
    assert sum(len(x) for x, _, _ in network.calls) == 6 * evaluations


def test_evaluations_used_are_fewer_than_those_planned_and_smaller_batches_save_more():
    made = [
        sample(
            ORACLE,
            grid=UniformLogSNR(-6.0, 6.0),
            steps=24,
            seeds=range(12),
            condition=[0, 1] * 6,
            guidance=AdaptiveGuidance(CFG(3.0), 0.95),
            batch_size=size,
            dtype=torch.float64,
        )
        for size in (1, 12)
    ]
    assert made[0].evaluations < made[1].evaluations <= made[0].planned == made[1].planned == 48
    torch.testing.assert_close(made[0].x, made[1].x, rtol=0, atol=1e-10)


def test_at_high_noise_the_cosine_is_near_1_on_eps_and_not_on_v():
    """Both ε are nearly x there, so ε would stop guidance at the first step."""
    inputs = next(watch(ORACLE, DDIM(), START, KNOTS, NOISE, CFG(3.0), LABELS))
    assert AdaptiveGuidance.cosine_in("epsilon", inputs).min() > 0.99
    assert AdaptiveGuidance(CFG(3.0)).cosine(inputs).min() < 0.9


@pytest.mark.parametrize("space", ("v_prediction", "sample"))
def test_the_cosine_is_that_of_its_space(space):
    for inputs in list(watch(ORACLE, DDIM(), START, KNOTS, NOISE, CFG(3.0), LABELS))[::6]:
        level, pairs = inputs.step.level, (inputs.conditional, *inputs.references)
        c, u = (
            p.x0 if space == "sample" else level.alpha * p.eps - level.sigma * p.x0 for p in pairs
        )
        expected = (c * u).sum(1) / (c.norm(dim=1) * u.norm(dim=1))
        torch.testing.assert_close(AdaptiveGuidance(CFG(3.0), space=space).cosine(inputs), expected)


def test_the_memory_of_apg_inside_is_passed_on():
    made = [
        integrate(ORACLE, DDIM(), START, KNOTS, NOISE, rule, LABELS)[0]
        for rule in (AdaptiveGuidance(APG(3.0, momentum=-0.5), 1.0), APG(3.0, momentum=-0.5))
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": math.nan}, "nan"),
        ({"space": "epsilon"}, "space is"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(CFG(2.0), **arguments)


def gaussian_run(rule, seeds, pair=Pair(0.5)):  # of variance 1 the vp process has v = 0
    noise = Noise(torch.tensor(seeds), (1,), dtype=torch.float64)
    knots, labels = (
        Trailing().knots(pair.process.schedule, 12),
        torch.zeros(len(seeds), dtype=torch.int64),
    )
    return pair, DDIM(), noise.start(), knots, noise, rule, labels


@pytest.mark.parametrize("space", get_args(PredictionType))
def test_linear_ag_is_exact_where_predictions_are_linear(space):
    """On two Gaussians F_ref is a multiple of F_c at each level, so a fit holds for other seeds."""
    fitted = LinearAG.fit(CFG(3.0), watch(*gaussian_run(CFG(3.0), [1, 2, 3, 4])), space=space)
    assert fitted.space == space
    assert [bool(row) for row in fitted.coefficients] == [i in (1, 3, 5) for i in range(12)]
    ours, used = integrate(*gaussian_run(fitted, [7, 8, 9]))
    full, all_ = integrate(*gaussian_run(CFG(3.0), [7, 8, 9]))
    torch.testing.assert_close(ours, full, rtol=1e-7, atol=1e-9)
    assert (used, all_) == (24 - 3, 24)


def test_linear_ag_on_a_mixture_halves_the_error_of_leaving_the_reference_out():
    """The fit holds for other seeds, and later predictions read predicted references."""
    noise = Noise(torch.arange(100, 140), (2,), dtype=torch.float64)
    x, labels = noise.first_sample(KNOTS[0], 0.5), torch.arange(40) % 2
    many = Noise(torch.arange(200, 300), (2,), dtype=torch.float64)
    path = watch(
        ORACLE,
        DDIM(),
        many.first_sample(KNOTS[0], 0.5),
        KNOTS,
        many,
        CFG(3.0),
        torch.arange(100) % 2,
    )
    fitted = LinearAG.fit(CFG(3.0), path, skip=range(1, 12, 2), depth=2)
    as_conditional = LinearAG(
        CFG(3.0), tuple((0.0, 1.0) if row else () for row in fitted.coefficients)
    )
    results = [
        integrate(ORACLE, DDIM(), x, KNOTS, noise, rule, labels)
        for rule in (fitted, as_conditional, CFG(3.0))
    ]
    error, naive = ((result[0] - results[2][0]).norm(dim=1).mean() for result in results[:2])
    assert error < 0.5 * naive
    assert [evaluations for _, evaluations in results] == [42, 42, 48]


def test_coefficients_are_those_of_least_squares():
    path = list(watch(ORACLE, DDIM(), START, KNOTS, NOISE, CFG(3.0), LABELS))
    row = LinearAG.fit(CFG(3.0), path, skip=[1], depth=2).coefficients[1]
    pairs = [
        [level.alpha * p.eps - level.sigma * p.x0 for p in (inputs.conditional, *inputs.references)]
        for inputs in path[:2]
        for level in [inputs.step.level]
    ]
    assert len(row) == 4  # one past step is all there is
    predicted = row[0] + row[1] * pairs[1][0] + row[2] * pairs[0][0] + row[3] * pairs[0][1]
    residual = (pairs[1][1] - predicted).flatten()
    for column in (torch.ones(12).double(), pairs[1][0], pairs[0][0], pairs[0][1]):
        assert abs(residual @ column.flatten()) < 1e-10


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (((), (0.1,)), "step 1"),
        (((), (0.1, math.inf)), "finite"),
        (((), (0.0, 1.0, 0.1, 0.1, 0.1, 0.1)), "at most 4"),
    ],
    ids=str,
)
def test_wrong_coefficients_are_refused(coefficients, message):
    with pytest.raises(ValueError, match=message):
        LinearAG(CFG(2.0), coefficients)


def test_another_number_of_steps_and_two_evaluations_a_step_are_refused():
    rule = LinearAG(CFG(2.0), ((),) * 24)
    with pytest.raises(ValueError, match="fitted for 24 steps and this run has 12"):
        sample(ORACLE, steps=12, seeds=[1], condition=[0], guidance=rule)
    with pytest.raises(ValueError, match=r"one evaluation per step.*DDIM"):
        sample(ORACLE, AlphaBlending(2), steps=24, seeds=[1], condition=[0], guidance=rule)
    from_noise = LinearAG(CFG(2.0), ((0.0, 1.0), (), ()), "epsilon")
    with pytest.raises(ValueError, match="LinearAG works on epsilon"):
        sample(ORACLE, steps=3, seeds=[1], condition=[0], guidance=from_noise)


def test_a_gap_in_the_history_is_refused():
    """At a step with w = 1 no reference is evaluated, so the terms of that step are missing."""
    last = KNOTS[3].logsnr - 1e-6
    for scale, rows in (
        (lambda logsnr: 1.0 if logsnr < last else 3.0, 3),
        (lambda logsnr: 1.0 + (logsnr != KNOTS[2].logsnr), 3),
    ):
        rule = LinearAG(CFG(scale), (*((),) * rows, (0.0, 0.9, 0.1, 0.1), *((),) * (23 - rows)))
        with pytest.raises(
            ValueError, match=r"reads 1 past steps at step 3.* at 0 of them: use a rule that does"
        ) as caught:
            integrate(ORACLE, DDIM(), START, KNOTS, NOISE, rule, LABELS)
        assert "\n" not in str(caught.value)
    rule = LinearAG(
        CFG(lambda logsnr: 1.0 if logsnr < last else 3.0),
        (*((),) * 4, (0.0, 0.9, 0.1, 0.1), *((),) * 19),
    )
    assert integrate(ORACLE, DDIM(), START, KNOTS, NOISE, rule, LABELS)[1] == 24 + 20


def test_adaptive_guidance_stops_linear_ag_before_its_history_is_complete():
    """At threshold -0.99 all samples agree at once; later predicted references have no effect."""
    rule = LinearAG(CFG(3.0), (*((),) * 4, (0.0, 0.9, 0.1, 0.1, 0.2, 0.2), *((),) * 19))
    x, used = integrate(ORACLE, DDIM(), START, KNOTS, NOISE, AdaptiveGuidance(rule, -0.99), LABELS)
    plain, _ = integrate(
        ORACLE, DDIM(), START, KNOTS, NOISE, AdaptiveGuidance(CFG(3.0), -0.99), LABELS
    )
    assert torch.equal(x, plain)
    assert used == 25


def test_fitting_needs_the_reference_at_every_step():
    path = watch(ORACLE, DDIM(), START, KNOTS, NOISE, CFG(1.0), LABELS)
    with pytest.raises(ValueError, match="one reference at each step"):
        LinearAG.fit(CFG(2.0), path)
