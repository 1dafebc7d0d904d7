"""Learned levels of the elements: their times, their sampling, and what refuses them."""

import pytest
import torch
from scipy.integrate import quad

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import bits_per_dimension
from diffcore.guidance import CFG, Interval
from diffcore.networks import Perceptron
from diffcore.networks.learned_levels import LearnedLevelsNetwork, PixelPolynomial
from diffcore.samplers import DDIM, DDPM, AdaptiveRungeKutta, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, LogLinear, Trailing
from tests.helpers import learned_levels as helper

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).view(-1, 1, 1)
COVARIANCE = torch.tensor([[1.0, 0.7], [0.7, 0.8]], dtype=torch.float64)


def polynomial(latent: int = 0) -> PixelPolynomial:
    """Random coefficients of two by three elements."""
    network = LearnedLevelsNetwork(lambda: Perceptron([2, 3], width=2), [2, 3], latent, width=4)
    helper.randomize(network, 1)
    return network.levels.double()


def test_the_times_of_the_elements_are_the_integral_of_a_square_from_0_to_1():
    levels = polynomial()
    time, slope = (value.detach() for value in levels(TIMES))
    a, b, raw = levels.coefficients.detach()
    c = 1e-3 + raw.exp().log1p()
    for i in range(2):
        for j in range(3):
            square = [float(value[i, j]) for value in (a, b, c)]

            def rate(t, square=square):
                return (square[0] * t**2 + square[1] * t + square[2]) ** 2

            total = quad(rate, 0, 1)[0]
            for k, t in enumerate(TIMES.flatten().tolist()):
                assert float(time[k, i, j]) == pytest.approx(quad(rate, 0, t)[0] / total, abs=1e-9)
                assert float(slope[k, i, j]) == pytest.approx(rate(t) / total, rel=1e-9, abs=1e-12)
    assert torch.equal(time[0], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.allclose(time[-1], torch.ones(2, 3, dtype=torch.float64), rtol=1e-14)
    assert (time.diff(dim=0) > 0).all()


def test_the_times_of_a_latent_are_those_of_its_sample_alone():
    levels, z = polynomial(3), torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    time, _ = levels(TIMES, z)
    assert (time[-1] - 1).abs().max() < 1e-14
    assert (time[4] - levels(TIMES[4:5], -z[4:5])[0]).abs().max() > 0.01
    torch.testing.assert_close(time[4:5], levels(TIMES[4:5], z[4:5])[0])


@pytest.mark.parametrize("latent", [0, 2])
def test_levels_start_as_those_of_the_schedule(latent):
    levels = PixelPolynomial([2, 3], latent)
    z = torch.ones(9, latent) if latent else None
    time, slope = levels(TIMES, z)
    torch.testing.assert_close(time, TIMES.expand_as(time), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-6, atol=0.0)


def test_knots_are_maps_of_levels_between_the_shared_ends():
    network = helper.denoiser(COVARIANCE, seed=0).network
    knots = Trailing().knots(helper.SCHEDULE, 4)
    maps = network.knots(knots, None)
    assert maps[-1] is knots[-1]
    assert maps[0].logsnr.tolist() == [pytest.approx([helper.SCHEDULE.low] * 2)]
    times, _ = network.levels(torch.tensor([[0.5]], dtype=torch.float64))
    torch.testing.assert_close(maps[2].logsnr, helper.SCHEDULE.logsnr(times.detach()))
    torch.testing.assert_close(maps[2].sigma, (-maps[2].logsnr).sigmoid().sqrt())


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=repr)
@pytest.mark.parametrize("latent", [0, 2])
def test_samples_have_the_covariance_of_the_data_whatever_the_levels(sampler, latent):
    denoiser = helper.denoiser(COVARIANCE, latent, seed=0)
    found = sample(
        denoiser, sampler, Trailing(), 100, seeds=range(4000), batch_size=4000, dtype=torch.float64
    ).x
    assert (found.T.cov() - COVARIANCE).abs().max() < 0.1


def test_samples_of_levels_that_were_not_learned_yet_are_those_of_the_schedule():
    network = Perceptron([2], width=8)
    torch.nn.init.normal_(network.last.weight)
    learned = LearnedLevelsNetwork(lambda: network, [2])
    processes = (
        Process(LogLinear(), shape=(2,), levels=levels) for levels in ("shared", "learned")
    )
    x, other = (
        sample(Denoiser(part, process), DDPM(), seeds=range(6), steps=8).x
        for part, process in zip((network, learned), processes, strict=True)
    )
    torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_levels_of_a_latent_are_those_of_each_sample_under_guidance_and_in_small_calls(scale):
    network = LearnedLevelsNetwork(
        lambda: Perceptron([2], 8, classes=2, inputs=4), [2], 2, channels=True, width=4
    )
    helper.randomize(network, 0)
    torch.nn.init.normal_(network.network.last.weight)
    process = Process(LogLinear(), shape=(2,), classes=2, dropout=0.1, levels="learned")
    denoiser, options = Denoiser(network, process), {"guidance": CFG(scale), "steps": 3}
    whole = sample(denoiser, DDIM(), seeds=range(5), condition=[0, 1, 0, 1, 2], **options).x
    for micro_batch, rows in ((2, range(5)), (0, [3])):
        x = sample(
            denoiser,
            DDIM(),
            seeds=rows,
            condition=[[0, 1, 0, 1, 2][row] for row in rows],
            micro_batch=micro_batch,
            batch_size=5,
            **options,
        ).x
        torch.testing.assert_close(x, whole[list(rows)], rtol=1e-4, atol=1e-5)


def test_z_is_normal_and_a_function_of_the_seed():
    network = helper.denoiser(COVARIANCE, latent=2).network
    z = network.sample_latent(torch.arange(4000))
    assert abs(float(z.mean())) < 0.05
    assert float(z.std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(z[7:9], network.sample_latent(torch.tensor([7, 8])))


def test_the_divergence_of_z_is_that_of_normals():
    network = helper.denoiser(COVARIANCE, latent=3, seed=0).network
    x0 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latent = network.encode(x0, 0, torch.arange(5))
    mean, log_variance = network.encoder(x0)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    expected = torch.distributions.kl_divergence(q, prior).sum(1)
    torch.testing.assert_close(latent.divergence, expected)
    draws = torch.stack([network.encode(x0, seed, torch.arange(5)).z for seed in range(600)])
    assert ((draws.mean(0) - mean) / q.stddev).abs().max() < 0.2
    assert (draws.std(0) / q.stddev - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": "own"}, "levels is 'own', expected one of shared, learned"),
        ({"levels": "learned", "schedule": Cosine()}, "expected a LogLinear schedule"),
        ({"levels": "learned", "variance": "learned"}, "variance is learned.*expected fixed"),
    ],
)
def test_a_process_without_such_levels_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Process(**({"schedule": LogLinear(), "shape": (2,)} | fields))


def test_a_network_and_a_process_of_different_levels_are_refused():
    learned = LearnedLevelsNetwork(lambda: Perceptron([2], width=4), [2])
    with pytest.raises(ValueError, match=r"levels of the process are shared.*contains learned"):
        Denoiser(learned, Process(LogLinear(), shape=(2,)))
    with pytest.raises(ValueError, match=r"contains no learned levels: set process\.levels"):
        Denoiser(learned.network, Process(LogLinear(), shape=(2,), levels="learned"))


def test_what_needs_one_level_for_all_elements_is_refused():
    denoiser = helper.denoiser(COVARIANCE)
    for sampler in (AdaptiveRungeKutta(), AlphaBlending()):
        with pytest.raises(ValueError, match="evaluates the network between its knots"):
            sample(denoiser, sampler, seeds=[0])
    with pytest.raises(ValueError, match="use a rule for all levels"):
        sample(denoiser, guidance=Interval(CFG(2.0), logsnr=(-1.0, 1.0)), seeds=[0])
    with pytest.raises(ValueError, match="one for each: use variational_bound"):
        bits_per_dimension(denoiser, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="set shape of LearnedLevelsNetwork"):
        denoiser.network.encode(torch.zeros(1, 3), 0, torch.zeros(1))
    with pytest.raises(ValueError, match="set its in_channels to 4"):
        _network_with_channels()
    with pytest.raises(ValueError, match="latent is -1"):
        LearnedLevelsNetwork(lambda: Perceptron([2]), [2], latent=-1)


def _network_with_channels() -> LearnedLevelsNetwork:
    class Configured(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"in_channels": 2, "out_channels": 2}

    return LearnedLevelsNetwork(Configured, [2, 4, 4], channels=True)
