"""Adaptive projected guidance: the paper's pseudo-code, its identities, its memory."""

import math
from typing import get_args

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, PredictionType
from diffcore.guidance import APG, CFG, GuidanceInput, Step
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import guided_prediction, integrate, watch
from diffcore.schedules import Trailing, UniformLogSNR
from tests.helpers.oracles import ExactNetwork, Pair, mixture, process

NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
ORACLE = mixture()
KNOTS = UniformLogSNR(-4.0, 4.0).knots(ORACLE.process.schedule, 8)
SETTINGS = [  # w, η, β, r
    (4.0, 0.0, -0.5, 0.4),
    (4.0, 1.0, -0.75, math.inf),
    (0.5, 0.3, 0.0, 0.2),
    (9.0, 0.0, 0.25, 1.0),
]


def published(w, eta, beta, radius, x):
    """Algorithm 1 of the paper around DDIM; norms and products are those of each sample."""
    buffer = 0.0
    for t, s in zip(KNOTS, KNOTS[1:], strict=False):
        cond, uncond = ORACLE(x, t, LABELS).x0, ORACLE(x, t).x0
        buffer = (cond - uncond) + beta * buffer
        diff = buffer
        if math.isfinite(radius):
            length = torch.linalg.vector_norm(diff, dim=1)
            diff = diff * torch.minimum(torch.ones(len(x)), radius / length)[:, None]
        unit = cond / torch.linalg.vector_norm(cond, dim=1)[:, None]
        parallel = torch.einsum("bd,bd->b", diff, unit)[:, None] * unit
        x0 = cond + (w - 1) * ((diff - parallel) + eta * parallel)
        x = s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma
    return x


@pytest.mark.parametrize(("w", "eta", "beta", "radius"), SETTINGS)
@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_apg_is_the_algorithm_of_the_paper_for_each_prediction_type(
    prediction, w, eta, beta, radius
):
    record = process(prediction=prediction)
    network = Denoiser(ExactNetwork(mixture(record), record), record)
    x, _ = integrate(
        network,
        DDIM(),
        3 * NOISE.start(),
        KNOTS,
        NOISE,
        APG(w, eta=eta, momentum=beta, threshold=radius),
        LABELS,
    )
    torch.testing.assert_close(
        x, published(w, eta, beta, radius, 3 * NOISE.start()), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(("w", "eta", "beta", "radius"), SETTINGS)
def test_one_evaluation_is_that_of_diffusers_on_x0_in_its_original_formulation(
    w, eta, beta, radius
):
    level = ORACLE.process.schedule.at(-1.0)
    x = 2 * NOISE.start()
    guided, _, _ = guided_prediction(
        ORACLE, APG(w, eta=eta, momentum=beta, threshold=radius), x, level, LABELS, None
    )
    cond, uncond = ORACLE(x, level, LABELS).x0, ORACLE(x, level).x0
    theirs = normalized_guidance(
        cond,
        uncond,
        w - 1,
        MomentumBuffer(beta),
        eta,
        radius if math.isfinite(radius) else 0.0,
        True,
    )
    torch.testing.assert_close(guided.x0, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("logsnr", (-3.0, 0.0, 3.0))
def test_eta_1_without_clip_and_momentum_is_cfg(logsnr):
    level = ORACLE.process.schedule.at(logsnr)
    x = 2 * NOISE.start()
    ours, _, _ = guided_prediction(ORACLE, APG(5.0, eta=1.0, momentum=0.0), x, level, LABELS, None)
    cfg, _, _ = guided_prediction(ORACLE, CFG(5.0), x, level, LABELS, None)
    torch.testing.assert_close(ours.x0, cfg.x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.eps, cfg.eps, rtol=0, atol=1e-10)


def test_momentum_differs_from_none_from_the_second_step_on():
    paths = [
        list(
            watch(ORACLE, DDIM(), 3 * NOISE.start(), KNOTS, NOISE, APG(4.0, momentum=beta), LABELS)
        )
        for beta in (0.0, -0.5)
    ]
    same = [torch.equal(a.x, b.x) for a, b in zip(*paths, strict=True)]
    assert same == [True, True] + [False] * (len(same) - 2)


def test_the_radius_bounds_the_update_of_each_sample():
    level, x = ORACLE.process.schedule.at(0.0), 2 * NOISE.start()
    guided, _, _ = guided_prediction(
        ORACLE, APG(3.0, eta=1.0, momentum=0.0, threshold=0.1), x, level, LABELS, None
    )
    cond, uncond = ORACLE(x, level, LABELS).x0, ORACLE(x, level).x0
    expected = 2 * (cond - uncond).norm(dim=1).clamp(max=0.1)
    torch.testing.assert_close((guided.x0 - cond).norm(dim=1), expected, rtol=1e-9, atol=0)
    assert (expected == 0.2).any()


def test_a_relative_radius_is_the_same_at_each_resolution():
    """Tiling a sample k times multiplies its norm by √k; the update stays the same."""
    record = process(shape=(1, 4, 4))
    level = record.schedule.at(0.0)
    small = [
        value[None, None].expand(3, 1, 4, 4) * torch.arange(1, 4)[:, None, None, None]
        for value in NOISE_PAIR
    ]
    large = [value.repeat(1, 1, 2, 2) for value in small]
    updates = []
    for cond, ref in (small, large):
        zeros = torch.zeros_like(cond)
        inputs = GuidanceInput(
            zeros,
            Step(record, level, level, level),
            Prediction(cond, zeros),
            (Prediction(ref, zeros),),
        )
        guided, _ = APG(3.0, momentum=0.0, threshold=0.3, relative=True).combine(inputs, None)
        updates.append(guided.x0 - cond)
    torch.testing.assert_close(updates[1], updates[0].repeat(1, 1, 2, 2), rtol=1e-9, atol=1e-12)
    assert updates[0].flatten(1).norm(dim=1).max() <= 2 * 0.3 * 4 + 1e-9


NOISE_PAIR = (
    torch.linspace(-1, 2, 16).double().view(4, 4),
    torch.linspace(3, -1, 16).double().view(4, 4),
)


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_in_one_dimension_everything_is_parallel(eta):
    """APG is then CFG with w' = 1 + η (w - 1), whose variance is 2^(1-w')."""
    pair, noise = Pair(), Noise(torch.arange(3), (1,), dtype=torch.float64)
    knots, labels = Trailing().knots(pair.process.schedule, 200), torch.zeros(3, dtype=torch.int64)
    x, _ = integrate(
        pair, AlphaBlending(2), noise.start(), knots, noise, APG(3.0, eta=eta, momentum=0.0), labels
    )
    torch.testing.assert_close(
        (x / noise.start()) ** 2, torch.full_like(x, 2 ** (-2 * eta)), rtol=2e-4, atol=0
    )


def test_samples_whose_predictions_agree_or_are_0_stay_finite():
    level, zero = ORACLE.process.schedule.at(0.0), torch.zeros(2, 2)
    inputs = GuidanceInput(
        zero,
        Step(ORACLE.process, level, level, level),
        Prediction(zero, zero),
        (Prediction(zero, zero),),
    )
    guided, _ = APG(4.0, threshold=1.0).combine(inputs, None)
    assert torch.equal(guided.x0, zero)
    assert torch.equal(guided.eps, zero)


def test_the_preset_has_the_published_radius_and_momentum():
    assert APG.sdxl(9.0) == APG(9.0, eta=0.0, momentum=-0.5, threshold=15.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"eta": math.inf}, "eta is inf"),
        ({"momentum": -1.0}, "momentum is -1.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": math.nan}, "threshold is nan"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        APG(**arguments)
