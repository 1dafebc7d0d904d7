"""Sampling starts from an image at any level, stops at any level, and calls callbacks."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    BetaSpacing,
    Cosine,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    Trailing,
    UniformBlend,
    UniformLogSNR,
    Within,
)
from tests.helpers.oracles import (
    SCALINGS,
    flow,
    mixture,
)
from tests.helpers.products import sampled
from tests.helpers.recording_network import SEEDS, small_denoiser
from tests.samplers.test_orders import ORDERS

SAMPLERS = [*ORDERS, DDIM(0.5), DDIM(1.0)]


GRIDS = [
    Trailing(),
    Linspace(),
    Leading(),
    Quadratic(),
    BetaSpacing(),
    Karras(),
    UniformLogSNR(),
    UniformBlend(),
]


@pytest.mark.parametrize(
    ("sampler", "start", "scaling"),
    sampled(SAMPLERS, (0.05, 1.0, 20.0), SCALINGS, count=30),
    ids=str,
)
def test_the_noise_added_to_an_image_is_sigma_of_the_start_level(sampler, start, scaling):
    """It depends neither on the sampler nor on the number of steps nor on the grid."""
    image, z = torch.tensor([0.3, -0.7]), Noise(torch.tensor(SEEDS), (2,)).start()
    for grid, steps in zip(GRIDS, (1, 2, 3, 4, 5, 7, 8, 50), strict=True):
        denoiser = small_denoiser(schedule=Cosine(scaling=scaling), prediction="flow_prediction")
        grid = Within(grid, low=-2 * math.log(start))
        sample(
            denoiser,
            sampler,
            grid,
            steps,
            seeds=SEEDS,
            image=image,
            batch_size=7,
            callback=lambda *_: True,
        )
        first = grid.knots(denoiser.process.schedule, steps)[0]
        assert first.sigma / first.alpha == pytest.approx(start, rel=1e-12)
        injected = (denoiser.network.inputs[0] - first.alpha * image) / first.sigma
        torch.testing.assert_close(injected, z, rtol=0, atol=1e-5 * (1 + 1 / start))


def test_the_image_is_one_for_each_seed_or_one_for_all():
    images = torch.arange(14.0).view(7, 2) / 10
    arguments = {
        "grid": Within(Trailing(), low=1.0),
        "steps": 3,
        "seeds": SEEDS,
        "batch_size": 4,
        "dtype": torch.float64,
    }
    one, each = (sample(mixture(), image=image, **arguments).x for image in (images[2], images))
    assert torch.equal(one[2], each[2])
    assert not torch.equal(one[3], each[3])
    assert torch.equal(sample(mixture(), image=images[2:3], **arguments).x, one)


def test_little_noise_preserves_the_image_and_much_noise_replaces_it():
    image = mixture().sample(torch.arange(7))
    preserved, replaced = (
        sample(
            mixture(),
            grid=Within(Trailing(), low=low),
            seeds=SEEDS,
            image=image,
            dtype=torch.float64,
        ).x
        - image
        for low in (7.0, -9.0)
    )
    assert preserved.norm(dim=1).max() < 0.1
    assert replaced.norm(dim=1).median() > 0.5


@pytest.mark.parametrize("high", (-2.0, 0.5, 6.0))
def test_a_run_that_stops_at_a_level_ends_on_the_exact_flow(high):
    oracle = mixture()
    grid = Within(UniformBlend(), high=high)
    result = sample(
        oracle, AlphaBlending(2), grid, 400, seeds=SEEDS, dtype=torch.float64, batch_size=7
    )
    x = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64).start()
    schedule = oracle.process.schedule
    exact = flow(oracle, x, schedule.level(1.0), schedule.at(high))
    assert result.knots[-1].logsnr == high
    torch.testing.assert_close(result.x, exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("image", "grid", "message"),
    [
        (
            torch.zeros(3),
            Within(Trailing(), low=0.0),
            r"image has shape \(3,\), expected \(2,\), or one of these for",
        ),
        (torch.zeros(6, 2), Within(Trailing(), low=0.0), r"image has shape \(6, 2\)"),
        (torch.zeros(2), Trailing(), "first knot is pure noise, which keeps nothing of the image"),
    ],
)
def test_images_of_another_shape_are_rejected_before_any_evaluation(image, grid, message):
    denoiser = small_denoiser()
    with pytest.raises(ValueError, match=message):
        sample(denoiser, grid=grid, steps=3, seeds=SEEDS, image=image)
    assert denoiser.network.batch_sizes == []


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_callback_receives_each_state_and_prediction_and_changes_nothing(sampler):
    calls, oracle = [], mixture()
    arguments = {"steps": 5, "seeds": SEEDS, "dtype": torch.float64, "batch_size": 7}
    observed = sample(oracle, sampler, callback=lambda *call: calls.append(call), **arguments)
    assert torch.equal(observed.x, sample(oracle, sampler, **arguments).x)
    assert len(calls) == observed.evaluations == sampler.evaluations(observed.knots)
    for step, state, prediction in calls:
        assert step == state.step == len(observed.knots) - 1 - len(state.remaining)
        expected = oracle(state.x, state.level)
        torch.testing.assert_close(prediction.pair, expected.pair, rtol=0, atol=0)


@pytest.mark.parametrize("stop", (0, 2))
def test_a_callback_that_returns_true_stops_the_run_at_its_level(stop):
    states = []

    def callback(step, state, prediction):
        states.append(state)
        return step == stop

    denoiser = small_denoiser()
    result = sample(denoiser, DDIM(), steps=5, seeds=SEEDS[:4], batch_size=4, callback=callback)
    assert result.evaluations == len(denoiser.network.batch_sizes) == stop + 1
    assert states[-1].level == result.knots[stop]
    assert torch.equal(result.x, states[-1].x)
    knots, noise = states[-1].remaining, Noise(torch.tensor(SEEDS[:4]), (2,))
    rest, _ = integrate(denoiser, DDIM(), result.x, (states[-1].level, *knots), noise)
    assert torch.equal(rest, sample(denoiser, DDIM(), steps=5, seeds=SEEDS[:4], batch_size=4).x)


def test_a_callback_stops_only_the_current_batch():
    denoiser, calls = small_denoiser(), []
    sample(
        denoiser,
        steps=5,
        seeds=SEEDS,
        batch_size=4,
        callback=lambda *call: bool(calls.append(call)) or len(calls) == 2,
    )
    assert len(denoiser.network.batch_sizes) == 2 + 5
