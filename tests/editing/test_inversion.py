"""Inversion solves each step, so that sampling from the result reproduces the image."""

import math
from functools import cache

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.oracle import EmpiricalDistribution
from diffcore.editing.inversion import invert
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Karras, Trailing, UniformLogSNR, Within
from tests.helpers.oracles import (
    SCALINGS,
    ExactNetwork,
    PointMass,
    covariance,
    flow,
    gaussian,
    mixture,
    process,
    unet,
)
from tests.helpers.recording_network import RecordingNetwork

SEEDS = torch.arange(64)
NOISE = Noise(SEEDS, (2,), dtype=torch.float64)
ORACLES = {"gaussian": gaussian([1.0, -0.5], covariance(0.8, 0.2, 0.7)), "mixture": mixture()}


@cache
def round_trip(name, steps, iterations, grid=Trailing()):
    """Mean relative error of the images sampled from their inversion, and the largest residual."""
    oracle = ORACLES[name]
    x0, knots = oracle.sample(SEEDS), grid.knots(oracle.process.schedule, steps)
    inverted = invert(oracle, x0, knots, iterations)
    again, _ = integrate(oracle, DDIM(), inverted.x, knots, NOISE)
    assert inverted.evaluations == steps * iterations
    assert inverted.residual.shape == (steps, 64)
    return ((again - x0).norm(dim=1) / x0.norm(dim=1)).mean().item(), inverted.residual.max().item()


@pytest.mark.parametrize(
    ("name", "errors"),
    [("gaussian", (2.0e-2, 8.2e-3, 2.1e-3)), ("mixture", (2.0e-2, 8.1e-3, 2.0e-3))],
)
def test_explicit_inversion_errs_at_first_order(name, errors):
    """For 20, 50 and 200 steps; DDIM inversion, which keeps ε, has 7.0e-2, 3.8e-2 and 1.3e-2."""
    measured = [round_trip(name, steps, 1)[0] for steps in (20, 50, 200)]
    assert measured == pytest.approx(errors, rel=0.05)


@pytest.mark.parametrize(
    "grid", (Trailing(), Karras(0.02, 50.0), UniformLogSNR(-8.0, 8.0)), ids=str
)
@pytest.mark.parametrize("name", ORACLES)
def test_ten_iterations_reproduce_the_image(name, grid):
    """One iteration has errors of 8e-3 to 1.6e-2 at 50 steps, and of 2e-2 to 3.7e-2 at 20."""
    error, residual = round_trip(name, 50, 10, grid)
    assert error < 1e-7
    assert residual < 1e-5
    assert round_trip(name, 20, 10, grid)[0] < 1e-4


def test_the_round_trip_of_200_steps_is_exact_to_rounding():
    assert round_trip("mixture", 200, 8)[0] < 1e-13


def test_the_residual_shrinks_with_each_iteration():
    residuals = [round_trip("mixture", 50, iterations)[1] for iterations in (1, 3, 6, 9, 12)]
    assert all(after < before / 5 for before, after in zip(residuals, residuals[1:], strict=False))


@pytest.mark.parametrize("slope", ("ε held", "x_0 held"))
def test_one_iteration_is_ddim_inversion_in_the_limits_of_sigma_data(slope):
    """2010.02502: x_t = α_t (x_s/α_s + (u_t - u_s) ε(x_s, t)), or the same formula for x_0."""
    oracle = mixture(process(sigma_data={"ε held": 1e8, "x_0 held": 1e-8}[slope]))
    knots = UniformLogSNR(-3.0, 3.0).knots(Cosine(), 6)[:-1]
    x = oracle.sample(SEEDS)
    inverted = invert(oracle, x, knots).x
    for s, t in zip(knots[:0:-1], knots[-2::-1], strict=True):
        x0, eps = oracle(x, t)
        if slope == "ε held":
            x = t.alpha * (x / s.alpha + (t.sigma / t.alpha - s.sigma / s.alpha) * eps)
        else:
            x = t.sigma * (x / s.sigma + (t.alpha / t.sigma - s.alpha / s.sigma) * x0)
    torch.testing.assert_close(inverted, x, rtol=1e-6, atol=1e-6)


def test_on_gaussian_data_of_sigma_data_one_iteration_solves_the_step():
    oracle = gaussian([0.0, 0.0], 0.25 * torch.eye(2, dtype=torch.float64))
    x0, knots = oracle.sample(SEEDS), Trailing().knots(Cosine(), 5)
    inverted = invert(oracle, x0, knots)
    torch.testing.assert_close(
        integrate(oracle, DDIM(), inverted.x, knots, NOISE)[0], x0, rtol=1e-12, atol=1e-12
    )


def test_the_inverse_converges_to_the_exact_flow():
    oracle, first, last = mixture(), -5.0, 5.0
    x = oracle.sample(SEEDS)
    exact = flow(oracle, x, Cosine().at(last), Cosine().at(first))
    errors = []
    for n in (50, 100):
        knots = Within(UniformLogSNR(), first, last).knots(Cosine(), n)
        errors.append((invert(oracle, x, knots, 12).x - exact).norm(dim=1).median())
    assert errors[0] < 0.15
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_inverse_is_the_same_in_every_scaling(scaling):
    oracles = [mixture(process(Cosine(scaling=each))) for each in (scaling, "vp")]
    x0 = oracles[0].sample(SEEDS)
    ours, vp = (invert(o, x0, Karras(0.02, 50.0).knots(o.process.schedule, 15), 2) for o in oracles)
    first = Karras().knots(Cosine(scaling=scaling), 1)[0].schedule.at(-2 * math.log(50.0))
    torch.testing.assert_close(
        ours.x / math.hypot(first.alpha, first.sigma), vp.x, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("w", (0.0, 2.0))
def test_a_guided_step_is_inverted_as_it_is_sampled(w):
    oracle, labels = mixture(), (SEEDS % 2)
    x0, knots = oracle.sample(SEEDS, labels), Trailing().knots(Cosine(), 50)
    inverted = invert(oracle, x0, knots, 20, CFG(w), labels)
    again, _ = integrate(oracle, DDIM(), inverted.x, knots, NOISE, CFG(w), labels)
    assert inverted.evaluations == 2 * 20 * 50
    solved = inverted.residual.max(0).values < 1e-6
    assert solved.double().mean() > 0.9
    torch.testing.assert_close(again[solved], x0[solved], rtol=0, atol=1e-4)
    assert ((again - x0).norm(dim=1)[~solved] > 1e-4).all()


def test_alpha_blending_of_order_1_reproduces_the_image():
    oracle = mixture(process(Flow()))
    x0, knots = oracle.sample(SEEDS), Trailing().knots(Flow(), 40)
    inverted = invert(oracle, x0, knots, 15)
    torch.testing.assert_close(
        integrate(oracle, AlphaBlending(1), inverted.x, knots, NOISE)[0], x0, rtol=0, atol=1e-8
    )


def test_the_network_is_evaluated_at_the_noisier_end_of_each_step():
    record = process()
    network = ExactNetwork(mixture(), record)
    knots = Trailing().knots(Cosine(), 4)
    invert(Denoiser(network, record), torch.zeros(3, 2), knots, 2)
    times = [time[0].item() for _, time, _ in network.calls]
    assert times == pytest.approx(
        [1000 * knot.t - 1 for knot in reversed(knots[:-1]) for _ in range(2)], rel=1e-5
    )


def test_a_network_in_float32_is_inverted_without_its_dropout_and_gradients():
    denoiser = Denoiser(unet(), process(shape=(1, 8, 8))).train()
    x0 = Noise(torch.arange(2), (1, 8, 8)).start() / 2
    knots = Karras(0.05, 20.0).knots(Cosine(), 10)
    inverted = invert(denoiser, x0, knots, 20)
    assert denoiser.training
    assert not inverted.x.requires_grad
    assert inverted.x.dtype == torch.float32
    again, _ = integrate(
        denoiser.eval(), DDIM(), inverted.x, knots, Noise(torch.arange(2), (1, 8, 8))
    )
    assert inverted.residual.max() < 1e-4
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-3)


def test_a_step_without_an_inverse_has_a_large_residual():
    point = PointMass(torch.tensor([0.5, -0.5], dtype=torch.float64), process())
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    inverted = invert(point, x0, Trailing().knots(Cosine(), 5), 30)
    assert inverted.residual[-1] == pytest.approx(
        [0.5] * 3
    )  # the result is the point for every x_t
    one = invert(mixture(), x0, Trailing().knots(Cosine(), 1), 5)
    assert (one.residual > 0.1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations is 0, expected at least 1"),
        (
            {"knots": Explicit((2.0, 0.0)).knots(Cosine(), 1)},
            "expected two or more that fall in noise",
        ),
        ({"knots": (Cosine().at(0.0),)}, "expected two or more"),
        ({"guidance": CFG(2.0)}, "needs a condition"),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected(changes, message):
    arguments = {"x0": torch.zeros(1, 2), "knots": Trailing().knots(Cosine(), 2)} | changes
    with pytest.raises(ValueError, match=message):
        invert(mixture(), **arguments)
    with pytest.raises(ValueError, match="pure noise"):
        invert(
            mixture(process(prediction="epsilon")), torch.zeros(1, 2), Trailing().knots(Cosine(), 2)
        )


def test_samples_that_would_diverge_are_solved_with_a_smaller_gain():
    """F is steep between the basins of a data set.

    With the initial g the largest residual is 0.26 after 60 iterations.
    """
    oracle = EmpiricalDistribution(mixture().sample(torch.arange(20)), process=process(classes=0))
    knots = Within(UniformLogSNR(), -8.0, 2.0).knots(Cosine(), 8)
    x = knots[-1].alpha * oracle.sample(SEEDS) + knots[-1].sigma * NOISE.start()
    residual = invert(oracle, x, knots, 60).residual.max(0).values
    assert residual.max() < 1e-6
    assert residual.median() < 1e-14


def test_networks_are_evaluated_without_dropout_and_return_to_training():
    network = RecordingNetwork()
    denoiser = Denoiser(network, process(classes=0)).train()
    invert(denoiser, torch.zeros(2, 2), Karras(0.05, 20.0).knots(Cosine(), 3))
    assert network.modes == {False}
    assert network.training
