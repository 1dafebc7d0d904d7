"""The study of learned encoders: its measurements and its table."""

import pytest
from experiments.learned.encoder import ARMS, PARTS, SHAPE, build, format_table, measure

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.schedules import LogLinear


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_measured_by_the_parts_of_its_bound(arm):
    network, estimate = build(arm, width=8)
    process = Process(LogLinear(-5.0, 8.0), shape=SHAPE, sigma_data=0.75, estimate=estimate)
    found = measure(Denoiser(network(), process).eval(), 2)
    assert found["bits"] == pytest.approx(sum(found[part] for part in PARTS[1:]))
    assert found["bits"] > 4
    assert found["change"] == 0  # of an encoder that was not trained


def test_the_table_has_a_row_for_each_arm_with_the_spread_of_the_seeds():
    parts = dict.fromkeys((*PARTS[1:], "change"), 0.0)
    rows = [
        {"arm": arm, "seed": seed, "count": 25, "bits": bits + seed, **parts}
        for arm, bits in (("none", 3.0), ("learned, c = 0", 2.0))
        for seed in (0, 1)
    ]
    lines = format_table(rows, 25).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [
        ["none", "3.500 ± 0.500"],
        ["learned, c = 0", "2.500 ± 0.500"],
    ]
