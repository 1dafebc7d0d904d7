"""The study of arms and that of guided samples, with tiny trainings."""

from dataclasses import replace

import pytest
import torch
from experiments.claims.arms import ARMS, SAMPLERS, measure, measure_exposure, measure_samplers
from experiments.claims.guided import RULES, similarity, train_network
from experiments.claims.guided import measure as measure_rule
from experiments.claims.network import Perceptron

from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import EmpiricalDistribution
from diffcore.training.data import Digits


def test_an_arm_has_distances_after_each_number_of_steps():
    arm = replace(ARMS["linear, ε, DDPM-IP"], points=(2, 1))
    found = measure(arm, 0, per_label=1)
    assert list(found) == ["distances", "exposure"]
    assert list(found["distances"]) == ["1", "2"]


@pytest.mark.parametrize("name", ARMS)
def test_the_objective_of_every_arm_fits_its_process(name):
    arm = ARMS[name]
    if arm.objective:
        arm.objective.check(arm.process)
    assert arm.process.prediction == arm.prediction


def test_an_exact_denoiser_has_little_exposure_bias():
    """Its samples are training scans, so that inputs have the mean squares of training."""
    scans = Digits("train")
    process = ARMS["cosine, v"].process
    found = measure_exposure(EmpiricalDistribution(scans.x0, scans.labels, process), 0, 10)
    for quantities in found.values():
        assert len(quantities["norm"]) == len(quantities["variance"]) == 20
        assert all(abs(ratio - 1) < 0.12 for values in quantities.values() for ratio in values)


def test_samples_of_smaller_scans_have_smaller_inputs_than_training():
    """At σ near 0 the mean squares are those of x_0, a quarter of those of the scans."""
    scans = Digits("train")
    smaller = EmpiricalDistribution(scans.x0 / 2, scans.labels, ARMS["cosine, v"].process)
    for quantities in measure_exposure(smaller, 0, 10).values():
        assert quantities["variance"][0] == pytest.approx(1, abs=0.12)
        assert quantities["variance"][-1] == pytest.approx(0.25, abs=0.05)


def test_samplers_are_measured_at_equal_evaluations():
    denoiser, calls = Denoiser(Perceptron(), ARMS["Flow, flow"].process), []
    denoiser.network.register_forward_pre_hook(lambda network, inputs: calls.append(inputs))
    for count in (2, 8):
        calls.clear()
        found = measure_samplers(denoiser, 0, 1, [count])
        assert len(calls) == count * len(SAMPLERS)
        assert all(list(distances) == [str(count)] for distances in found.values())


def test_a_rule_is_compared_with_cfg_of_equal_seeds():
    denoiser = train_network(0, 2)
    found = measure_rule(denoiser, "CFG", 3.0, 0, 12)
    assert found["psnr"] is None
    assert found["evaluations"] == 40
    fewer = measure_rule(denoiser, "CFG, 15 steps", 3.0, 0, 12)
    assert fewer["evaluations"] == 30
    assert fewer["psnr"] is not None
    assert set(RULES) > {"CFG", "APG", "Interval(CFG)"}


def test_the_similarity_of_images_is_their_psnr():
    x = torch.zeros(2, 1, 8, 8)
    assert similarity(x, x) is None
    assert similarity(x, x + 0.2) == pytest.approx(20.0)
    assert similarity(x + 5, x + 3) is None  # both are clamped to 1
