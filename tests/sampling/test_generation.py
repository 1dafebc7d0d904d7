"""Generation of samples from seeds: its start, its result, and the state of the network."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.schedules import (
    Cosine,
    Discrete,
    Explicit,
    Flow,
    Karras,
    Linspace,
    Trailing,
    UniformLogSNR,
    ZeroTerminalSNR,
)
from tests.helpers.oracles import (
    PREDICTION_TYPES,
    SCALINGS,
    TO_NOISE,
    ExactNetwork,
    flow,
    gaussian,
    mixture,
    process,
)
from tests.helpers.products import sampled
from tests.helpers.recording_network import SEEDS, RecordingNetwork, small_denoiser

PREDICTION_TYPES_AT_NOISE = [name for name in PREDICTION_TYPES if name != "epsilon"]


@cache
def exact_samples(name):
    record = process(TO_NOISE[name])
    oracle, schedule = mixture(record), record.schedule
    x = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64).start()
    return flow(oracle, x, schedule.level(1.0), schedule.at(math.inf))


@pytest.mark.parametrize(
    ("name", "prediction"), sampled(list(TO_NOISE), PREDICTION_TYPES_AT_NOISE, count=6)
)
def test_sampling_starts_at_alpha_0_and_follows_the_exact_flow(name, prediction):
    """The error of the midpoint rule is 2e-5 at 200 steps and four times as large at 100."""
    record = process(TO_NOISE[name], prediction=prediction)
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    result = sample(
        denoiser, AlphaBlending(2), Trailing(), 200, seeds=SEEDS, batch_size=7, dtype=torch.float64
    )
    assert (result.knots[0].alpha, result.knots[0].sigma, result.knots[-1].sigma) == (0, 1, 0)
    torch.testing.assert_close(result.x, exact_samples(name), rtol=0, atol=5e-5)


@pytest.mark.parametrize("n", (1, 10, 60, 61, 103, 998))
@pytest.mark.parametrize(
    "schedule", (Discrete(), ZeroTerminalSNR(Discrete())), ids=("finite", "zero terminal")
)
def test_any_number_of_trailing_steps_ends_at_the_clean_level(schedule, n):
    """On N(0, ½²) sampling multiplies the noise by the standard deviation, to an error of 1.5/n."""
    oracle = gaussian([0.0], torch.tensor([[0.25]]), process(schedule, shape=(1,)))
    noise = Noise(torch.arange(3), (1,), dtype=torch.float64).start()
    result = sample(
        oracle, DDIM(), Trailing(), n, seeds=range(3), batch_size=3, dtype=torch.float64
    )
    std = (result.x / noise).abs()
    assert len(result.knots) == n + 1
    assert result.knots[-1].logsnr == math.inf
    assert ((std - 0.5).abs() < 1.6 / n).all()  # diffusers has 73.7 at n = 61
    assert (std < 0.01).all() or n > 1  # one step gives E[x_0]


def test_linspace_steps_between_neighbouring_knots():
    """For 10 steps on N(0, ½²); diffusers, which steps to t - T//n, has 0.419."""
    oracle = gaussian([0.0], torch.tensor([[0.25]]), process(Discrete(), shape=(1,)))
    x = sample(oracle, DDIM(), Linspace(), 10, seeds=[1], batch_size=1, dtype=torch.float64).x
    noise = Noise(torch.tensor([1]), (1,), dtype=torch.float64).start()
    assert (x / noise).item() == pytest.approx(0.362, abs=1e-3)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "grid", (Karras(), UniformLogSNR(-1.0, 9.0), Explicit((0.5, 2.0, math.inf))), ids=str
)
def test_the_first_sample_has_the_scale_of_the_data_and_the_noise_at_the_first_knot(grid, scaling):
    """The first sample is √(α² s² + σ²) z, with s the standard deviation of the data."""
    denoiser = small_denoiser(
        schedule=Cosine(scaling=scaling), prediction="flow_prediction", sigma_data=0.7
    )
    first = sample(denoiser, grid=grid, steps=2, seeds=SEEDS, batch_size=7).knots[0]
    u = math.exp(-first.logsnr / 2)
    expected = first.alpha * math.sqrt(0.49 + u**2) * Noise(torch.tensor(SEEDS), (2,)).start()
    torch.testing.assert_close(denoiser.network.inputs[0], expected, rtol=1e-6, atol=0)


def test_sampling_from_pure_noise_starts_with_standard_normal_noise():
    denoiser = small_denoiser()
    sample(denoiser, steps=2, seeds=SEEDS, batch_size=7)
    assert torch.equal(denoiser.network.inputs[0], Noise(torch.tensor(SEEDS), (2,)).start())


def test_a_network_can_be_sampled_at_the_levels_of_another_schedule():
    """Levels are matched by λ, so a network of the cosine schedule can use the knots of `Flow`."""
    grid = Explicit(tuple(knot.logsnr for knot in Trailing().knots(Flow(), 20)))
    record = process(Cosine())
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    x = sample(denoiser, grid=grid, steps=20, seeds=SEEDS, dtype=torch.float64, batch_size=7).x
    expected = sample(
        mixture(process(Flow())),
        grid=Trailing(),
        steps=20,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    ).x
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_an_unconditional_network_is_evaluated_without_labels():
    record = process(classes=0)
    denoiser = Denoiser(ExactNetwork(mixture(), record), record)
    sample(denoiser, steps=2, seeds=SEEDS)
    assert [labels for _, _, labels in denoiser.network.calls] == [None, None]


@pytest.mark.parametrize("fails", (False, True))
def test_the_network_is_evaluated_without_dropout_and_its_modes_are_restored(fails):
    network = RecordingNetwork(fails)
    denoiser = Denoiser(network, process()).train()
    network.frozen.eval()
    before = [module.training for module in denoiser.modules()]
    if fails:
        with pytest.raises(RuntimeError, match="the network failed"):
            sample(denoiser, steps=2, seeds=SEEDS)
    else:
        sample(denoiser, steps=2, seeds=SEEDS)
        assert network.modes == {False}
    assert [module.training for module in denoiser.modules()] == before
    assert True in before
    assert False in before


def test_sampling_tracks_no_gradients():
    assert not sample(small_denoiser(), steps=2, seeds=SEEDS).x.requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_samples_have_the_requested_dtype(dtype):
    assert sample(small_denoiser(), steps=2, seeds=SEEDS, dtype=dtype).x.dtype == dtype


@pytest.mark.parametrize("seed", (-1, 2**40, 2**63 - 1))
def test_seeds_have_64_bits(seed):
    x = sample(small_denoiser(), steps=2, seeds=[seed, 0, seed % 2**32]).x
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])


@pytest.mark.parametrize("make", (torch.tensor, np.array, tuple), ids=("torch", "numpy", "tuple"))
def test_seeds_may_be_a_tensor_or_an_array(make):
    seeds = [3, -1, 2**40]
    arguments = {"grid": Trailing(), "steps": 2}
    result = sample(mixture(), seeds=make(seeds), **arguments)
    assert torch.equal(result.x, sample(mixture(), seeds=seeds, **arguments).x)
