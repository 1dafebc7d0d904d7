"""A network is recognised by its denoising error: that of each exact network is the lowest."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.evaluation.identification import (
    best_scores,
    describe,
    identify_process,
    process_hypotheses,
)
from tests.helpers.oracles import ExactNetwork

D = 16
SPECTRUM = torch.logspace(0, -3, D, dtype=torch.float64)
"""Variances of the data along its axes."""
POINTS = (
    torch.randn(256, D, generator=torch.Generator().manual_seed(0)).double() * SPECTRUM.sqrt()
).float()
HYPOTHESES = process_hypotheses(Process(shape=(D,), sigma_data=float(POINTS.std())))


def exact_network(process):
    oracle = GaussianMixture(torch.zeros(1, D).double(), SPECTRUM.diag()[None], process=process)
    return ExactNetwork(oracle, process)


SIMILAR = [
    {f"{prediction}, {a}, conditioned on {time}", f"{prediction}, {b}, conditioned on {time}"}
    for prediction in ("epsilon", "v_prediction", "sample")
    for a, b in (
        ("cosine", "cosine table (iDDPM)"),
        ("linear (DDPM)", "linear, zero terminal SNR"),
        ("scaled linear (Stable Diffusion)", "scaled linear, zero terminal SNR"),
    )
    if prediction == "sample" or not a.startswith("scaled")
    for time in ("index", "t")
]
"""Pairs of processes whose levels differ only where x is almost clean or almost noise. The error of
x_0 depends less on the level than that of ε and v."""


ONE_FOR_EACH_PREDICTION = {
    "epsilon, linear (DDPM), conditioned on index",
    "v_prediction, cosine, shifted to half the resolution, conditioned on t",
    "sample, scaled linear, zero terminal SNR, conditioned on index",
    "flow_prediction, flow, conditioned on 1000 t",
    "edm, any schedule, conditioned on ln(σ)/4",
}
"""The hypotheses that are tested by default; the others are `thorough`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_FOR_EACH_PREDICTION else pytest.mark.thorough)
        for name in HYPOTHESES
    ],
)
def test_the_process_of_an_exact_network_is_found(name):
    scores = identify_process(exact_network(HYPOTHESES[name]), POINTS, HYPOTHESES)
    found = {score.name for score in best_scores(scores)}
    assert name in found
    assert found == {name} or found in SIMILAR
    assert scores[0].score < 0 < scores[-1].score
    assert all(ratio < 1.01 for ratio in scores[0].ratios)


def test_the_best_linear_denoiser_has_the_score_zero():
    """x̂_0 = α s² x / (α² s² + σ²) of white data has the error e(λ)."""

    class Linear(nn.Module):
        def forward(self, x, time):
            level = process.time.level(process.schedule, time.double()[:, None])
            variance = float(white.std()) ** 2
            gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
            return (gain * x).to(x.dtype)

    white = torch.randn(1024, D, generator=torch.Generator().manual_seed(1)) / 2
    name = "sample, cosine, conditioned on index"
    process = HYPOTHESES[name]
    (score,) = identify_process(Linear(), white, {name: process})
    assert score.score == pytest.approx(0, abs=0.03)
    assert score.ratios == pytest.approx([1] * 9, abs=0.1)


def test_a_hypothesis_under_which_the_network_fails_is_left_out():
    class Picky(nn.Module):
        def forward(self, x, time):
            if time.max() > 1:
                raise IndexError("index out of range")
            return torch.zeros_like(x)

    names = {score.name for score in identify_process(Picky(), POINTS, HYPOTHESES)}
    assert "epsilon, cosine, conditioned on t" in names
    assert "epsilon, cosine, conditioned on index" not in names


def test_data_and_networks_that_allow_no_answer_are_refused():
    class Broken(nn.Module):
        def forward(self, x, time):
            raise RuntimeError("no")

    with pytest.raises(ValueError, match=r"standard deviation of the data is 0.0, expected data"):
        identify_process(Broken(), torch.zeros(2, D), HYPOTHESES)
    with pytest.raises(ValueError, match=r"fails under every hypothesis, such as .*: no"):
        identify_process(Broken(), POINTS, HYPOTHESES)


def test_a_network_without_a_finite_output_has_the_worst_score():
    class Nan(nn.Module):
        def forward(self, x, time):
            return torch.full_like(x, math.nan)

    (score,) = identify_process(Nan(), POINTS, {"nan": Process(shape=(D,))})
    assert score.score == math.inf
    assert "inf times the error of the best linear denoiser" in describe([score])[0]


def test_batches_and_labels_of_images_keep_their_rows():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.labels = []

        def forward(self, x, time, class_labels=None):
            self.labels += [] if class_labels is None else class_labels.tolist()
            return torch.zeros_like(x)

    name = "epsilon, linear (DDPM), conditioned on index"
    labels = torch.arange(len(POINTS)) % 3
    process = {name: replace(HYPOTHESES[name], classes=3, dropout=0.1)}
    scores = {}
    for size in (256, 100):
        network = Recorder()
        (scores[size],) = identify_process(
            network, POINTS, process, levels=2, condition=labels, batch_size=size
        )
        assert network.labels == labels.tolist() * 2
    assert scores[256].ratios == pytest.approx(scores[100].ratios, rel=1e-6)
