"""Noise maps reproduce their image, and edit it under another condition."""

import math

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.editing.noise_maps import extract, replay
from diffcore.guidance import CFG
from diffcore.samplers import DDIM
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Karras, Trailing, Within
from tests.helpers.oracles import SCALINGS, mixture, process, unet
from tests.helpers.recording_network import RecordingNetwork

SEEDS = torch.arange(32)
NOISE = Noise(SEEDS + 1000, (2,), dtype=torch.float64)
GRIDS = (Trailing(), Karras(0.02, 50.0), Within(Trailing(), low=0.0))


@pytest.mark.parametrize("eta", (0.3, 1.0))
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_image_is_reproduced_to_1e_12_in_float64(grid, scaling, eta):
    oracle = mixture(process(Cosine(scaling=scaling)))
    if scaling == "ve" and isinstance(grid, Trailing):
        grid = Karras()
    x0, labels = oracle.sample(SEEDS), SEEDS % 2
    maps = extract(
        oracle, x0, grid.knots(oracle.process.schedule, 12), NOISE, eta, CFG(1.5), labels
    )
    torch.testing.assert_close(replay(oracle, maps, CFG(1.5), labels), x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", (1, 2, 20))
def test_the_image_of_a_network_is_reproduced_to_1e_5_in_float32(steps):
    denoiser = Denoiser(unet(), process(Discrete(), shape=(1, 8, 8))).train()
    x0 = Noise(torch.arange(4), (1, 8, 8)).start() / 2
    maps = extract(
        denoiser, x0, Trailing().knots(Discrete(), steps), Noise(torch.arange(4) + 9, (1, 8, 8))
    )
    assert maps.noise.maps.dtype == torch.float32
    assert not maps.x.requires_grad
    torch.testing.assert_close(replay(denoiser, maps), x0, rtol=0, atol=1e-5)
    assert denoiser.training


@pytest.mark.parametrize("eta", (0.5, 1.0))
def test_the_maps_are_the_posteriors_of_independent_noisy_copies(eta):
    """2304.06140, Algorithm 1 with 2010.02502, eq. 12 and 16 in the vp scaling."""
    oracle = mixture()
    x0, knots = oracle.sample(SEEDS), Explicit((-4.0, -1.0, 0.5, 3.0, math.inf)).knots(Cosine(), 4)
    maps = extract(oracle, x0, knots, NOISE, eta)
    copies = [
        knot.alpha * x0 + knot.sigma * z
        for knot, z in zip(knots, [NOISE.start(), *map(NOISE.step, range(4))], strict=True)
    ]
    assert torch.equal(maps.x, copies[0])
    for i, (t, s) in enumerate(zip(knots[:-2], knots[1:-1], strict=True)):
        predicted, eps = oracle(copies[i], t)
        std = (
            eta
            * math.sqrt((1 - s.alpha**2) / (1 - t.alpha**2))
            * math.sqrt(1 - t.alpha**2 / s.alpha**2)
        )
        mean = s.alpha * predicted + math.sqrt(s.sigma**2 - std**2) * eps
        torch.testing.assert_close(
            maps.noise.step(i), (copies[i + 1] - mean) / std, rtol=1e-9, atol=1e-9
        )
    assert torch.equal(maps.noise.step(3), torch.zeros_like(x0))
    torch.testing.assert_close(maps.rest, x0 - oracle(copies[3], knots[3]).x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("grid", "last"), [(Trailing(), 0.158), (Karras(0.02, 50.0), 0.02)], ids=str
)
def test_the_sampler_generates_the_image_from_the_maps_except_for_the_error_of_the_clean_step(
    grid, last
):
    """The error has the size of σ/α at the last noisy knot, in root mean square."""
    oracle = mixture()
    x0, knots = oracle.sample(SEEDS), grid.knots(Cosine(), 10)
    maps = extract(oracle, x0, knots, NOISE)
    x, evaluations = integrate(oracle, DDIM(1.0), maps.x, knots, maps.noise)
    assert evaluations == 10
    torch.testing.assert_close(x, x0 - maps.rest, rtol=0, atol=1e-12)
    assert 0.3 * last < maps.rest.square().sum(1).mean().sqrt() < 1.8 * last


def test_the_maps_vary_more_than_noise():
    """Copies with independent noise differ more than successive samples, which makes edits work."""
    oracle = mixture()
    maps = extract(oracle, oracle.sample(SEEDS), Trailing().knots(Cosine(), 100), NOISE).noise.maps
    assert maps[10:90].std() > 1.5


@pytest.mark.parametrize("start", (-math.inf, -3.0))
def test_another_condition_changes_the_class(start):
    """Class 0 is one Gaussian, class 1 two others; replay with label 1 moves images to class 1."""
    oracle, clean = mixture(), Cosine().at(30.0)
    zero, one = (torch.full((32,), label) for label in (0, 1))
    x0 = oracle.sample(SEEDS, zero)
    knots = Within(Trailing(), low=start).knots(Cosine(), 50)
    maps = extract(oracle, x0, knots, NOISE, condition=zero)

    def share(x):
        """Share of the images that are more likely in class 1 than in class 0."""
        return (
            (oracle.log_density(x, clean, one) > oracle.log_density(x, clean, zero)).double().mean()
        )

    edited = replay(oracle, maps, condition=one)
    assert share(x0) < 0.1
    assert share(edited) > 0.9
    assert share(replay(oracle, maps, condition=zero)) == share(x0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "eta is 0, with which DDIM adds no noise"),
        (
            {"knots": Explicit((-2.0, 0.0)).knots(Cosine(), 1)},
            r"last knot is at λ = 0.0, expected the clean level \(λ = inf\)",
        ),
        (
            {"knots": Explicit((math.inf, 0.0)).knots(Cosine(), 1)},
            "expected two or more that fall in noise",
        ),
        ({"guidance": CFG(2.0)}, "needs a condition"),
    ],
    ids=str,
)
def test_arguments_without_noise_maps_are_rejected(changes, message):
    arguments = {
        "x0": torch.zeros(32, 2),
        "knots": Trailing().knots(Cosine(), 3),
        "noise": NOISE,
    } | changes
    with pytest.raises(ValueError, match=message):
        extract(mixture(), **arguments)


def test_networks_are_evaluated_without_dropout_and_return_to_training():
    network = RecordingNetwork()
    denoiser = Denoiser(network, process(classes=0)).train()
    knots = Karras(0.05, 20.0).knots(Cosine(), 3)
    maps = extract(denoiser, torch.zeros(2, 2), knots, Noise(torch.arange(2), (2,)))
    assert network.modes == {False}
    assert network.training
    replay(denoiser, maps)
    assert network.modes == {False}
    assert network.training
