"""Published weights: the weight of the squared error of each target, written independently."""

import math

import numpy as np
import torch

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
)

inf = math.inf
LEVELS = torch.tensor(
    [-12.0, -5.0, -1.0, 0.0, 0.7, math.log(5), 2.0, 6.0, 12.0], dtype=torch.float64
)
FAR_LEVELS = torch.tensor([-32.0, -21.0, 21.0, 32.0], dtype=torch.float64)
"""Levels at which torch's softplus(x) is x."""
S = 0.5
"""Standard deviation of the data."""


def v(snr):
    """The weight of MSE("v_prediction") on the x_0 error."""
    return 1 + snr


def flow(snr):
    """The weight of MSE("flow_prediction") on the x_0 error."""
    return (1 + np.sqrt(snr)) ** 2


def edm(snr):
    """1 / c_out² = (σ² + s²) / (σ s)² with σ² = 1/SNR: EDM's weight of the x_0 error."""
    sigma = 1 / np.sqrt(snr)
    return (sigma**2 + S**2) / (sigma * S) ** 2


GOLDEN = {
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
    EDM(): {  # λ(σ) of Table 1
        "epsilon": (lambda snr: edm(snr) / snr, inf, 1),
        "sample": (edm, 1 / S**2, inf),
        "v_prediction": (lambda snr: edm(snr) / v(snr), 1 / S**2, 1),
        "flow_prediction": (lambda snr: edm(snr) / flow(snr), 1 / S**2, 1),
        "edm": (lambda snr: snr**0, 1, 1),
    },
    ELBO(): {
        "epsilon": (lambda snr: 0.5 * snr**0, 0.5, 0.5),
        "sample": (lambda snr: snr / 2, 0, inf),
        "v_prediction": (lambda snr: snr / 2 / v(snr), 0, 0.5),
        "flow_prediction": (lambda snr: snr / 2 / flow(snr), 0, 0.5),
        "edm": (lambda snr: snr / 2 / edm(snr), 0, 0.5),
    },
    SoftMinSNR(4.0): {
        "epsilon": (lambda snr: 4 / (snr + 4), 1, 0),
        "sample": (lambda snr: 4 * snr / (snr + 4), 0, 4),
        "v_prediction": (lambda snr: 4 * snr / (snr + 4) / v(snr), 0, 0),
        "flow_prediction": (lambda snr: 4 * snr / (snr + 4) / flow(snr), 0, 0),
        # k-diffusion's (σ s)² / (σ² + s²)² with γ = 1/s²
        "edm": (lambda snr: S**2 / snr / (S**2 + 1 / snr) ** 2, 0, 0),
    },
    SigmoidWeight(2.0): {
        "epsilon": (lambda snr: 1 / (1 + snr * math.exp(-2)), 1, 0),
        "sample": (lambda snr: snr / (1 + snr * math.exp(-2)), 0, math.exp(2)),
        "v_prediction": (lambda snr: snr / (1 + snr * math.exp(-2)) / v(snr), 0, 0),
        "flow_prediction": (lambda snr: snr / (1 + snr * math.exp(-2)) / flow(snr), 0, 0),
        "edm": (lambda snr: snr / (1 + snr * math.exp(-2)) / edm(snr), 0, 0),
    },
    TruncatedSNR(): {
        "epsilon": (lambda snr: np.maximum(1, 1 / snr), inf, 1),
        "sample": (lambda snr: np.maximum(snr, 1), 1, inf),
        "v_prediction": (lambda snr: np.maximum(snr, 1) / v(snr), 1, 1),
        "flow_prediction": (lambda snr: np.maximum(snr, 1) / flow(snr), 1, 1),
        "edm": (lambda snr: np.maximum(snr, 1) / edm(snr), S**2, 1),
    },
    TruncatedSNR(0.3): {"sample": (lambda snr: np.maximum(snr, 0.3), 0.3, inf)},
    P2(gamma=0.5): {
        "epsilon": (lambda snr: (1 + snr) ** -0.5, 1, 0),
        "sample": (lambda snr: snr * (1 + snr) ** -0.5, 0, inf),
        "v_prediction": (lambda snr: snr * (1 + snr) ** -1.5, 0, 0),
        "flow_prediction": (lambda snr: snr * (1 + snr) ** -0.5 / flow(snr), 0, 0),
        "edm": (lambda snr: snr * (1 + snr) ** -0.5 / edm(snr), 0, 0),
    },
    P2(): {
        "epsilon": (lambda snr: 1 / (1 + snr), 1, 0),
        "sample": (lambda snr: snr / (1 + snr), 0, 1),
        "v_prediction": (lambda snr: snr / (1 + snr) ** 2, 0, 0),
        "flow_prediction": (lambda snr: snr / (1 + snr) / flow(snr), 0, 0),
        "edm": (lambda snr: snr / (1 + snr) / edm(snr), 0, 0),
    },
    P2(gamma=2.0): {
        "epsilon": (lambda snr: (1 + snr) ** -2.0, 1, 0),
        "sample": (lambda snr: snr / (1 + snr) ** 2, 0, 0),
        "v_prediction": (lambda snr: snr / (1 + snr) ** 3, 0, 0),
        "flow_prediction": (lambda snr: snr / (1 + snr) ** 2 / flow(snr), 0, 0),
        "edm": (lambda snr: snr / (1 + snr) ** 2 / edm(snr), 0, 0),
    },
    P2(k=3.0, gamma=1.0): {
        "epsilon": (lambda snr: 1 / (3 + snr), 1 / 3, 0),
        "sample": (lambda snr: snr / (3 + snr), 0, 1),
    },
    P2(gamma=0.0): {"epsilon": (lambda snr: snr**0, 1, 1)},
    DebiasedWeight(): {
        "epsilon": (lambda snr: 1 / np.sqrt(snr), inf, 0),
        "sample": (np.sqrt, 0, inf),
        "v_prediction": (lambda snr: np.sqrt(snr) / v(snr), 0, 0),
        "flow_prediction": (lambda snr: np.sqrt(snr) / flow(snr), 0, 0),
        "edm": (lambda snr: np.sqrt(snr) / edm(snr), 0, 0),
    },
}
"""weight -> target -> (weight of its squared error, limit at SNR = 0, limit at SNR = inf)"""
