"""Round trips of inversion: their errors, and the table."""

import torch
from benchmarks.accuracy import plane
from experiments.inversion import (
    RoundTrip,
    format_table,
    measure_replay,
    measure_round_trip,
    measure_round_trips,
    train_denoiser,
)

from diffcore.core.denoiser import Denoiser
from diffcore.training.data import Digits


def test_points_of_an_oracle_come_back_with_the_errors_of_ddim_inversion():
    """Sampling over other knots than those of the inversion would give larger errors."""
    x0 = plane().sample(torch.arange(32))
    explicit, solved = (
        measure_round_trip(plane(), x0, None, 50, iterations) for iterations in (1, 10)
    )
    assert 4e-3 < explicit.median < 1.6e-2
    assert solved.worst < 1e-6
    assert solved.residual < 1e-5 < explicit.residual


def test_a_trained_network_is_measured_for_all_combinations_and_its_maps_replay():
    denoiser, digits = train_denoiser(2), Digits("test")
    assert isinstance(denoiser, Denoiser)
    assert not denoiser.training
    x0, labels = digits.x0[:2], digits.labels[:2]
    found = list(measure_round_trips(denoiser, x0, labels, (2, 3), (1, 2)))
    assert [(t.steps, t.iterations) for t in found] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert measure_replay(denoiser, x0, labels, 3) < 1e-5


def test_the_table_has_a_row_for_each_number_of_steps():
    found = [
        RoundTrip(20, 1, 0.1, 0.3, 1.0),
        RoundTrip(20, 5, 0.01, 0.02, 1.0),
        RoundTrip(50, 1, 0.04, 0.1, 1.0),
        RoundTrip(50, 5, 1e-3, 0.1, 1.0),
    ]
    assert format_table(found).splitlines() == [
        "| steps | 1 iteration | 5 iterations |",
        "|---|---|---|",
        "| 20 | 0.1 (worst 0.3) | 0.01 (worst 0.02) |",
        "| 50 | 0.04 (worst 0.1) | 0.001 (worst 0.1) |",
    ]
