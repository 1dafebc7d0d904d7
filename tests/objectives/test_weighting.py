"""Weights w(λ) of the x_0 error: published values, limits, independence of the target."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore.core.prediction import predict, target
from diffcore.objectives.weighting import (
    EDM,
    ELBO,
    MSE,
    P2,
    DebiasedWeight,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    Weight,
)
from diffcore.schedules import Cosine
from tests.helpers.oracles import PREDICTION_TYPES
from tests.helpers.products import sampled
from tests.helpers.weights import FAR_LEVELS, GOLDEN, LEVELS, S

inf = math.inf
CASES = [
    (weight, prediction_type, *row)
    for weight, table in GOLDEN.items()
    for prediction_type, row in table.items()
]
every_case = pytest.mark.parametrize(
    ("weight", "prediction_type", "formula", "noise", "clean"),
    CASES,
    ids=lambda v: str(v).partition(" at 0x")[0][:40],
)


@every_case
def test_the_weight_on_every_target_is_the_published_one(
    weight, prediction_type, formula, noise, clean
):
    levels = torch.cat((LEVELS, FAR_LEVELS))
    np.testing.assert_allclose(
        weight.target_weight(prediction_type, levels, S), formula(levels.exp().numpy()), rtol=1e-12
    )


def subclasses(parent):
    """All direct and indirect subclasses."""
    for child in parent.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_weight_is_in_the_golden_table_with_every_target():
    complete = {
        type(weight) for weight, rows in GOLDEN.items() if rows.keys() == set(PREDICTION_TYPES)
    }
    assert {
        child for child in subclasses(Weight) if child.__module__.startswith("diffcore")
    } == complete
    assert {weight.target for weight in GOLDEN if isinstance(weight, MSE)} == set(PREDICTION_TYPES)


# One row per prediction type (s = 0.5), with the values at SNR 0.25, 1, 20.
NUMBERS = [
    (
        MinSNR(),
        [
            [1, 1, 0.25],
            [0.25, 1, 5],
            [0.2, 0.5, 0.238095238095],
            [0.111111111111, 0.25, 0.166976843352],
            [0.0588235294118, 0.2, 0.208333333333],
        ],
    ),
    (
        SoftMinSNR(),
        [
            [0.941176470588, 0.8, 0.166666666667],
            [0.235294117647, 0.8, 3.33333333333],
            [0.188235294118, 0.4, 0.15873015873],
            [0.104575163399, 0.2, 0.111317895568],
            [0.0553633217993, 0.16, 0.138888888889],
        ],
    ),
    (
        SigmoidWeight(),
        [
            [0.967273443635, 0.880797077978, 0.269781334276],
            [0.241818360909, 0.880797077978, 5.39562668552],
            [0.193454688727, 0.440398538989, 0.256934604072],
            [0.107474827071, 0.220199269494, 0.180188942371],
            [0.0568984378609, 0.176159415596, 0.224817778563],
        ],
    ),
    (
        TruncatedSNR(),
        [
            [4, 1, 1],
            [1, 1, 20],
            [0.8, 0.5, 0.952380952381],
            [0.444444444444, 0.25, 0.667907373407],
            [0.235294117647, 0.2, 0.833333333333],
        ],
    ),
    (
        P2(),
        [
            [0.8, 0.5, 0.047619047619],
            [0.2, 0.5, 0.952380952381],
            [0.16, 0.25, 0.0453514739229],
            [0.0888888888889, 0.125, 0.0318051130194],
            [0.0470588235294, 0.1, 0.0396825396825],
        ],
    ),
    (
        DebiasedWeight(),
        [
            [2, 1, 0.22360679775],
            [0.5, 1, 4.472135955],
            [0.4, 0.5, 0.212958855],
            [0.222222222222, 0.25, 0.149348628961],
            [0.117647058824, 0.2, 0.186338998125],
        ],
    ),
    (
        EDM(),
        [
            [17, 5, 1.2],
            [4.25, 5, 24],
            [3.4, 2.5, 1.14285714286],
            [1.88888888889, 1.25, 0.801488848089],
            [1, 1, 1],
        ],
    ),
    (
        ELBO(),
        [
            [0.5, 0.5, 0.5],
            [0.125, 0.5, 10],
            [0.1, 0.25, 0.47619047619],
            [0.0555555555556, 0.125, 0.333953686704],
            [0.0294117647059, 0.1, 0.416666666667],
        ],
    ),
]


@pytest.mark.parametrize(
    ("weight", "table"), NUMBERS, ids=lambda v: str(v).partition(" at 0x")[0][:24]
)
def test_weights_have_the_tabulated_values(weight, table):
    levels = torch.tensor([0.25, 1.0, 20.0], dtype=torch.float64).log()
    for prediction_type, row in zip(PREDICTION_TYPES, table, strict=True):
        assert weight.target_weight(prediction_type, levels, 0.5).tolist() == pytest.approx(
            row, rel=1e-9
        )


@every_case
def test_limits_at_zero_and_infinite_snr_are_correct(
    weight, prediction_type, formula, noise, clean
):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        limits = weight.target_weight(prediction_type, torch.tensor([-inf, inf], dtype=dtype), S)
        assert limits.tolist() == pytest.approx([noise, clean], rel=1e-13)
    near = weight.target_weight(
        prediction_type, torch.tensor([-70.0, 70.0], dtype=torch.float64), S
    )  # e^-35 = 6e-16 from the limit
    for value, limit in zip(near.tolist(), (noise, clean), strict=True):
        assert value > 1e15 if limit == inf else value == pytest.approx(limit, rel=1e-14, abs=1e-15)


def test_min_snr_has_the_published_values():
    """γ = 5 at SNR 1/4, 5, 20: min(1, γ/SNR) on ε, min(SNR, γ)/(SNR+1) on v, min(SNR, γ) on x_0."""
    levels = torch.tensor([0.25, 5.0, 20.0], dtype=torch.float64).log()
    assert MinSNR().target_weight("epsilon", levels, S).tolist() == pytest.approx(
        [1, 1, 1 / 4], rel=1e-14
    )
    assert MinSNR().target_weight("v_prediction", levels, S).tolist() == pytest.approx(
        [1 / 5, 5 / 6, 5 / 21], rel=1e-14
    )
    assert MinSNR().target_weight("flow_prediction", levels, S).tolist() == pytest.approx(
        [1 / 9, 5 / (1 + 5**0.5) ** 2, 5 / (1 + 20**0.5) ** 2], rel=1e-14
    )
    assert MinSNR()(levels).tolist() == pytest.approx([0.25, 5, 5], rel=1e-14)
    assert MinSNR(2.0)(levels).tolist() == pytest.approx([0.25, 2, 2], rel=1e-14)


@pytest.mark.parametrize("weight", GOLDEN, ids=repr)
def test_a_weight_is_its_value_on_the_x0_error(weight):
    levels = torch.cat((LEVELS, torch.tensor([-inf, inf])))
    assert torch.equal(weight(levels), weight.target_weight("sample", levels, S))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_mse_on_its_target_is_exactly_1(prediction_type):
    levels = torch.tensor(
        [-inf, -300.0, -90.0, -1.0, 0.0, 3.0, 90.0, 300.0, inf], dtype=torch.float64
    )
    assert MSE(prediction_type).target_weight(prediction_type, levels, S).tolist() == [1] * 9


@dataclass(frozen=True)
class Power(Weight):
    """w = SNR^k."""

    k: float

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return self.k * logsnr


@pytest.mark.parametrize(
    ("weight", "prediction_type", "noise", "clean"),
    [
        (Power(0.5), "epsilon", inf, 0),  # DebiasedWeight: 1/√SNR on ε
        (Power(0.5), "v_prediction", 0, 0),
        (Power(0.5), "sample", 0, inf),
        (Power(1.5), "epsilon", 0, inf),
        (Power(-1.0), "v_prediction", inf, 0),
        (Power(0.01), "sample", 0, inf),
    ],
    ids=str,
)
def test_limits_of_any_power_of_the_snr_are_0_or_infinite(weight, prediction_type, noise, clean):
    assert weight.target_weight(prediction_type, torch.tensor([-inf, inf]), S).tolist() == [
        noise,
        clean,
    ]


def loss_and_gradient(weight, prediction_type, logsnr, x0, eps, guess):
    """The loss of a network whose x_0 is `guess` at α x_0 + σ ε, and its gradient by that x_0."""
    level = Cosine().at(logsnr)
    x = level.alpha * x0 + level.sigma * eps
    raw = target(
        prediction_type, guess, (x - level.alpha * guess) / level.sigma, level, S
    ).requires_grad_()
    factor = weight.target_weight(prediction_type, torch.tensor([logsnr], dtype=torch.float64), S)
    loss = (factor * (raw - target(prediction_type, x0, eps, level, S)) ** 2).mean()
    (by_raw,) = torch.autograd.grad(loss, raw)
    implied = predict(prediction_type, raw, x, level, S).x0
    torch.testing.assert_close(implied, guess, rtol=0, atol=1e-9)
    (x0_by_raw,) = torch.autograd.grad(implied.sum(), raw)
    return loss.detach(), by_raw / x0_by_raw


@pytest.mark.parametrize(
    ("weight", "logsnr"), sampled([*GOLDEN, Power(0.5)], LEVELS.tolist(), count=50)
)
def test_loss_and_gradient_do_not_depend_on_the_target(weight, logsnr):
    """For the same x and the same implied x_0, at |λ| ≤ 12, to a relative error of 1e-10."""
    x0, eps, step = torch.randn(
        3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    loss, gradient = loss_and_gradient(weight, "sample", logsnr, x0, eps, x0 + step)
    assert loss.item() == pytest.approx(
        (weight(torch.tensor(logsnr, dtype=torch.float64)) * (step**2).mean()).item(), rel=1e-10
    )
    for prediction_type in PREDICTION_TYPES:
        other, other_gradient = loss_and_gradient(
            weight, prediction_type, logsnr, x0, eps, x0 + step
        )
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("weight", "prediction_type", "noise", "clean"),
    [
        (MinSNR(1e40), "sample", 0, 1e40),
        (SoftMinSNR(1e40), "sample", 0, 1e40),
        (SigmoidWeight(100.0), "sample", 0, math.exp(100)),
        (SigmoidWeight(-100.0), "sample", 0, math.exp(-100)),
        (TruncatedSNR(1e-40), "sample", 1e-40, inf),
        (P2(k=1e40), "epsilon", 1e-40, 0),
        (P2(k=1e40), "sample", 0, 1),
    ],
    ids=str,
)
def test_limits_are_correct_for_extreme_parameters(weight, prediction_type, noise, clean):
    limits = weight.target_weight(prediction_type, torch.tensor([-inf, inf]), S).tolist()
    assert limits == pytest.approx([noise, clean], rel=1e-12, abs=0)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_sigmoid_weight_is_a_soft_min_snr(prediction_type, bias):
    levels = torch.cat((LEVELS, FAR_LEVELS, torch.tensor([-inf, inf])))
    one, other = (
        weight.target_weight(prediction_type, levels, S)
        for weight in (SigmoidWeight(bias), SoftMinSNR(math.exp(bias)))
    )
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("weight", [EDM(), MSE("edm")], ids=repr)
def test_the_weight_of_edm_on_the_output_of_its_network_is_1(weight, sigma_data):
    """λ(σ) c_out(σ)² = 1 in the notation of the paper, for any standard deviation of the data."""
    assert (
        weight.target_weight("edm", torch.cat((LEVELS, FAR_LEVELS)), sigma_data).tolist()
        == [1] * 13
    )
    sigma = (-LEVELS / 2).exp()
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(
        weight(LEVELS, sigma_data) * c_out**2, torch.ones(9).double(), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("value", [0.0, -5.0, inf, math.nan])
@pytest.mark.parametrize(
    ("build", "name"),
    [(MinSNR, "gamma"), (SoftMinSNR, "gamma"), (TruncatedSNR, "minimum"), (P2, "k")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_parameters_that_are_not_positive_are_refused(build, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a positive finite number"):
        build(**{name: value})


@pytest.mark.parametrize("value", [-0.1, inf, math.nan])
def test_an_exponent_that_is_negative_or_not_finite_is_refused(value):
    with pytest.raises(
        ValueError, match=f"gamma is {value}, expected a finite exponent of at least 0"
    ):
        P2(gamma=value)


@pytest.mark.parametrize("value", [-inf, inf, math.nan])
def test_a_bias_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=f"bias is {value}, expected a finite λ"):
        SigmoidWeight(value)


def test_unknown_targets_are_refused_when_built():
    with pytest.raises(ValueError, match="target is 'eps', expected one of epsilon, sample"):
        MSE("eps")
