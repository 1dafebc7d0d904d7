"""A new run starts with the weights of a run, a checkpoint, a pipeline or a file, if they fit."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.schedules import Flow
from diffcore.training.checkpoints import checkpoint
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.training_runs import (
    PROCESS,
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = {"lr": LearningRate(1e-30), "optimizer": torch.optim.SGD, "steps": 1}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of four steps with a checkpoint every two; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder, steps=4, save_every=2)
    return folder


def is_start(folder, expected):
    """Whether the weights of a run that did not move are the expected ones."""
    model = read_checkpoint(folder, 1)["model.safetensors"]
    floating = [name for name in expected if expected[name].is_floating_point()]
    assert floating
    return all(torch.equal(model[name], expected[name]) for name in floating)


@pytest.mark.parametrize("weights", ["averaged", "raw"])
@pytest.mark.parametrize("step", [None, 2])
def test_a_run_starts_with_the_averaged_or_raw_weights_of_a_run_or_checkpoint(
    tmp_path, first, weights, step
):
    path = first if step is None else first / "checkpoints" / checkpoint.name(step)
    train(tmp_path, init=str(path), init_weights=weights, seed=5, **STILL)
    file = {"averaged": "ema.safetensors", "raw": "model.safetensors"}
    for name in file:
        expected = read_checkpoint(first, step or 4)[file[name]]
        assert is_start(tmp_path, expected) == (name == weights)
    average = read_weights(tmp_path / "ema.safetensors")
    model = read_checkpoint(tmp_path, 1)["model.safetensors"]
    torch.testing.assert_close(average["image.weight"], model["image.weight"])


def test_a_run_whose_initial_weights_have_moved_resumes_and_refuses_those_of_another(
    tmp_path, first
):
    source = tmp_path / "before"
    shutil.copytree(first, source)
    train(tmp_path / "run", init=str(source), **STILL)
    further = STILL | {"steps": 2, "resume": True}
    with pytest.raises(ValueError, match="another init"):
        train(tmp_path / "run", init=str(first), **further)
    source.rename(tmp_path / "after")
    state = train(tmp_path / "run", init=str(tmp_path / "after"), **further)
    assert state.step == 2


def test_a_plain_safetensors_file_is_loaded_and_its_hash_is_recorded_and_kept(tmp_path, first):
    weights = read_weights(first / "ema.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    options = STILL | {"init": str(tmp_path / "plain.safetensors"), "steps": 2, "save_every": 1}
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 1)
    (tmp_path / "plain.safetensors").unlink()
    train(tmp_path / "resumed", resume=True, **options)
    assert is_start(tmp_path / "resumed", weights)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    states = [
        checkpoint.read(tmp_path / "resumed/checkpoints" / checkpoint.name(step)).state
        for step in (1, 2)
    ]
    assert len(states[0]["init"]) == 64
    assert states[0]["init"] == states[1]["init"]


def test_weights_that_do_not_fit_are_named_by_kind_and_number(tmp_path, first):
    weights = read_weights(first / "ema.safetensors")
    del weights["time.bias"]
    weights["other"] = torch.zeros(3)
    save_file(weights, tmp_path / "plain.safetensors")
    options = {"init": str(tmp_path / "plain.safetensors"), "network": partial(LabelRecorder, 11)}
    message = (
        r"1 missing \(time.bias\), 1 of another shape \(labels.weight \(11, 32\) in place of "
        r"\(12, 32\)\), 1 unexpected \(other\) of 10: .*init_partial: true"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options, **STILL)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_partial_load_prints_what_stays_at_its_initial_values(tmp_path, first, capsys):
    options = STILL | {"network": partial(LabelRecorder, 12), "init_partial": True}
    options["process"] = replace(PROCESS, classes=12)
    train(tmp_path / "new", **options, init=str(first))
    assert (
        "1 of 10 tensors stay at their initial values: labels.weight (" in capsys.readouterr().err
    )
    del options["init_partial"]
    train(tmp_path / "fresh", **options)
    new, fresh = (read_checkpoint(tmp_path / n, 1)["model.safetensors"] for n in ("new", "fresh"))
    assert torch.equal(new["labels.weight"], fresh["labels.weight"])
    expected = read_weights(first / "ema.safetensors")
    assert torch.equal(new["image.weight"], expected["image.weight"])


def test_weights_without_a_common_tensor_are_refused_also_as_a_partial_load(tmp_path):
    save_file({"other": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="name the weights of a network of this class"):
        train(tmp_path / "run", init=str(tmp_path / "plain.safetensors"), init_partial=True)


def test_another_process_of_the_weights_is_announced_in_one_line(tmp_path, first, capsys):
    train(tmp_path / "same", init=str(first), **STILL)
    assert "was trained with another" not in capsys.readouterr().err
    process = replace(PROCESS, prediction="epsilon", schedule=Flow())
    for path in (first, first / "checkpoints/step-00000002"):
        train(tmp_path / path.name, init=str(path), process=process, **STILL)
        lines = [
            line for line in capsys.readouterr().err.splitlines() if "trained with another" in line
        ]
        assert len(lines) == 1
        assert "prediction v_prediction (now epsilon), schedule Cosine(" in lines[0]


def test_missing_damaged_and_hostile_weights_are_refused(tmp_path, first):
    with pytest.raises(ValueError, match="has no weights of a run, and init_weights is raw"):
        make_trainer(tmp_path / "run", init=str(tmp_path / "absent"), init_weights="raw")
    with pytest.raises(ValueError, match="has one set of weights: leave init_weights out"):
        make_trainer(tmp_path, init=str(first / "ema.safetensors"), init_weights="raw")
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray((first / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CorruptFileError, match="is not what was written"):
        train(tmp_path / "run", init=str(damaged))
    damaged.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptFileError, match="its header has"):
        train(tmp_path / "run", init=str(damaged))
    copy = shutil.copytree(first, tmp_path / "copy")
    manifest = copy / "checkpoints/step-00000002/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    with pytest.raises(CorruptFileError, match="its SHA-256 differs"):
        train(tmp_path / "run", init=str(manifest.parent))


def test_the_weights_of_a_run_are_read_by_name(first, tmp_path):
    run = Run(first)
    assert run.weight_names() == ["averaged", "raw", "step-00000002", "step-00000004"]
    for step in (2, 4):
        for suffix, file in (("", "ema"), ("/averaged", "ema"), ("/raw", "model")):
            expected = read_checkpoint(first, step)[f"{file}.safetensors"]
            found = run.denoiser(
                network=LabelRecorder(), weights=f"{checkpoint.name(step)}{suffix}"
            ).network.state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    newest = run.read_weights("step-00000004/raw").tensors
    raw = run.read_weights("raw").tensors
    assert all(torch.equal(raw[name], value) for name, value in newest.items())
    for name in ("step-00000003", "step-00000002/other", "rwa", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match="one of averaged, raw, step-00000002, step-00000004"):
            run.read_weights(name)
