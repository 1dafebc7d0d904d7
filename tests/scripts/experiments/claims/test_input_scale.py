"""The study of scaled data: the identity holds for the shift 2 ln b, and for no other."""

import torch
from experiments.claims import input_scale
from experiments.claims.input_scale import NormalizedInput, measure, trajectory_difference

from diffcore.core.process import Process
from diffcore.schedules import Cosine, Shifted


def test_trajectories_agree_for_a_shift_of_2_ln_b_only(monkeypatch):
    assert trajectory_difference(0.3, 0, 5) < 1e-12
    monkeypatch.setattr(
        input_scale.Shifted, "by_input_scale", lambda schedule, b: Shifted(schedule, 1.5 * b)
    )
    assert trajectory_difference(0.3, 0, 5) > 1e-2


def test_a_normalised_input_of_scaled_data_is_that_of_the_shifted_schedule():
    b, t = 0.3, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(-1, 1, 1, 1)
    x0, noise = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    scaled, shifted = (
        schedule.level(t) for schedule in (Cosine(), Shifted.by_input_scale(Cosine(), b))
    )
    network = NormalizedInput(_Echo(), Process(), b)
    found = network(scaled.alpha * b * x0 + scaled.sigma * noise, 1000 * t.flatten() - 1)
    assert torch.allclose(found, shifted.alpha * x0 + shifted.sigma * noise, atol=1e-12)


class _Echo(torch.nn.Module):
    def forward(self, x, time, class_labels=None):
        return x


def test_losses_agree_with_a_normalised_input_only():
    found = measure(0.3, 0, steps=2)
    assert found["losses"] < 1e-9 < 1e-4 < found["plain"]
