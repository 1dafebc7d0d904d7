"""Interpolated noise is standard normal, arcs stay on the sphere, and combinations of images have
the noise of their level.
"""

import math
from dataclasses import replace

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.editing.interpolation import Blend, noise_diffusion, slerp
from diffcore.editing.inversion import invert
from diffcore.samplers import DDIM
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Karras
from tests.helpers.oracles import SCALINGS, mixture

SAMPLES = 500
A, B = torch.arange(SAMPLES), torch.arange(SAMPLES) + 10_000
DOUBLE = {"dtype": torch.float64}


def blend(weight, shape=(4,)):
    return Blend(A, shape, others=B, weight=weight, **DOUBLE)


@pytest.mark.parametrize("weight", (0.0, 0.3, 0.5, 1.0))
@pytest.mark.parametrize(
    "draw", (lambda noise: noise.start(), lambda noise: noise.step(3)), ids=("start", "step")
)
def test_a_blend_of_two_seeds_is_standard_normal(weight, draw):
    """For 2000 numbers the mean is within 5/√2000 and the standard deviation within 5/√4000.

    Linear interpolation would have a standard deviation of 0.71 at w = ½.
    """
    z = draw(blend(weight))
    assert z.mean().abs() < 0.11
    assert z.std() == pytest.approx(1, abs=0.08)
    assert z.square().sum(1).mean() == pytest.approx(
        4, abs=0.64
    )  # the distribution of the norm: 5 √(8/500)
    a, b = (draw(Noise(seeds, (4,), **DOUBLE)) for seeds in (A, B))
    torch.testing.assert_close(
        z, math.cos(math.pi * weight / 2) * a + math.sin(math.pi * weight / 2) * b
    )


def test_a_blend_interpolates_between_the_stochastic_samples_of_two_seeds():
    oracle, knots = mixture(), Karras(0.05, 20.0).knots(Cosine(), 10)

    def generate(noise):
        return integrate(oracle, DDIM(1.0), noise.first_sample(knots[0], 0.5), knots, noise)[0]

    ends = [generate(Noise(seeds, (2,), **DOUBLE)) for seeds in (A, B)]
    weights = torch.linspace(0, 1, SAMPLES, **DOUBLE)
    between = generate(replace(blend(weights), shape=(2,)))
    torch.testing.assert_close(between[0], ends[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(between[-1], ends[1][-1], rtol=0, atol=1e-12)
    density = oracle.log_density(between, Cosine().at(30.0)).median()
    assert density > oracle.log_density(ends[0], Cosine().at(30.0)).median() - 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": A}, "expected two different seeds for each sample"),
        ({"others": B[:3]}, "expected two different seeds for each sample"),
        ({"weight": 1.5}, "weight is 1.5, expected values within"),
        ({"weight": math.nan}, "weight is nan"),
    ],
)
def test_blends_that_are_not_standard_normal_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(Blend(A[:4], (2,), others=B[:4], weight=0.5), **change)


def images(count=6, shape=(1, 4, 4)):
    return tuple(Noise(torch.arange(count) + seed, shape, **DOUBLE).start() for seed in (0, 100))


@pytest.mark.parametrize("weight", (0.0, 0.25, 0.5, 1.0))
def test_slerp_is_a_point_of_the_arc(weight):
    """The angle to each end is proportional to the weight, and equal norms are preserved."""
    a, b = images()
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    x = slerp(a, b, weight)

    def angle(u, v):
        return torch.nn.functional.cosine_similarity(u.flatten(1), v.flatten(1)).clamp(-1, 1).acos()

    torch.testing.assert_close(
        x.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(angle(a, x), weight * angle(a, b), rtol=0, atol=1e-7)
    torch.testing.assert_close(angle(x, b), (1 - weight) * angle(a, b), rtol=0, atol=1e-7)


def test_slerp_of_a_sample_with_itself_is_that_sample():
    a, _ = images()
    torch.testing.assert_close(slerp(a, a, 0.3), a, rtol=1e-12, atol=0)
    torch.testing.assert_close(slerp(a, a * (1 + 1e-9), 0.3), a, rtol=1e-8, atol=0)


def test_slerp_accepts_one_weight_per_sample():
    a, b = images()
    weights = torch.linspace(0, 1, 6)
    torch.testing.assert_close(slerp(a, b, weights)[4], slerp(a, b, 0.8)[4], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected values within"):
        slerp(a, b, -0.1)


def test_interpolation_of_two_inverted_images_has_these_images_as_ends():
    oracle, knots = mixture(), Karras(0.02, 50.0).knots(Cosine(), 40)
    a, b = (oracle.sample(seeds) for seeds in (torch.arange(8), torch.arange(8) + 50))
    ends = [invert(oracle, x0, knots, 15).x for x0 in (a, b)]
    for weight, image in ((0.0, a), (1.0, b)):
        x, _ = integrate(oracle, DDIM(), slerp(*ends, weight), knots, Noise(torch.arange(8), (2,)))
        torch.testing.assert_close(x, image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("gamma", (0.0, 0.6))
@pytest.mark.parametrize("weight", (0.0, 0.3, 1.0))
def test_the_combination_is_images_plus_noise_with_the_variance_of_the_level(
    weight, gamma, scaling
):
    """α (μ x_a + ν x_b) + σ (p ε_a + q ε_b + γ z), with p² + q² + γ² = 1 and μ + ν = 1.2."""
    level = Cosine(scaling=scaling).at(-1.0)
    (x_a, x_b), (e_a, e_b, z) = (
        images(),
        (Noise(torch.arange(6) + s, (1, 4, 4), **DOUBLE).start() for s in (7, 70, 700)),
    )
    a, b = (level.alpha * x0 + level.sigma * eps for x0, eps in ((x_a, e_a), (x_b, e_b)))
    combined = noise_diffusion(a, b, x_a, x_b, level, weight, z, gamma, bound=math.inf)
    angle = weight * math.pi / 2
    p, q = math.sqrt(1 - gamma**2) * math.cos(angle), math.sqrt(1 - gamma**2) * math.sin(angle)
    mu = 1.2 * math.cos(angle) / (math.cos(angle) + math.sin(angle))
    expected = level.alpha * (mu * x_a + (1.2 - mu) * x_b) + level.sigma * (
        p * e_a + q * e_b + gamma * z
    )
    torch.testing.assert_close(combined, expected, rtol=1e-10, atol=1e-10)
    assert p**2 + q**2 + gamma**2 == pytest.approx(1)


def test_without_extra_image_weight_the_ends_are_the_images():
    (a, b), level = images(), Cosine().at(-1.0)
    for weight, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(
            noise_diffusion(a, b, a / 2, b / 3, level, weight, image=1.0, bound=math.inf), end
        )


def test_extreme_values_are_clipped_before_and_after_the_combination():
    level = Cosine(scaling="ve").at(-1.0)
    n = math.hypot(level.alpha, level.sigma)
    far, zero = torch.full((1, 2), 50.0, **DOUBLE), torch.zeros(1, 2, **DOUBLE)
    assert noise_diffusion(far, zero, zero, zero, level, 0.5) == pytest.approx(
        2 * n * math.sqrt(0.5)
    )
    assert noise_diffusion(zero, zero, far, zero, level, 0.0) == pytest.approx(2 * n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.5}, "gamma is 0.5"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"bound": 0.0}, "bound is 0.0"),
        ({"weight": 2}, "weight"),
    ],
)
def test_options_out_of_range_are_rejected(change, message):
    a, b = images()
    with pytest.raises(ValueError, match=message):
        noise_diffusion(
            **{"a": a, "b": b, "image_a": a, "image_b": b, "level": Cosine().at(0.0), "weight": 0.5}
            | change
        )
