"""A level may be a map, with one λ per pixel (SVNR, 2306.16052), in every part of the library."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import predict, target
from diffcore.core.process import Process
from diffcore.editing.inpainting import RePaint
from diffcore.objectives.draw import Draw
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MinSNR
from diffcore.samplers import DDIM, AdaptiveRungeKutta, Heun, Restart
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Flow, Level, Normal
from tests.helpers.oracles import PREDICTION_TYPES, ExactNetwork
from tests.helpers.products import sampled
from tests.samplers.test_orders import ORDERS
from tests.samplers.test_weak_orders import WEAK

SHAPE = (1, 2, 3)
SEEDS = torch.arange(4)
NOISE = Noise(SEEDS, SHAPE, dtype=torch.float64)
OFFSETS = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64).view(1, *SHAPE)
STD = 0.8


class Pixels:
    """The exact denoiser of independent pixels N(0.3, s²), at one level or a map of levels."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None):
        alpha, sigma = level.to(x).alpha, level.to(x).sigma
        z = (x - alpha * 0.3) / (alpha**2 * STD**2 + sigma**2)
        prediction = predict("sample", 0.3 + alpha * STD**2 * z, x, level.to(x), 1.0)
        return replace(prediction, eps=sigma * z)


def knots(schedule, steps: int, last: float = math.inf) -> tuple[Level, ...]:
    """Levels from λ = -6 to 6 with an offset for each pixel, followed by the level `last`."""
    logsnrs = [-6 + 12 * i / (steps - 1) for i in range(steps)]
    return (
        *(schedule.at(logsnr + OFFSETS) for logsnr in logsnrs),
        schedule.at(torch.full_like(OFFSETS, last)),
    )


SAMPLERS = [
    *ORDERS,
    *(sampler for sampler in WEAK if not isinstance(sampler, Restart)),
    RePaint(DDIM(1.0), torch.full(SHAPE, 0.4), OFFSETS[0] > 0, 2, 2),
]
"""Every sampler that accepts maps of levels."""


@pytest.mark.parametrize(
    ("sampler", "schedule", "last"),
    sampled(SAMPLERS, [Cosine(), Flow(), Normal(scaling="ve")], [8.0, math.inf], count=70),
    ids=lambda value: str(value)[:60],
)
def test_each_pixel_of_a_map_is_sampled_as_with_its_knots_alone(sampler, schedule, last):
    """The pixels are independent, so pixel k follows its knots; the last is equal for all."""
    denoiser, levels = Pixels(Process(schedule, shape=SHAPE)), knots(schedule, 9, last)
    x = levels[0].sigma * NOISE.start()
    result, _ = integrate(denoiser, sampler, x, levels, NOISE)
    for k, offset in enumerate(OFFSETS.flatten().tolist()):
        alone = (*(schedule.at(-6 + 12 * i / 8 + offset) for i in range(9)), schedule.at(last))
        expected, _ = integrate(denoiser, sampler, x, alone, NOISE)
        torch.testing.assert_close(
            result.flatten(1)[:, k], expected.flatten(1)[:, k], rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda value: str(value)[:60])
def test_a_map_of_levels_keeps_the_dtype_of_the_samples(sampler):
    noise, levels = Noise(SEEDS, SHAPE), knots(Flow(), 5)
    x, _ = integrate(Pixels(Process(Flow(), shape=SHAPE)), sampler, noise.start(), levels, noise)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("sampler", "remedy"),
    [
        (Heun(3.0), "churn above 0 .*: use churn = 0"),
        (AdaptiveRungeKutta(), "AdaptiveRungeKutta .*: use another sampler"),
        (Restart(), "Restart .*: use its inner sampler alone"),
    ],
    ids=str,
)
def test_a_sampler_that_needs_one_level_for_the_batch_refuses_a_map(sampler, remedy):
    denoiser = Pixels(Process(Flow(), shape=SHAPE))
    with pytest.raises(TypeError, match=remedy):
        integrate(denoiser, sampler, NOISE.start(), knots(Flow(), 5), NOISE)


class CosineNetwork(nn.Module):
    """A network in closed form that records its time conditioning."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.time = time
        return x.cos() + (time.view(-1, *[1] * (x.ndim - 1)) if time.ndim == 1 else time) / 1000


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_objective_weights_each_pixel_by_its_level(prediction_type):
    process = Process(Cosine(), prediction_type, shape=SHAPE, sigma_data=0.6)
    times = (
        torch.rand(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8
        + 0.1
    )
    level = process.schedule.level(times)
    x0 = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eps, network = NOISE.start(), CosineNetwork()
    draw = Draw(level, eps, torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.float64))
    losses = Objective(MinSNR())(Denoiser(network, process), x0, None, draw)
    assert torch.equal(network.time, 1000 * times - 1)
    x = level.alpha * x0 + level.sigma * eps
    norm = (level.sigma**2 + level.alpha**2 * 0.36) ** 0.5
    output = (x / norm if prediction_type == "edm" else x).cos() + (1000 * times - 1) / 1000
    guess = predict(prediction_type, output, x, level, 0.6).x0
    expected = (level.logsnr.exp().clamp(max=5) * (guess - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_prediction_at_a_map_of_levels_is_exact_in_each_pixel(prediction_type):
    record = Process(Cosine(), prediction_type, shape=SHAPE)
    level = record.schedule.at(OFFSETS.expand(4, *SHAPE))
    x = NOISE.start()

    class Map(ExactNetwork):
        def _level(self, time: Tensor) -> Level:
            return level

    result = Denoiser(Map(Pixels(record), record), record)(x, level)
    exact = Pixels(record)(x, level)
    torch.testing.assert_close(result.x0, exact.x0, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.eps, exact.eps, rtol=1e-9, atol=1e-10)
    raw = target(prediction_type, exact.x0, exact.eps, level, record.sigma_data)
    torch.testing.assert_close(
        predict(prediction_type, raw, x, level, record.sigma_data).x0,
        exact.x0,
        rtol=1e-9,
        atol=1e-10,
    )


def test_a_map_with_a_level_that_alone_is_refused_is_refused():
    schedule = Cosine()
    level = schedule.at(torch.where(OFFSETS < 0, -math.inf, OFFSETS))
    with pytest.raises(ValueError, match=r"the first knot is pure noise .*use v_prediction"):
        Process(schedule, "epsilon", shape=SHAPE).check_level(level)
    Process(schedule, "v_prediction", shape=SHAPE).check_level(level)
    clean = schedule.at(torch.where(OFFSETS > 0, math.inf, OFFSETS))
    with pytest.raises(ValueError, match="is clean"):
        Process(schedule, "sample", shape=SHAPE).check_level(clean)
    assert (level.logsnr_range, clean.logsnr_range) == ((-math.inf, 1.5), (-1.5, math.inf))


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 6)], ids=str)
def test_a_map_that_broadcasts_over_as_many_samples_as_it_has_elements_stays_a_map(shape):
    network, x = CosineNetwork(), torch.zeros(6, *shape[1:])
    denoiser = Denoiser(network, Process(Cosine(), shape=shape[1:]))
    denoiser(x, Cosine().at(OFFSETS.view(shape)))
    assert network.time.shape == shape
    per_sample = Cosine().at(OFFSETS.view(6, *[1] * (len(shape) - 1)))
    denoiser.output(x, per_sample)
    assert network.time.shape == (6,)
