"""The study of identification: its table names what was trained and what was found."""

from experiments.identification import TRAINED, measure_table


def test_a_network_of_few_steps_has_a_row():
    name = TRAINED[-3]
    header, _, row = measure_table(2, [name], 4).splitlines()
    assert header.startswith("| trained on | found |")
    assert row.startswith(f"| {name} | ")
