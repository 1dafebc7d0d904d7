"""The study of identification: its table names what was trained and what was found."""

import pytest
from experiments.identification import TRAINED, measure_table


def test_a_network_of_few_steps_has_a_row():
    name = TRAINED[-3]
    header, _, row = measure_table(2, [name], 4).splitlines()
    assert header.startswith("| trained on | found |")
    assert row.startswith(f"| {name} | ")


@pytest.mark.slow
def test_the_processes_of_short_trainings_are_found():
    names = (
        "epsilon, linear (DDPM), conditioned on index",
        "v_prediction, cosine, conditioned on index",
        "flow_prediction, flow, conditioned on 1000 t",
    )
    rows = measure_table(150, names, 100).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {name}", "yes"] for name in names]
