"""The study of learned levels: its measurements and its table."""

import pytest
from experiments.learned.levels import ARMS, PARTS, SHAPE, build, format_table, measure

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.schedules import LogLinear


@pytest.mark.parametrize("latent", ARMS.values())
def test_each_arm_is_measured_by_the_parts_of_its_bound(latent):
    network, levels = build(latent, width=8)
    process = Process(LogLinear(-5.0, 8.0), shape=SHAPE, sigma_data=0.75, levels=levels)
    found = measure(Denoiser(network(), process).eval(), 2)
    assert found["bits"] == pytest.approx(sum(found[part] for part in PARTS[1:]))
    assert found["bits"] > 4
    assert found["spread"] == pytest.approx(0, abs=1e-6)  # of levels that were not trained


def test_the_table_has_a_row_for_each_arm_with_the_spread_of_the_seeds():
    parts = dict.fromkeys((*PARTS[1:], "spread"), 0.0)
    rows = [
        {"arm": arm, "seed": seed, "count": count, "bits": bits + seed, **parts}
        for arm, bits in (("shared", 3.0), ("learned", 2.0))
        for count in (25, 250)
        for seed in (0, 1)
    ]
    lines = format_table(rows, 25).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [
        ["shared", "3.500 ± 0.500"],
        ["learned", "2.500 ± 0.500"],
    ]
