"""The study of dequantisation."""

import torch
from experiments.claims.arms import ARMS
from experiments.claims.likelihood import BINS, COPIES, DEQUANTISATIONS, load_data, measure
from experiments.claims.network import Perceptron, digits_data

from diffcore.core.denoiser import Denoiser


def test_uniform_noise_fills_the_bins_of_the_scans():
    scans, noisy = digits_data(), load_data("with uniform noise")
    assert len(noisy.x0) == len(noisy.labels) == COPIES * len(scans.x0)
    noise = (noisy.x0[: len(scans.x0)] - scans.x0) * (BINS - 1) / 2
    assert noise.abs().max() <= 0.5
    assert abs(float(noise.std()) - 12**-0.5) < 1e-3
    assert not torch.equal(noisy.x0[: len(scans.x0)], noisy.x0[len(scans.x0) : 2 * len(scans.x0)])
    assert load_data("quantised").x0.equal(scans.x0)


def test_both_dequantisations_are_measured():
    denoiser = Denoiser(Perceptron(width=8, blocks=1), ARMS["cosine, v"].process)
    rows = list(measure(denoiser, 0, 2))
    assert [row["dequantisation"] for row in rows] == list(DEQUANTISATIONS)
    assert all(row["bits"] > 0 and row["evaluations"] > 50 for row in rows)
