"""Power-function averages have their closed form; any length is reconstructed from snapshots."""

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from diffcore.training.averages.ema import EMA
from diffcore.training.averages.power_ema import (
    MAX_LENGTH,
    PowerFunction,
    Profile,
    Snapshots,
    combine_profiles,
    find_snapshots,
    reconstruct,
    write_snapshot,
)

STEPS = 400


class Walk(nn.Module):
    """Three weights that follow a fixed path, and a counter of the steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        noise = np.random.default_rng(0).normal(size=(STEPS + 1, 3)) / STEPS**0.5
        smooth = np.linspace(0, 1, STEPS + 1)[:, None] ** np.array([0.3, 0.5, 1.0])
        self.path = torch.from_numpy(noise.cumsum(0) + 4 * smooth).float()

    def move(self, step):
        with torch.no_grad():
            self.weight.copy_(self.path[step])
            self.count.fill_(step)


def walk(*lengths, folder=None, every=50):
    """The averages of a walk; each is written to the folder, if there is one, every few steps."""
    module = Walk()
    averages = {length: EMA(module, PowerFunction(length)) for length in lengths}
    for step in range(1, STEPS + 1):
        module.move(step)
        for length, average in averages.items():
            average.update(step)
            if folder and step % every == 0:
                write_snapshot(folder, length, step, average.shadow)
    return averages


@pytest.mark.parametrize("length", (0.01, 0.05, 0.1, 0.2, MAX_LENGTH))
def test_the_profile_has_its_length(length):
    gamma = PowerFunction(length).gamma

    def moment(k):
        return integrate.quad(lambda tau: (gamma + 1) * tau ** (gamma + k), 0, 1)[0]

    assert (moment(2) - moment(1) ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", (0.05, 0.1, 0.25))
def test_the_average_of_a_ramp_is_its_closed_form(length):
    """Σ τ (τ^p - (τ-1)^p) / t^p = t - Σ_{τ<t} (τ/t)^p with p = γ+1."""
    module = Walk()
    module.weight.data.fill_(7.0)  # the initial weights have no share
    average = EMA(module, PowerFunction(length))
    for step in range(1, STEPS + 1):
        module.weight.data.fill_(float(step))
        average.update(step)
    power = PowerFunction(length).gamma + 1
    expected = STEPS - sum((tau / STEPS) ** power for tau in range(1, STEPS))
    assert average.shadow["weight"].tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_the_coefficients_minimise_the_distance_of_profiles():
    profiles = [Profile(step, gamma) for step in (40, 100) for gamma in (3.0, 9.0)]
    target = Profile(100, 5.0)
    found = combine_profiles(profiles, target)
    tau = (np.arange(100_000) + 0.5) / 1000

    def density(profile):
        inside = tau <= profile.step
        return inside * (profile.gamma + 1) * (tau / profile.step) ** profile.gamma / profile.step

    basis, wanted = np.stack([density(each) for each in profiles], 1), density(target)
    expected = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-3, atol=1e-5)
    distance = np.linalg.norm(basis @ expected - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(distance, rel=1e-3)


@pytest.mark.parametrize("length", (0.05, 0.07, 0.1, 0.13))
@pytest.mark.parametrize("step", (STEPS, STEPS // 2))
def test_a_reconstruction_is_near_the_average_that_was_tracked(tmp_path, length, step):
    walk(0.05, 0.1, folder=tmp_path, every=20)
    walk(length, folder=tmp_path / "directly", every=step)
    expected, _ = reconstruct(find_snapshots(tmp_path / "directly", step), length)
    found, error = reconstruct(find_snapshots(tmp_path, step), length)
    assert error < 0.03
    assert ((found["weight"] - expected["weight"]).abs() < 1e-3 * expected["weight"].abs()).all()
    assert found["count"] == step


def test_a_length_that_was_tracked_is_reconstructed_exactly(tmp_path):
    tracked = walk(0.05, 0.1, folder=tmp_path)
    for length, average in tracked.items():
        found, error = reconstruct(find_snapshots(tmp_path), length)
        assert error < 1e-6
        torch.testing.assert_close(found["weight"], average.shadow["weight"], rtol=1e-5, atol=1e-6)


def test_bad_lengths_and_steps_are_refused(tmp_path):
    for length in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match=r"expected a standard deviation .* such as 0.05"):
            PowerFunction(length)
    with pytest.raises(ValueError, match="that differ in four decimals"):
        Snapshots((0.1, 0.1))
    with pytest.raises(ValueError, match="every is 0"):
        Snapshots((0.1,), every=0)
    with pytest.raises(ValueError, match=r"holds no snapshots: train with --snapshots.lengths"):
        find_snapshots(tmp_path)
    walk(0.1, folder=tmp_path, every=200)
    with pytest.raises(ValueError, match="no snapshot is at step 300, expected one of 200, 400"):
        reconstruct(find_snapshots(tmp_path), 0.1, 300)
    with pytest.raises(ValueError, match="no snapshots up to step 100"):
        find_snapshots(tmp_path, 100)


def test_a_snapshot_is_due_at_multiples_and_at_the_end():
    snapshots = Snapshots((0.1,), every=40)
    assert [step for step in range(1, 101) if snapshots.is_due(step, 100)] == [40, 80, 100]
    assert not Snapshots().is_due(1000, 1000)
