"""The check of samples on generated data finds nothing in the data itself, and noise in noise."""

import check_generated
import numpy as np
import pytest
import torch

from diffcore.training.data import Balls, MovingBalls, Sines


def test_the_fits_recover_the_data_and_see_noise(capsys):
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 1, 8, 8, 8)).astype(np.float32)
    for check, data in (
        (check_generated.check_volumes, Balls(2, 8).x0),
        (check_generated.check_video, MovingBalls(2, 4, 8).x0),
    ):
        check(data.numpy())
        assert "median 0.000" in capsys.readouterr().out
        check(data.numpy() + noise[:, :, : data.shape[2]])
        assert float(capsys.readouterr().out.split("median ")[1][:5]) == pytest.approx(0.1, 0.2)
    frequency, amplitude, outside = check_generated.fit_sine(
        Sines(1, 64, 5, 5.001).x0[0, 0].double().numpy()
    )
    assert frequency == pytest.approx(5, abs=0.01)
    assert 0.5 < amplitude < 1
    assert outside < 1e-4


def test_the_energy_distance_is_that_of_two_shifted_points():
    a, b = torch.zeros(5, 2).numpy(), torch.tensor([[3.0, 4]]).expand(5, 2).numpy()
    assert check_generated.energy_distance(a, b) == pytest.approx(10)
    assert check_generated.energy_distance(a, a) == pytest.approx(0)
