"""A level may be a map, with one λ per pixel (SVNR, 2306.16052), in every part of the library."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import predict, target
from diffcore.core.process import Process
from diffcore.objectives.objective import Draw, Objective
from diffcore.objectives.weighting import MinSNR
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverPP, Heun
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Flow, Level, Normal
from tests.helpers.oracles import PREDICTION_TYPES, ExactNetwork

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
        return predict("sample", 0.3 + alpha * STD**2 * z, x, level.to(x), 1.0)._replace(
            eps=sigma * z
        )


def knots(schedule, steps: int, last: float = math.inf) -> tuple[Level, ...]:
    """Levels from λ = -6 to 6 with an offset for each pixel, followed by the level `last`."""
    logsnrs = [-6 + 12 * i / (steps - 1) for i in range(steps)]
    return (
        *(schedule.at(logsnr + OFFSETS) for logsnr in logsnrs),
        schedule.at(torch.full_like(OFFSETS, last)),
    )


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), DDIM(0.7), AlphaBlending(1), AlphaBlending(2), Heun(), DPMSolverPP("2M")],
    ids=str,
)
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Normal(scaling="ve")], ids=repr)
def test_each_pixel_of_a_map_is_sampled_as_with_its_knots_alone(sampler, schedule):
    """The pixels are independent, so pixel k follows its knots; the last is λ = 8 for all."""
    denoiser, levels = Pixels(Process(schedule, shape=SHAPE)), knots(schedule, 9, last=8.0)
    x = levels[0].sigma * NOISE.start()
    result, _ = integrate(denoiser, sampler, x, levels, NOISE)
    for k, offset in enumerate(OFFSETS.flatten().tolist()):
        alone = (*(schedule.at(-6 + 12 * i / 8 + offset) for i in range(9)), schedule.at(8.0))
        expected, _ = integrate(denoiser, sampler, x, alone, NOISE)
        torch.testing.assert_close(
            result.flatten(1)[:, k], expected.flatten(1)[:, k], rtol=1e-10, atol=1e-12
        )


class CosineNetwork(nn.Module):
    """A network in closed form that records its time conditioning."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.time = time
        return x.cos() + time / 1000


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
