"""The held-out loss is a fixed function of the weights, and leaves the training as it is."""

import json

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.objective import Objective
from diffcore.schedules import Cosine
from diffcore.training.data import Digits, ImageFolder
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.reports.validation import Validation, measure_loss, stops_early
from tests.helpers.image_folders import write
from tests.helpers.training_runs import (
    PROCESS,
    LabelRecorder,
    ListDataset,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    train,
)

ALONE = (0, 1)
HELD_OUT = Digits("test")


def denoiser(process=PROCESS):
    torch.manual_seed(0)
    return Denoiser(LabelRecorder(dropout=0.5), process)


def measure(validation, objective=None, network=None, seed=3, batch=50, ranks=ALONE, gather=None):
    network, objective = network or denoiser(), objective or Objective()
    return measure_loss(network, validation, objective, seed, batch, ranks, gather or (lambda x: x))


def read_losses(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


class ZeroNetwork(nn.Module):
    """A network with output 0."""

    def forward(self, x, time):
        return torch.zeros_like(x)


def test_the_loss_is_its_closed_form_for_known_data():
    """x_0 = 1 and an output of 0: E |α ε - σ x_0|² = α² + σ² = 1 for levels of equal weight."""
    process = Process(Cosine(), "v_prediction", shape=(1, 8, 8))
    validation = Validation(ListDataset(torch.ones(1, 8, 8)), items=1, draws=4096, bins=4)
    found = measure(validation, network=Denoiser(ZeroNetwork(), process), batch=512)
    assert found.loss == pytest.approx(1, abs=0.01)
    assert found.by_level == pytest.approx([1] * 4, abs=0.02)


def test_each_interval_holds_equally_many_levels_from_clean_to_noise():
    """x_0 = 0 and an output of 0: E |α ε|² = α² = cos²(π t/2) for the cosine schedule."""
    process = Process(Cosine(), "v_prediction", shape=(1, 8, 8))
    validation = Validation(ListDataset(torch.zeros(1, 8, 8)), items=1, draws=4096, bins=2)
    found = measure(validation, network=Denoiser(ZeroNetwork(), process), batch=512)
    assert found.by_level == pytest.approx([0.5 + 1 / torch.pi, 0.5 - 1 / torch.pi], abs=0.01)


def test_the_loss_is_equal_for_every_batch_size_and_number_of_ranks():
    validation, parts = Validation(HELD_OUT, items=101, draws=2, bins=3), []
    expected = measure(validation)
    assert measure(validation) == expected  # equal bits; the network has dropout
    assert measure(validation, batch=7).by_level == pytest.approx(expected.by_level, rel=1e-6)

    def collect(losses):
        parts.append(losses)
        return losses

    for rank in range(3):
        measure(validation, ranks=(rank, 3), gather=lambda x: collect(x).expand(3, -1))
    found = measure(validation, ranks=(0, 3), gather=lambda x: torch.cat(parts))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.by_level == pytest.approx(expected.by_level, rel=1e-6)


def test_sorted_data_has_every_class_in_every_interval():
    data = ListDataset(*[(torch.zeros(1, 8, 8), label) for label in range(10) for _ in range(20)])
    network = denoiser(Process(shape=(1, 8, 8), classes=10, dropout=0.0))
    measure(Validation(data, items=200, draws=1), network=network, batch=50)
    seen = network.network.calls
    assert [len(set(labels.tolist())) for labels in seen] == [10] * 4


def test_what_makes_training_noisier_does_not_enter():
    validation = Validation(HELD_OUT, items=50)
    noisy = Objective(levels="independent", perturbation=0.1, coupling=OptimalTransport(10))
    assert measure(validation, noisy) == measure(validation)


def test_a_run_writes_its_held_out_losses_and_trains_as_without_them(tmp_path):
    plain = train(tmp_path / "plain")
    validation = Validation(HELD_OUT, every=2, items=40, bins=3)
    state = train(tmp_path / "run", validation=validation)
    lines = read_losses(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["logsnr"][0] is None  # λ = inf at t = 0
    assert len(lines[0]["loss_by_level"]) == 3
    assert lines[-1]["loss"] == state.held_out_losses[-1]
    with state.average.applied():
        seed = state.settings.seed
        averaged = Denoiser(state.label_wrapper(state.network), state.settings.process)
        direct = measure(validation, network=averaged, seed=seed, batch=16)
    assert direct.loss == lines[-1]["loss"]
    assert lines[-1]["loss_current"] != lines[-1]["loss"]
    before, after = (read_checkpoint(tmp_path / name) for name in ("plain", "run"))
    for name, value in before["model.safetensors"].items():
        if name != "training_calls":
            assert torch.equal(value, after["model.safetensors"][name])
    assert plain.step == state.step


def test_a_resumed_run_writes_the_same_losses(tmp_path):
    options = {"validation": Validation(HELD_OUT, every=1, items=20), "save_every": 2}
    train(tmp_path / "whole", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 4)
    train(tmp_path / "resumed", resume=True, **options)
    whole, resumed = (hashes(tmp_path / name) for name in ("whole", "resumed"))
    assert whole["validation.jsonl"] == resumed["validation.jsonl"]


def test_a_run_ends_early_once_the_loss_stops_falling(tmp_path, capsys):
    validation = Validation(HELD_OUT, every=1, items=20, patience=2)
    options = {"lr": LearningRate(1e-30), "validation": validation}
    state = train(tmp_path / "run", **options)
    assert state.step == 3
    assert "not lower in 2 measurements: ended at step 3 of 6" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "run", 3)
    assert train(tmp_path / "run", resume=True, **options).step == 3


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3, 2, 1], 2, False),
        ([1, 2], 2, False),
        ([1, 2, 1], 2, True),
        ([1, 2, 0.5, 0.7], 2, False),
        ([1, 2, 3, 4], 0, False),
        ([float("nan"), 1, 2, 3], 2, True),
        ([float("nan"), 2, 1, 0.5], 2, False),
    ],
)
def test_the_patience_counts_measurements_without_a_lower_loss(losses, patience, stops):
    assert stops_early(losses, patience) == stops


def test_bad_held_out_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"validation.every is 0, expected at least 1"):
        Validation(HELD_OUT, every=0)
    wrong = Validation(ListDataset(torch.zeros(3, 8, 8)))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\), expected .* \(1, 8, 8\)"):
        make_trainer(tmp_path, validation=wrong)
    unlabelled = Validation(ListDataset((torch.zeros(1, 8, 8), 10)))
    with pytest.raises(ValueError, match=r"label 10, expected 0 .. 9"):
        make_trainer(tmp_path, validation=unlabelled)


def test_held_out_images_of_other_classes_are_refused_before_the_run(tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png", "test/bee/2.png", "test/cat/2.png"):
        write(tmp_path / name)
    data, held_out = (ImageFolder(str(tmp_path / name), 8, "L") for name in ("train", "test"))
    process = Process(shape=(1, 8, 8), classes=2)
    with pytest.raises(ValueError, match=r"held-out data has the classes bee, cat, .* ant"):
        make_trainer(tmp_path, data=data, process=process, validation=Validation(held_out))
    make_trainer(tmp_path, data=data, process=process, validation=Validation(data))


def test_a_held_out_item_that_does_not_fit_is_refused_with_its_index():
    data = ListDataset(*[(torch.zeros(1, 8, 8), 0)] * 3, (torch.full((1, 8, 8), torch.nan), 1))
    with pytest.raises(ValueError, match="item 3 of the data has values that are not finite"):
        measure(Validation(data))
