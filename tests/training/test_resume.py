"""Resuming a run: the same bytes as a run that never stopped, also from a corrupt checkpoint."""

import math
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from diffcore.core.process import OPTIONAL
from diffcore.guidance import CFG
from diffcore.io.files import WriteError
from diffcore.io.safetensors import read_weights
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MinSNR
from diffcore.training.averages.ema import Decay
from diffcore.training.checkpoints import checkpoint
from diffcore.training.data import Arrays, ImageFolder, Tensors
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.image_folders import write
from tests.helpers.training_runs import (
    GREY,
    PROCESS,
    LabelRecorder,
    ListDataset,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def truncate_newest(folder):
    """Cut three bytes off a file of the newest checkpoint; its path."""
    path = max((folder / "checkpoints").iterdir()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return path


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, step, log_every):
    options = {
        "network": partial(LabelRecorder, dropout=0.2),
        "save_every": 1,
        "keep": 2,
        "log_every": log_every,
    }
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), step)
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_a_run_whose_newest_checkpoint_is_corrupt_resumes_from_the_one_before(tmp_path, capsys):
    train(tmp_path, save_every=2)
    whole = hashes(tmp_path)
    path = truncate_newest(tmp_path)
    capsys.readouterr()
    train(tmp_path, save_every=2, resume=True)
    messages = capsys.readouterr().err
    assert messages.index(str(path)) < messages.index("resumed at step 4")
    files = hashes(tmp_path)
    assert {name: value for name, value in files.items() if "broken-" not in name} == whole
    assert any("broken-step-00000006" in name for name in files)


IMAGE_CHANGES = {
    "added": lambda folder: write(folder / "ant/0.png", 9),
    "replaced": lambda folder: write(folder / "cat/1.png", 9),
    "deleted": lambda folder: (folder / "dog/2.png").unlink(),
    "renamed": lambda folder: (folder / "cat").rename(folder / "kit"),
}


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_a_run_is_not_resumed_on_a_folder_of_images_that_changed(tmp_path, change):
    def options():
        data = ImageFolder(str(tmp_path / "images"), 8, "L")
        return {"data": data, "process": replace(PROCESS, classes=len(data.class_names))}

    for name in ("cat/1.png", "dog/1.png", "dog/2.png"):
        write(tmp_path / "images" / name)
    train(tmp_path / "run", **options(), save_every=2, steps=2)
    train(tmp_path / "run", **options(), save_every=2, steps=4, resume=True)
    IMAGE_CHANGES[change](tmp_path / "images")
    message = "the data are not those with which the run|another process.classes"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options(), resume=True)


def write_arrays(folder):
    """Arrays of twenty items with labels, in a folder."""
    folder.mkdir()
    np.save(folder / "x.npy", np.linspace(-1, 1, 20 * 64, dtype=np.float32).reshape(20, 1, 8, 8))
    np.save(folder / "y.npy", np.arange(20) % 10)
    options = {"path": str(folder / "x.npy"), "labels": str(folder / "y.npy")}
    return Arrays(**options), options


def write_tensors(folder):
    """Tensors of twenty items with labels, in a folder."""
    folder.mkdir()
    tensors = {
        "x0": torch.linspace(-1, 1, 20 * 64).view(20, 1, 8, 8),
        "label": torch.arange(20) % 10,
    }
    save_file(tensors, folder / "x.safetensors")
    return Tensors(str(folder)), {"path": str(folder)}


@pytest.mark.parametrize("write_data", [write_arrays, write_tensors])
def test_a_run_whose_files_of_numbers_were_moved_is_resumed_as_the_same_run(tmp_path, write_data):
    def options(folder):
        data, arguments = write_data(tmp_path / folder)
        spec = {"class_path": type(data).__name__, "init_args": arguments}
        return {"data": data, "config": yaml.safe_dump({"data": spec}), "save_every": 2}

    first = options("before")
    train(tmp_path / "straight", **first)
    crash_after(make_trainer(tmp_path / "resumed", **first), 2)
    shutil.rmtree(tmp_path / "before")
    train(tmp_path / "resumed", **options("after"), resume=True)
    whole, resumed = hashes(tmp_path / "straight"), hashes(tmp_path / "resumed")
    assert {name for name in whole if whole[name] != resumed[name]} == {"config.yaml"}


def test_a_corrupt_checkpoint_does_not_displace_those_written_after_it(tmp_path):
    train(tmp_path, save_every=2)
    truncate_newest(tmp_path)
    crash_after(make_trainer(tmp_path, save_every=1, keep=1, resume=True), 5)
    assert checkpoint.newest(tmp_path / "checkpoints", print).state["step"] == 5


def test_a_run_whose_checkpoints_are_all_corrupt_is_not_resumed(tmp_path):
    train(tmp_path, keep=1)
    truncate_newest(tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint left: start a new run in another"):
        train(tmp_path, resume=True)


def test_another_number_of_threads_is_announced_on_resume(tmp_path, capsys):
    train(tmp_path, steps=2)
    torch.set_num_threads(2)
    train(tmp_path, steps=3, resume=True)
    messages = capsys.readouterr().err
    assert "'threads': (1, 2)" in messages
    assert "not bit for bit" in messages


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(tmp_path)
    whole = hashes(tmp_path)
    train(tmp_path, resume=True)
    assert hashes(tmp_path) == whole


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(tmp_path)
    whole = hashes(tmp_path)
    message = r"holds a run already \(ema.safetensors\): continue it with --resume true, or choose"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, seed=5)
    assert hashes(tmp_path) == whole


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    message = "holds no run to resume: begin it with --resume auto, or name the folder of the run"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resume_auto_starts_a_run_and_continues_it(tmp_path):
    train(tmp_path / "straight", save_every=2)
    crash_after(make_trainer(tmp_path / "run", save_every=2, resume="auto"), 4)
    state = train(tmp_path / "run", save_every=2, resume="auto")
    assert len(state.network.calls) == 3  # a check, and steps 5 and 6
    assert hashes(tmp_path / "run") == hashes(tmp_path / "straight")


@pytest.mark.parametrize("resume", ["yes", "", None, 2])
def test_another_value_of_resume_is_refused(tmp_path, resume):
    with pytest.raises(ValueError, match=r"resume is .*, expected true, false or auto"):
        make_trainer(tmp_path, resume=resume)


CHANGES = {
    "seed": (1, r"seed \(0, now 1\)"),
    "batch_size": (8, r"batch_size \(16, now 8\)"),
    "lr": (LearningRate(2e-3, warmup=10), r"lr.peak \(0.001, now 0.002\)"),
    "ema": (Decay(0.99), r"ema.decay \(0.9, now 0.99\)"),
    "clip": (math.inf, r"clip \(1.0, now .inf\)"),
    "objective": (Objective(weight=MinSNR(4.0)), "objective.weight.class_path"),
    "process": (replace(PROCESS, dropout=0.2), r"process.dropout \(0.1, now 0.2\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_with_both_values_and_a_remedy_that_works(tmp_path, name):
    value, message = CHANGES[name]
    train(tmp_path / "run", steps=2)
    whole = hashes(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"was started with another {message}") as error:
        train(tmp_path / "run", steps=3, resume=True, **{name: value})
    assert hashes(tmp_path / "run") == whole
    remedy = f"start a new run from its weights with --init {tmp_path / 'run'} and an"
    assert remedy in str(error.value)
    new = {"init": str(tmp_path / "run"), name: value}
    train(tmp_path / "new", steps=1, **new)


def test_a_checkpoint_from_before_the_optional_fields_of_a_process_resumes(tmp_path):
    train(tmp_path, steps=2)
    path = max((tmp_path / "checkpoints").iterdir())
    saved = checkpoint.read(path)
    process = saved.state["settings"]["process"]
    for name, default in OPTIONAL.items():
        assert process.pop(name) == default
    checkpoint.write(path, saved)
    train(tmp_path, steps=3, resume=True)
    process["variance"] = "learned"
    checkpoint.write(path, saved)
    prune = max((tmp_path / "checkpoints").iterdir())
    shutil.rmtree(prune)
    with pytest.raises(ValueError, match=r"process.variance \(learned, now None\)"):
        train(tmp_path, steps=3, resume=True)


def test_settings_that_do_not_enter_the_weights_may_change(tmp_path):
    train(tmp_path, steps=2)
    train(tmp_path, steps=3, resume=True, log_every=3, save_every=3, keep=1, guidance=CFG(1.0))


def test_a_run_starts_with_the_averaged_weights_of_another_one(tmp_path):
    train(tmp_path / "first", steps=3)
    weights = read_weights(tmp_path / "first/ema.safetensors")
    options = {"init": str(tmp_path / "first"), "lr": LearningRate(1e-30)}
    options |= {"optimizer": torch.optim.SGD, "steps": 2, "batch_size": 8, "save_every": 1}
    train(tmp_path / "straight", **options)
    model = read_checkpoint(tmp_path / "straight", 2)["model.safetensors"]
    average = read_weights(tmp_path / "straight/ema.safetensors")
    for name, value in weights.items():
        if value.is_floating_point():
            assert torch.equal(model[name], value), name
            torch.testing.assert_close(average[name], value)
    # A resumed run needs the other run no more.
    crash_after(make_trainer(tmp_path / "resumed", **options), 1)
    shutil.rmtree(tmp_path / "first")
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_initial_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    message = r"nowhere, which has no weights of a run, and .*: name the folder"
    for resume in (False, "auto", True):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "run", init=str(tmp_path / "nowhere"), resume=resume)
    train(tmp_path / "first", steps=1)
    options = {"init": str(tmp_path / "first"), "network": partial(LabelRecorder, 11)}
    with pytest.raises(ValueError, match=r"whose weights do not fit the network: .*labels.weight"):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_run_without_its_config_is_not_overwritten_and_gets_it_back_on_resume(tmp_path):
    config = "network: {class_path: mine.Network}\n"
    train(tmp_path, config=config, steps=2)
    whole = hashes(tmp_path)
    (tmp_path / "config.yaml").unlink()
    lost = hashes(tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        train(tmp_path, config=config, steps=2)
    assert hashes(tmp_path) == lost
    train(tmp_path, config=config, steps=2, resume=True)
    assert hashes(tmp_path) == whole


def test_an_average_without_checkpoints_is_not_overwritten(tmp_path):
    train(tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run/checkpoints")
    whole = hashes(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        train(tmp_path / "run", steps=2)
    for resume in (True, "auto"):
        with pytest.raises(
            ValueError, match=r"no whole checkpoint left: start a new run .* --init"
        ):
            train(tmp_path / "run", steps=2, resume=resume)
    assert hashes(tmp_path / "run") == whole
    train(tmp_path / "new", steps=2, init=str(tmp_path / "run"))


def test_a_start_that_failed_does_not_block_the_next_one(tmp_path, capsys):
    wrong = ListDataset(*[(GREY, 0)] * 150, (GREY, 10))
    with pytest.raises(ValueError, match="label 10"):
        train(tmp_path / "run", data=wrong)
    assert (tmp_path / "run/metrics.jsonl").exists()
    train(tmp_path / "run", steps=2)
    assert "holds a run without a checkpoint: starting at step 0" in capsys.readouterr().err
    train(tmp_path / "straight", steps=2)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "straight")


def test_a_start_that_cannot_write_continues_with_the_option_that_the_error_names(tmp_path):
    obstacle = tmp_path / "run/process.json/file"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    with pytest.raises(WriteError, match=r"process.json cannot be written .* --resume auto\)"):
        train(tmp_path / "run", steps=2)
    shutil.rmtree(obstacle.parent)
    train(tmp_path / "run", steps=2, resume="auto")


def test_a_line_of_the_metrics_that_is_no_report_is_named_and_left_out(tmp_path, capsys):
    train(tmp_path, steps=3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"step": 2, "loss": ?}\n' + lines[2] + b'{"step": 4, "lo')
    train(tmp_path, steps=4, resume=True)
    assert f"{path}: line 2 is no report, and is left out" in capsys.readouterr().err
    assert [report["step"] for report in read_reports(tmp_path)] == [1, 3, 4]


def test_leftovers_of_a_killed_process_are_removed_on_resume(tmp_path):
    train(tmp_path, steps=2)
    for name in ("config.yaml", "process.json", "ema.safetensors", "metrics.jsonl", "pipeline"):
        (tmp_path / f".{name}.{os.getpid()}").mkdir()
    (tmp_path / f"checkpoints/.outputs.json.{os.getpid()}").touch()
    (tmp_path / f"checkpoints/.step-00000003.{os.getpid()}").mkdir()
    train(tmp_path, steps=2, resume=True)
    assert list(tmp_path.rglob(".*")) == []


def test_more_steps_than_names_of_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is 100000000, expected at most 99999999"):
        make_trainer(tmp_path, steps=10**8)
