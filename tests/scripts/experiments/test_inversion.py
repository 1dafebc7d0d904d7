"""Round trips of inversion: what is measured, and how it is shown."""

import torch
from benchmarks.accuracy import plane
from experiments.inversion import Trip, replayed, table, trained, trip, trips

from diffcore.core.denoiser import Denoiser
from diffcore.training.data import Digits


def test_an_oracle_comes_back_as_tests_of_inversion_say():
    """Would be a bug: sampling over other knots than were inverted."""
    x0 = plane().sample(torch.arange(32))
    explicit, solved = (trip(plane(), x0, None, 50, iterations) for iterations in (1, 10))
    assert 4e-3 < explicit.median < 1.6e-2
    assert solved.worst < 1e-6
    assert solved.residual < 1e-5 < explicit.residual


def test_the_trained_network_is_asked_for_all_and_its_maps_replay():
    denoiser, digits = trained(2), Digits("test")
    assert isinstance(denoiser, Denoiser)
    assert not denoiser.training
    x0, labels = digits.x0[:2], digits.labels[:2]
    found = list(trips(denoiser, x0, labels, (2, 3), (1, 2)))
    assert [(t.steps, t.iterations) for t in found] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert replayed(denoiser, x0, labels, 3) < 1e-5


def test_the_table_has_a_row_for_each_number_of_steps():
    found = [
        Trip(20, 1, 0.1, 0.3, 1.0),
        Trip(20, 5, 0.01, 0.02, 1.0),
        Trip(50, 1, 0.04, 0.1, 1.0),
        Trip(50, 5, 1e-3, 0.1, 1.0),
    ]
    assert table(found).splitlines() == [
        "| steps | 1 iteration | 5 iterations |",
        "|---|---|---|",
        "| 20 | 0.1 (worst 0.3) | 0.01 (worst 0.02) |",
        "| 50 | 0.04 (worst 0.1) | 0.001 (worst 0.1) |",
    ]
