"""Parts that the studies share: training, and measurements that a later run continues."""

import pytest
import torch
from benchmarks.table import markdown_table, mean_and_half_range
from experiments.study import continue_study, read_measurements, small_unet, train_averaged
from experiments.training import VARIANTS, digits_trainer

from diffcore.run import Run


def test_a_study_measures_only_the_cells_that_its_file_lacks(tmp_path):
    calls = []

    def measure(name, seed):
        calls.append((name, seed))
        return [{"grid": grid, "value": seed} for grid in ("a", "b")]

    path = tmp_path / "study.jsonl"
    first = list(continue_study(path, ("name", "seed"), [("λ", 0)], measure))
    assert first == path.read_text().splitlines()
    assert first[0] == '{"name": "λ", "seed": 0, "grid": "a", "value": 0}'
    assert len(list(continue_study(path, ("name", "seed"), [("λ", 0), ("λ", 1)], measure))) == 2
    assert calls == [("λ", 0), ("λ", 1)]
    assert [row["value"] for row in read_measurements(path)] == [0, 0, 1, 1]


def test_a_file_that_does_not_exist_holds_no_measurements(tmp_path):
    assert read_measurements(tmp_path / "none.jsonl") == []


def test_a_trained_network_has_the_averaged_weights_of_its_run(tmp_path):
    trainer = digits_trainer(VARIANTS["cosine, v, Min-SNR"], "stratified", 0, tmp_path, 2)
    denoiser = train_averaged(trainer)
    again = Run(tmp_path).denoiser(network=small_unet(8, 1, (24, 56), 11))
    assert not denoiser.training
    for value, other in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(value, other)


def test_a_table_has_a_header_and_one_line_for_each_row():
    assert markdown_table(["a", "b"], [["1", "2"]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
    ]


@pytest.mark.parametrize(
    ("values", "cell"), [([], ""), ([1.25], "1.2"), ([10.0, 20.0, 12.0], "14.0 ± 5.0")], ids=str
)
def test_a_cell_is_the_mean_over_seeds_with_half_the_range(values, cell):
    assert mean_and_half_range(values, 1) == cell
