"""The study of zero terminal SNR: its images, its measurements, its table and its picture."""

import pytest
import torch
from experiments import zero_terminal_snr as brightness_study
from experiments.study import read_measurements
from experiments.zero_terminal_snr import (
    GRIDS,
    VARIANTS,
    BrightnessFields,
    brightness,
    create_denoiser,
    draw,
    format_table,
    measure,
    measure_data,
    measure_variant,
    run_study,
    share_outside,
)

from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import EmpiricalDistribution

EXACT = "zero terminal SNR, exact"


def test_images_lie_in_their_range_with_a_uniform_mean():
    fields = BrightnessFields(2000)
    m = brightness(fields.x0)
    assert fields.x0.shape == (2000, 3, 16, 16)
    assert fields.x0.abs().max() <= 1
    assert (
        (m.sort().values + 1) / 2 - torch.arange(2000) / 2000
    ).abs().max() < 0.03  # Kolmogorov-Smirnov: 0.0304 at 5 %
    assert (fields.x0.flatten(1).std(1) > 0.2 * (1 - m.abs())).all()
    assert torch.equal(BrightnessFields(10).x0, fields.x0[:10])
    assert not torch.equal(BrightnessFields(10, seed=1).x0, fields.x0[:10])


def test_measurements_are_those_of_known_distributions():
    even = torch.arange(1000) / 500 - 0.999  # the uniform distribution's own quantiles
    found = measure(even)
    assert found["distance"] == pytest.approx(0, abs=1e-6)
    assert found["beyond"] == pytest.approx(0.4)
    assert found["std"] == pytest.approx(3**-0.5, rel=2e-3)
    assert sum(found["histogram"]) == 1000
    assert found["histogram"][:2] == found["histogram"][-2:] == [0, 0]
    assert measure(0.5 * even)["distance"] == pytest.approx(
        0.25, abs=1e-6
    )  # ∫ |q/2| dq over [-1, 1], halved
    assert measure(even + 3)["histogram"][-1] == 1000  # what lies beyond is counted at the end
    assert share_outside(found["histogram"]) == 0
    assert share_outside(measure(1.05 * even)["histogram"]) == pytest.approx(0.048, abs=2e-3)
    assert measure_data(1000)["distance"] < 0.05


def test_the_flawed_table_ends_at_its_documented_level():
    assert [
        float(variant.schedule.level(1.0).alpha) for variant in VARIANTS.values()
    ] == pytest.approx([0.0683, 0.0683, 0, 0.0683, 0], abs=1e-4)


def test_an_exact_network_reaches_further_with_zero_terminal_snr(monkeypatch):
    """Sampling that starts elsewhere than the schedule ends would fail. Smaller than the study."""
    monkeypatch.setattr(brightness_study, "STEPS", 20)
    monkeypatch.setattr(brightness_study, "GRIDS", {"Trailing()": GRIDS["Trailing()"]})
    monkeypatch.setattr(BrightnessFields.__init__, "__defaults__", (200, 0))
    flawed, ours = (
        next(iter(measure_variant(name, 0, 0, 200))) for name in ("scaled_linear, exact", EXACT)
    )
    assert flawed["std"] < 0.46 < 0.49 < ours["std"]
    assert flawed["distance"] > 1.25 * ours["distance"]


@pytest.mark.slow
def test_equal_seeds_give_equal_networks():
    first, again, other = (
        create_denoiser(VARIANTS["scaled_linear, v"], seed, 1) for seed in (0, 0, 1)
    )
    assert isinstance(first, Denoiser)
    assert not first.training
    same, differ = (
        [torch.equal(a, b) for a, b in zip(first.parameters(), x.parameters(), strict=True)]
        for x in (again, other)
    )
    assert all(same)
    assert not all(differ)
    assert isinstance(create_denoiser(VARIANTS[EXACT], 0), EmpiricalDistribution)


def test_a_study_continues_its_file_and_is_tabulated_and_drawn(tmp_path, monkeypatch):
    calls = []

    def measured(name, seed, steps, count):
        calls.append((name, seed))
        for grid in GRIDS:
            yield {"grid": grid, **measure(torch.full((10,), 0.2 * seed + 0.5))}

    monkeypatch.setattr(brightness_study, "measure_variant", measured)
    out = tmp_path / "study.jsonl"
    assert len(list(run_study(out, [0]))) == 2 * len(VARIANTS)
    assert len(list(run_study(out, [0, 1]))) == 2 * len(VARIANTS)
    assert calls == [(name, seed) for seed in (0, 1) for name in VARIANTS]
    lines = format_table([measure_data(), *read_measurements(out)]).splitlines()
    assert len(lines) == 2 + 1 + 2 * len(VARIANTS)
    assert lines[3].startswith(
        "| scaled_linear, ε | Leading(1) | 0.000 ± 0.000 | 0.500 ± 0.500 | 0.000 ± 0.000 |"
    )
    draw(read_measurements(out), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
