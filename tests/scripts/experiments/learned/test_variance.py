"""The study of DDPM's variances: its measurements and its table."""

import pytest
from experiments.learned.variance import ARMS, TABLES, format_table, measure

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.networks import Perceptron

ROWS = [
    {"arm": arm, "seed": seed, "variance": v, "count": count, "bits": bits + seed}
    for arm, v, bits in (("mean alone", 0.0, 3.0), ("mean alone", 1.0, 2.0), ("other", None, 1.0))
    for count in (10, 25)
    for seed in (0, 1)
]


def test_a_network_is_measured_with_its_own_variance_and_with_a_number():
    process = Process(shape=(1, 8, 8), classes=10, dropout=0.1, variance="learned")
    denoiser = Denoiser(Perceptron((1, 8, 8), 8, 1, 10, True), process).eval()
    own, given = (measure(denoiser, v, 2, 0, per_label=1) for v in (None, 0.0))
    assert own.keys() == given.keys() == TABLES.keys()
    assert own["bits"] != given["bits"]
    assert own["train"] != given["train"]


def test_the_table_has_a_row_for_each_variance_with_the_spread_of_the_seeds():
    rows = format_table(ROWS, "bits").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in cells] == ["β̃ (v = 0)", "β (v = 1)", "learned"]
    assert cells[0][2:] == ["3.50 ± 0.50", "3.50 ± 0.50"]


@pytest.mark.parametrize("variational", [each for each in ARMS.values() if each])
def test_a_term_has_the_factor_one_in_both_arms(variational):
    assert variational.weight * variational.steps == pytest.approx(1)
