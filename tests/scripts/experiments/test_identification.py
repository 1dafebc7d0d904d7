"""The study of identification: its table names what was trained and what was found."""

import pytest
from experiments.identification import measure_table


@pytest.mark.slow
def test_the_processes_of_short_trainings_are_found():
    names = (
        "epsilon, linear (DDPM), conditioned on index",
        "v_prediction, cosine, conditioned on index",
        "flow_prediction, flow, conditioned on 1000 t",
    )
    header, _, *rows = measure_table(150, names, 100).splitlines()
    assert header.startswith("| trained on | found |")
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {name}", "yes"] for name in names]
