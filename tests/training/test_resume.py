"""Resuming a run: the same bytes as a run that never stopped, also from a corrupt checkpoint."""

from functools import partial

import pytest
import torch

from diffcore.training import checkpoint
from tests.helpers.training_runs import (
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
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
    message = "holds a run already: continue it with --resume true, or choose another folder"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, seed=5)
    assert hashes(tmp_path) == whole


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    message = "holds no run to resume: leave out --resume, or choose another folder"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
