"""The increments of a path are those of one Brownian motion over the clock e^λ."""

import itertools
import math

import pytest
import torch
from scipy import stats

import diffcore.core.noise
from diffcore.core.brownian_path import increment_coefficients
from diffcore.core.noise import Noise
from diffcore.schedules import Cosine

SCHEDULE = Cosine()
KNOTS = [
    SCHEDULE.at(logsnr)
    for logsnr in (-math.inf, -14.0, -9.3, -4.0, -3.999, -0.5, 0.0, 0.25, 3.0, 7.7, 16.0)
]


def gram(intervals):
    """The covariance of the increments, from their coefficients on independent normals."""
    rows = [increment_coefficients(t, s) for t, s in intervals]
    return torch.tensor(
        [[sum(a.get(m, 0.0) * c for m, c in b.items()) for a in rows] for b in rows],
        dtype=torch.float64,
    )


def test_increments_of_the_path_are_independent_standard_normals():
    """The covariance of the increments of neighbouring intervals is the identity."""
    for knots in (KNOTS, KNOTS[::2], KNOTS[::3]):
        intervals = list(itertools.pairwise(knots))
        torch.testing.assert_close(
            gram(intervals), torch.eye(len(intervals)).double(), rtol=0, atol=1e-11
        )


def test_increments_that_overlap_have_the_covariance_of_one_motion():
    """Over (a, c) and (b, d), a < b < c < d: (c - b) / √((c - a)(d - b)) in clock time e^λ."""
    a, b, c, d = (math.exp(logsnr) for logsnr in (-1.0, -0.5, 0.5, 1.0))
    levels = [SCHEDULE.at(math.log(time)) for time in (a, b, c, d)]
    covariance = gram([(levels[0], levels[2]), (levels[1], levels[3])])[0, 1]
    expected = (c - b) / math.sqrt((c - a) * (d - b))
    assert covariance == pytest.approx(expected, rel=1e-4)  # levels are rounded to nodes
    assert gram([(levels[0], levels[1]), (levels[1], levels[0])])[0, 1] == pytest.approx(
        1, abs=1e-12
    )


def test_path_noise_is_standard_normal_and_depends_only_on_seed_and_interval():
    t, s = KNOTS[5:7]
    batch = Noise(torch.arange(4000), (3,), dtype=torch.float64, path=True)
    z = batch.between(t, s, 7)
    assert stats.kstest(z.flatten(), "norm").pvalue > 0.01
    assert torch.equal(z, batch.between(t, s, 8))
    for seed in (0, 17, 3999):
        alone = Noise(torch.tensor([seed]), (3,), dtype=torch.float64, path=True)
        assert torch.equal(alone.between(t, s, 0)[0], z[seed])
    assert torch.equal(batch.start(), Noise(torch.arange(4000), (3,), dtype=torch.float64).start())


def test_the_block_size_does_not_change_the_path(monkeypatch):
    noise = Noise(torch.arange(5), (3,), path=True)
    together = noise.between(*KNOTS[5:7], 0)
    monkeypatch.setattr(diffcore.core.noise, "BLOCK", 1)
    assert torch.equal(noise.between(*KNOTS[5:7], 0), together)


def test_steps_of_ddpm_compose_exactly_along_the_path():
    """With x_0 fixed, one step of DDIM(1) ends at the same ε as several steps."""
    noise = Noise(torch.arange(3), (2,), dtype=torch.float64, path=True)
    nodes = (200_000, 300_000, 500_000, 510_000, 800_000)  # levels at nodes are not rounded
    logsnrs = [4 * math.log(k / (2**20 - k)) for k in nodes]
    levels = [SCHEDULE.at(-math.inf), *map(SCHEDULE.at, logsnrs)]

    def integrate(levels):
        eps = torch.zeros(3, 2, dtype=torch.float64)
        for t, s in itertools.pairwise(levels):
            r = math.exp((t.logsnr - s.logsnr) / 2)
            eps = r * eps + math.sqrt(1 - r**2) * noise.between(t, s, 0)
        return eps

    torch.testing.assert_close(integrate(levels), integrate(levels[::5]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        integrate([levels[0], *levels[3:]]), integrate(levels[::5]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("t", "s", "message"),
    [
        (SCHEDULE.at(3.0), SCHEDULE.at(math.inf), "clean level"),
        (SCHEDULE.at(3.0), SCHEDULE.at(3.0 + 1e-9), "closer than"),
        (SCHEDULE.at(torch.zeros(2, 1)), SCHEDULE.at(torch.ones(2, 1)), "map of levels"),
    ],
)
def test_steps_that_a_path_cannot_take_are_refused(t, s, message):
    with pytest.raises(ValueError, match=message):
        Noise(torch.arange(2), (1,), path=True).between(t, s, 0)
