"""`diffcore plot`: schedules, weights and effective weights."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffcore.cli.commands import plot


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_schedules_are_plotted(diffcore, suffix):
    ended = diffcore("plot", "schedules", "Cosine", "Flow", "Laplace", f"--out=new/plot{suffix}")
    assert ended.status == 0, ended.err
    assert ended.out == f"3 schedules -> new/plot{suffix}\n"
    assert Path(f"new/plot{suffix}").stat().st_size > 5000


def test_schedules_with_options_are_plotted_to_the_default_file(diffcore):
    laplace = json.dumps({"class_path": "Laplace", "init_args": {"scale": 0.75}})
    assert diffcore("plot", "schedules", laplace).status == 0
    assert Path("schedules.png").is_file()


def test_weights_and_effective_weights_are_plotted(diffcore):
    ended = diffcore(
        "plot", "weights", "MinSNR", "P2", "--configs=digits", "--on=epsilon", "--out=w.svg"
    )
    assert ended.status == 0, ended.err
    assert ended.out == "2 weights, 1 training configs -> w.svg\n"
    assert Path("w.svg").stat().st_size > 5000
    assert (
        diffcore("plot", "weights", "--configs=digits").out
        == "0 weights, 1 training configs -> weights.png\n"
    )


def test_the_effective_weight_of_training_settings_is_weight_times_density():
    """On v: min(SNR, 5)/(SNR+1) · sech(λ/2) / 2π for the recipe; no density if corrected."""
    logsnr = torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    snr, training = logsnr.exp(), plot.read_training_levels("digits")
    weight = snr.clamp(max=5) / (snr + 1)
    expected = weight / (2 * math.pi * (logsnr / 2).cosh())
    torch.testing.assert_close(
        plot.effective_weight(training, "v_prediction", logsnr), expected, rtol=1e-12, atol=0
    )
    corrected = training._replace(objective=replace(training.objective, corrected=True))
    torch.testing.assert_close(
        plot.effective_weight(corrected, "v_prediction", logsnr), weight, rtol=1e-12, atol=0
    )
