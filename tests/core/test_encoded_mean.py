"""Learned encoders of x_0: their steps, their samples, and what refuses them."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.editing.noise_maps import extract
from diffcore.evaluation.likelihood import bits_per_dimension
from diffcore.guidance import CFG
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.samplers import DDIM, DDPM, AdamsMoulton, EulerAncestral, State
from diffcore.sampling.generation import default_sampler, sample
from diffcore.schedules import Cosine, LogLinear, Trailing, Truncated
from tests.helpers import encoded_mean as helper


def random_network(share: float = 0.0, seed: int = 0) -> MeanEncoderNetwork:
    """Perceptrons of two numbers with random last layers."""
    torch.manual_seed(seed)
    network = MeanEncoderNetwork(lambda: Perceptron([2], 8), lambda: Perceptron([2], 8), share)
    for part in (network.network, network.encoder):
        nn.init.normal_(part.last.weight, std=0.3)
    return network.double()


def process(schedule=LogLinear(-5.0, 7.0), **options) -> Process:
    return Process(schedule, shape=(2,), estimate="encoded_mean", **options)


@pytest.mark.parametrize("scaling", ["vp", "ve", "flow"])
@pytest.mark.parametrize("sampler", [DDPM(), DDPM(1.0), DDIM(1.0), EulerAncestral()], ids=repr)
def test_samples_of_the_identity_are_those_of_the_process_without_an_encoder(sampler, scaling):
    network = random_network(share=1.0)
    schedule = LogLinear(-5.0, 7.0, scaling=scaling)
    plain = Process(schedule, shape=(2,))
    denoisers = Denoiser(network, process(schedule)), Denoiser(network.network, plain)
    options = {"grid": Trailing(), "steps": 7, "seeds": range(5), "dtype": torch.float64}
    for micro_batch in (0, 2):
        x, other = (
            sample(each, sampler, micro_batch=micro_batch, **options).x for each in denoisers
        )
        torch.testing.assert_close(x, other, rtol=1e-9, atol=1e-9)


def test_the_mean_of_a_step_is_that_of_the_source_at_first_order():
    """α_s/α_t r² x + α_s (1 - r²) x̂ + α_s (λ_s - λ_t) σ_t² x̂, for c = 0."""
    network, schedule = random_network(), LogLinear(-5.0, 7.0)
    denoiser = Denoiser(network, process(schedule))
    t = schedule.at(-0.7)
    x = torch.tensor([[0.4, -1.3], [0.9, 0.2]], dtype=torch.float64)
    prediction, differences = denoiser(x, t), []
    encoded = prediction.x0 * t.alpha**2
    for gap in (0.2, 0.1, 0.05):
        s = schedule.at(-0.7 + gap)
        r2 = math.exp(-gap)
        source = s.alpha / t.alpha * r2 * x + s.alpha * (1 - r2) * encoded
        source = source + s.alpha * gap * t.sigma**2 * encoded
        mean = Prediction(
            prediction.x0, math.sqrt(r2) * prediction.eps, encoding=prediction.encoding
        ).at(s)
        differences.append(float((mean - source).abs().max().detach()))
    assert differences[0] < 0.01
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.1)
    assert differences[1] / differences[2] == pytest.approx(4, rel=0.1)


class ConstantNoise:
    """Noise of one value in every step."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([[value]], dtype=torch.float64)

    def between(self, t, s, step):
        return self.value


def step_map(denoiser, sampler, t, s):
    """A and √V of a step x -> A x + √V z."""
    one, zero = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    return tuple(
        float(sampler.advance(State(x, t, (s,)), denoiser(x, t), ConstantNoise(1 - float(x))).x)
        for x in (one, zero)
    )


@pytest.mark.parametrize("sampler", [DDIM(1.0), DDPM(0.5)], ids=repr)
@pytest.mark.parametrize(("share", "gain"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.8), (0.5, -0.7)])
def test_the_variance_of_samples_tends_to_that_of_the_data(share, gain, sampler):
    """At first order in the number of steps, for an exact denoiser of normal data."""
    denoiser, errors = helper.denoiser(share, gain), []
    for steps in (100, 200, 400):
        knots = Trailing().knots(helper.SCHEDULE, steps)
        variance = knots[0].alpha ** 2 + knots[0].sigma ** 2
        for t, s in pairwise(knots):
            slope, noise = step_map(denoiser, sampler, t, s)
            variance = slope**2 * variance + noise**2
        errors.append(abs(variance - denoiser.network.variance))
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_the_encoder_is_differentiated_by_the_level():
    network, schedule = random_network(share=0.3), LogLinear(-5.0, 7.0)
    x0 = torch.tensor([[0.4, -1.3], [0.9, 0.2]], dtype=torch.float64)
    logsnr = torch.tensor([[-1.1], [2.3]], dtype=torch.float64)
    with torch.no_grad():
        target = network.target(x0, schedule.at(logsnr))
        ends = [network.encode(x0, schedule.at(logsnr + h)) for h in (1e-5, -1e-5)]
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(target.mean, network.encode(x0, schedule.at(logsnr)))
        expected = target.mean + slope
        found = target.factor * (target.mean + target.offset)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        assert target.offset.abs().max() > 0.01
        clean = Trailing().knots(schedule, 2)[-1]
        torch.testing.assert_close(network.encode(x0, clean), x0)
        moments = logsnr.sigmoid() + 0.3 * (-logsnr).sigmoid()
        linear = torch.cat(
            [network.linear(x0[i : i + 1], schedule.at(float(logsnr[i]))) for i in (0, 1)]
        )
        torch.testing.assert_close(linear, moments * x0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": Cosine()}, "expected continuous levels between finite λ"),
        ({"variance": "learned"}, "estimate is encoded_mean and variance learned"),
        ({"levels": "learned"}, "levels are learned, and variance is fixed and estimate encoded"),
    ],
)
def test_a_process_without_such_an_encoder_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        process(**fields)
    process(Truncated(Cosine(), -6.0, 6.0))


def test_a_network_and_a_process_of_which_one_has_an_encoder_are_refused():
    network = random_network()
    with pytest.raises(ValueError, match=r"posterior_mean, and the network contains an encoder"):
        Denoiser(network, Process(LogLinear(-5.0, 7.0), shape=(2,)))
    with pytest.raises(ValueError, match=r"encoded_mean, and the network contains no encoder"):
        Denoiser(network.network, process())


def test_what_needs_the_posterior_mean_is_refused():
    denoiser = Denoiser(random_network(), process(classes=2, dropout=0.1))
    assert default_sampler(denoiser.process) == DDPM()
    for sampler in (DDIM(), DDIM(0.5), AdamsMoulton(2)):
        with pytest.raises(ValueError, match=r"use DDPM\(\), or DDIM\(eta=1.0\)"):
            sample(denoiser, sampler, Trailing(), seeds=[0])
    calls = (
        lambda: sample(denoiser, grid=Trailing(), guidance=CFG(2.0), condition=[0], seeds=[0]),
        lambda: bits_per_dimension(denoiser, torch.zeros(1, 2)),
        lambda: extract(
            denoiser,
            torch.zeros(1, 2),
            Trailing().knots(denoiser.process.schedule, 3),
            Noise(torch.zeros(1, dtype=torch.int64), (2,)),
            eta=1.0,
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"is the mean of an ancestral step"):
            call()
    with pytest.raises(ValueError, match="leave image out"):
        sample(denoiser, DDPM(), Trailing(), seeds=[0], image=torch.zeros(1, 2))


def test_encoders_out_of_range_are_refused():
    part = partial(Perceptron, [2], 8)
    with pytest.raises(ValueError, match="share is 2, expected c within"):
        MeanEncoderNetwork(part, part, share=2)
    with pytest.raises(ValueError, match="scale is 0, expected a positive"):
        MeanEncoderNetwork(part, part, scale=0)
    with pytest.raises(ValueError, match="set its channels and size"):
        MeanEncoderNetwork(part, Wide).encode(torch.zeros(1, 2), LogLinear(-5.0, 7.0).level(0.5))


class Wide(nn.Module):
    """An encoder of another shape."""

    def forward(self, x, time):
        return torch.cat((x, x), 1)
