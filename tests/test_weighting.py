"""One w(λ) on the x_0 error: its value on every target as published, its limits, and what "the same weight" means."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore.prediction import predict, target
from diffcore.schedules import Cosine
from diffcore.weighting import MSE, MinSNR, Weight

inf = math.inf
KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]
LEVELS = torch.tensor([-12.0, -5.0, -1.0, 0.0, 0.7, math.log(5), 2.0, 6.0, 12.0], dtype=torch.float64)
S = 0.5


def v(snr):
    return 1 + snr


def flow(snr):
    return (1 + np.sqrt(snr)) ** 2


def edm(snr):
    """1 / c_out² = (σ² + s²) / (σ s)² with σ² = 1/SNR: EDM's weight on the x_0 error."""
    sigma = 1 / np.sqrt(snr)
    return (sigma**2 + S**2) / (sigma * S) ** 2


GOLDEN = {  # weight -> the factor on the squared error of each target, and its limits at SNR = 0 and inf
    MSE("epsilon"): {
        "epsilon": (lambda snr: snr**0, 1, 1),
        "sample": (lambda snr: snr, 0, inf),
        "v_prediction": (lambda snr: snr / v(snr), 0, 1),
        "flow_prediction": (lambda snr: snr / flow(snr), 0, 1),
        "edm": (lambda snr: snr / edm(snr), 0, 1),
    },
    MSE("sample"): {
        "epsilon": (lambda snr: 1 / snr, inf, 0),
        "sample": (lambda snr: snr**0, 1, 1),
        "v_prediction": (lambda snr: 1 / v(snr), 1, 0),
        "flow_prediction": (lambda snr: 1 / flow(snr), 1, 0),
        "edm": (lambda snr: 1 / edm(snr), S**2, 0),
    },
    MSE("v_prediction"): {
        "epsilon": (lambda snr: v(snr) / snr, inf, 1),
        "sample": (v, 1, inf),
        "v_prediction": (lambda snr: snr**0, 1, 1),
        "flow_prediction": (lambda snr: v(snr) / flow(snr), 1, 1),
        "edm": (lambda snr: v(snr) / edm(snr), S**2, 1),
    },
    MSE("flow_prediction"): {
        "epsilon": (lambda snr: flow(snr) / snr, inf, 1),
        "sample": (flow, 1, inf),
        "v_prediction": (lambda snr: flow(snr) / v(snr), 1, 1),
        "flow_prediction": (lambda snr: snr**0, 1, 1),
        "edm": (lambda snr: flow(snr) / edm(snr), S**2, 1),
    },
    MSE("edm"): {
        "epsilon": (lambda snr: edm(snr) / snr, inf, 1),
        "sample": (edm, 1 / S**2, inf),
        "v_prediction": (lambda snr: edm(snr) / v(snr), 1 / S**2, 1),
        "flow_prediction": (lambda snr: edm(snr) / flow(snr), 1 / S**2, 1),
        "edm": (lambda snr: snr**0, 1, 1),
    },
    MinSNR(5.0): {
        "epsilon": (lambda snr: np.minimum(1, 5 / snr), 1, 0),
        "sample": (lambda snr: np.minimum(snr, 5), 0, 5),
        "v_prediction": (lambda snr: np.minimum(snr, 5) / v(snr), 0, 0),
        "flow_prediction": (lambda snr: np.minimum(snr, 5) / flow(snr), 0, 0),
        "edm": (lambda snr: np.minimum(snr, 5) / edm(snr), 0, 0),
    },
}
CASES = [(weight, kind, *row) for weight, table in GOLDEN.items() for kind, row in table.items()]
every_case = pytest.mark.parametrize(("weight", "kind", "formula", "noise", "clean"), CASES, ids=lambda v: str(v)[:40])


@every_case
def test_B1_weight_on_every_target_is_the_published_one(weight, kind, formula, noise, clean):
    expected = formula(LEVELS.exp().numpy())
    np.testing.assert_allclose(weight.on(kind, LEVELS, S), expected, rtol=1e-12)


@every_case
def test_B1_limits_at_zero_and_infinite_snr_are_right(weight, kind, formula, noise, clean):
    limits = weight.on(kind, torch.tensor([-inf, inf], dtype=torch.float64), S)
    assert limits.tolist() == pytest.approx([noise, clean], rel=1e-14)
    near = weight.on(kind, torch.tensor([-70.0, 70.0], dtype=torch.float64), S)  # e^-35 = 6e-16 from the limit
    for value, limit in zip(near.tolist(), (noise, clean), strict=True):
        assert value > 1e15 if limit == inf else value == pytest.approx(limit, rel=1e-14, abs=1e-15)


def test_B1_min_snr_golden_values():
    """γ = 5 at SNR 1/4, 5, 20: min(1, γ/SNR) on ε, min(SNR, γ)/(SNR+1) on v, min(SNR, γ) on x_0."""
    levels = torch.tensor([0.25, 5.0, 20.0], dtype=torch.float64).log()
    assert MinSNR().on("epsilon", levels, S).tolist() == pytest.approx([1, 1, 1 / 4], rel=1e-14)
    assert MinSNR().on("v_prediction", levels, S).tolist() == pytest.approx([1 / 5, 5 / 6, 5 / 21], rel=1e-14)
    assert MinSNR().on("flow_prediction", levels, S).tolist() == pytest.approx(
        [1 / 9, 5 / (1 + 5**0.5) ** 2, 5 / (1 + 20**0.5) ** 2], rel=1e-14
    )
    assert MinSNR()(levels).tolist() == pytest.approx([0.25, 5, 5], rel=1e-14)
    assert MinSNR(2.0)(levels).tolist() == pytest.approx([0.25, 2, 2], rel=1e-14)


@pytest.mark.parametrize("weight", GOLDEN, ids=repr)
def test_a_weight_is_its_own_value_on_the_x0_error(weight):
    levels = torch.cat((LEVELS, torch.tensor([-inf, inf])))
    assert torch.equal(weight(levels), weight.on("sample", levels, S))


@pytest.mark.parametrize("kind", KINDS)
def test_mse_on_its_own_target_is_exactly_1(kind):
    levels = torch.tensor([-inf, -300.0, -90.0, -1.0, 0.0, 3.0, 90.0, 300.0, inf], dtype=torch.float64)
    assert MSE(kind).on(kind, levels, S).tolist() == [1] * 9


@dataclass(frozen=True)
class Power(Weight):
    """w = SNR^k."""

    k: float

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return self.k * logsnr


@pytest.mark.parametrize(
    ("weight", "kind", "noise", "clean"),
    [
        (Power(0.5), "epsilon", inf, 0),  # Debiased: 1/√SNR on ε
        (Power(0.5), "v_prediction", 0, 0),
        (Power(0.5), "sample", 0, inf),
        (Power(1.5), "epsilon", 0, inf),
        (Power(-1.0), "v_prediction", inf, 0),
        (Power(0.01), "sample", 0, inf),
    ],
    ids=str,
)
def test_limits_of_any_power_of_the_snr_are_0_or_infinite(weight, kind, noise, clean):
    assert weight.on(kind, torch.tensor([-inf, inf]), S).tolist() == [noise, clean]


def loss_and_gradient(weight, kind, logsnr, x0, eps, guess):
    """The loss of a network whose implied x_0 is `guess` at α x_0 + σ ε, and its gradient by that x_0."""
    level = Cosine().at(logsnr)
    x = level.alpha * x0 + level.sigma * eps
    raw = target(kind, guess, (x - level.alpha * guess) / level.sigma, level, S).requires_grad_()
    factor = weight.on(kind, torch.tensor([logsnr], dtype=torch.float64), S)
    loss = (factor * (raw - target(kind, x0, eps, level, S)) ** 2).mean()
    (by_raw,) = torch.autograd.grad(loss, raw)
    implied = predict(kind, raw, x, level, S).x0
    torch.testing.assert_close(implied, guess, rtol=0, atol=1e-9)
    (x0_by_raw,) = torch.autograd.grad(implied.sum(), raw)
    return loss.detach(), by_raw / x0_by_raw


@pytest.mark.parametrize("weight", [*GOLDEN, Power(0.5)], ids=repr)
@pytest.mark.parametrize("logsnr", LEVELS.tolist())
def test_B1_the_same_weight_is_the_same_loss_and_gradient_for_every_target(weight, logsnr):
    """Numerics.md, fact 11: same x_t, same implied x_0, |λ| ≤ 12, rtol 1e-10."""
    x0, eps, step = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, gradient = loss_and_gradient(weight, "sample", logsnr, x0, eps, x0 + step)
    assert loss.item() == pytest.approx(
        (weight(torch.tensor(logsnr, dtype=torch.float64)) * (step**2).mean()).item(), rel=1e-10
    )
    for kind in KINDS[:1] + KINDS[2:]:
        other, other_gradient = loss_and_gradient(weight, kind, logsnr, x0, eps, x0 + step)
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -5.0, inf, math.nan])
def test_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma is {gamma}, expected a positive finite number"):
        MinSNR(gamma)


def test_unknown_targets_are_refused_when_built():
    with pytest.raises(ValueError, match="target is 'eps', expected one of epsilon, sample"):
        MSE("eps")


# Wrong: MSE does not look at its sigma_data; 0 fails at the first loss with "math domain error", -1 too, nan gives NaN.
