"""Checkpoints are read bit for bit as they were written; every change of a file is detected."""

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from diffcore.io.files import CorruptFileError, WriteError
from diffcore.training.checkpoints.checkpoint import (
    Checkpoint,
    newest,
    prune,
    read,
    set_aside,
    write,
)
from tests.helpers.file_faults import full_disk

FILES = ("model.safetensors", "training.safetensors", "manifest.json")


def make_checkpoint(step=4):
    torch.manual_seed(step)
    model = {
        "a.weight": torch.randn(3, 4).T,
        "a.count": torch.tensor(step),
        "half": torch.randn(5).bfloat16(),
    }
    training = {"a.weight.exp_avg": torch.randn(4, 3), "empty": torch.zeros(0)}
    state = {
        "step": step,
        "groups": [{"lr": 1e-3, "betas": [0.9, 0.99], "fused": None, "name": "λ"}],
        "threads": 2,
    }
    return Checkpoint({"model.safetensors": model, "training.safetensors": training}, state)


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints: 2, 4, 6."""
    for step in (2, 4, 6):
        write(tmp_path / f"step-{step:08d}", make_checkpoint(step))
    return tmp_path


def are_equal(first, second):
    assert first.state == second.state
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[name].keys()
        for key, value in tensors.items():
            other = second.tensors[name][key]
            assert (other.dtype, other.shape) == (value.dtype, value.shape)
            assert torch.equal(other, value), key
    return True


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_checkpoint_is_read_bit_for_bit_from_safetensors_and_json_only(tmp_path):
    write(tmp_path / "step-00000004", make_checkpoint())
    assert are_equal(read(tmp_path / "step-00000004"), make_checkpoint())
    assert {path.name for path in (tmp_path / "step-00000004").iterdir()} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_equal_checkpoints_are_written_as_equal_files(tmp_path):
    for name in ("first", "second"):
        write(tmp_path / name, make_checkpoint())
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / "step-00000004" / name).unlink()
    with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
        read(folder / "step-00000004")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.3, 0.9, -1])
def test_a_truncated_file_is_named(folder, name, share):
    path = folder / "step-00000004" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data)) if share >= 0 else share])
    with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
        read(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_an_extra_byte_is_named(folder, name):
    path = folder / "step-00000004" / name
    path.write_bytes(path.read_bytes() + b"\x01")
    with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
        read(path.parent)


@pytest.mark.parametrize("name", FILES[:2])
def test_every_flipped_bit_of_the_tensors_is_named(folder, name):
    path = folder / "step-00000004" / name
    bits = random.Random(0).sample(range(8 * path.stat().st_size), 100)
    for bit in bits:
        flip(path, bit)
        with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
            read(path.parent)
        flip(path, bit)
    assert are_equal(read(path.parent), make_checkpoint(4))


def test_every_flipped_bit_of_the_manifest_is_named_or_changes_nothing(folder):
    path, undetected = folder / "step-00000006" / "manifest.json", []
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 200):
        flip(path, bit)
        messages = []
        checkpoint = newest(folder, messages.append)
        if messages == []:
            assert are_equal(checkpoint, make_checkpoint(6))
            undetected.append(bit)
        else:
            assert "step-00000006/manifest.json" in messages[0]
            assert are_equal(checkpoint, make_checkpoint(4))
        flip(path, bit)
    assert len(undetected) <= 4  # 1e-05 as 1E-05 is the same JSON value


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"x"', "{}", '{"sha256": 3}', "[1]", '{"a": NaN}']
)
def test_a_manifest_with_other_json_is_named(folder, text):
    path = folder / "step-00000004" / "manifest.json"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=r"step-00000004/manifest\.json"):
        read(path.parent)


def test_a_whole_newest_checkpoint_is_read_without_a_message(folder):
    messages = []
    assert are_equal(newest(folder, messages.append), make_checkpoint(6))
    assert messages == []


@pytest.mark.parametrize("name", FILES)
def test_each_corrupt_checkpoint_is_named_before_an_older_one_is_read(folder, name):
    flip(folder / "step-00000006" / name, 321)
    shutil.rmtree(folder / "step-00000004")
    (folder / "step-00000004").mkdir()
    messages = []
    assert are_equal(newest(folder, messages.append), make_checkpoint(2))
    assert len(messages) == 2
    assert f"step-00000006/{name}" in messages[0]
    assert "step-00000004/manifest.json" in messages[1]
    assert all("before" in line for line in messages)


def test_without_a_whole_checkpoint_the_newest_is_none(folder, tmp_path):
    for path in folder.iterdir():
        (path / "manifest.json").unlink()
    messages = []
    assert newest(folder, messages.append) is None
    assert len(messages) == 3
    assert newest(tmp_path / "nothing", messages.append) is None


def test_a_crash_during_a_write_leaves_no_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(
        "diffcore.training.checkpoints.checkpoint.json.dumps", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        write(folder / "step-00000008", make_checkpoint(8))
    monkeypatch.undo()
    (folder / f".step-00000010.{os.getpid()}").mkdir()  # as a kill leaves it
    messages = []
    assert are_equal(newest(folder, messages.append), make_checkpoint(6))
    assert messages == []
    write(folder / "step-00000008", make_checkpoint(8))
    prune(folder, 10)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-{step:08d}" for step in (2, 4, 6, 8)
    ]


def test_a_crash_during_a_replacement_leaves_the_checkpoint_of_that_name_whole(folder, monkeypatch):
    monkeypatch.setattr(
        "diffcore.training.checkpoints.checkpoint.json.dumps", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        write(folder / "step-00000006", make_checkpoint(8))
    monkeypatch.undo()
    assert are_equal(read(folder / "step-00000006"), make_checkpoint(6))
    write(folder / "step-00000006", make_checkpoint(8))
    assert are_equal(read(folder / "step-00000006"), make_checkpoint(8))


class ExitOnUnpickling:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_no_pickle_is_opened(folder):
    step = folder / "step-00000006"
    for name in ("optimizer.pt", "model.bin", "random_states_0.pkl"):  # ignored beside the files
        (step / name).write_bytes(pickle.dumps(ExitOnUnpickling()))
    assert are_equal(newest(folder, print), make_checkpoint(6))
    with pytest.raises(SystemExit):
        pickle.loads((step / "model.bin").read_bytes())
    for name in FILES:  # refused in place of a file
        path, data = step / name, (step / name).read_bytes()
        path.write_bytes(pickle.dumps(ExitOnUnpickling()))
        with pytest.raises(CorruptFileError, match=name):
            read(step)
        path.write_bytes(data)


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(folder):
    path = folder / "step-00000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000004/model.safetensors"] = manifest["files"].pop(
        "model.safetensors"
    )
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="manifest"):
        read(path.parent)


@pytest.mark.parametrize(("keep", "left"), [(1, (6,)), (2, (4, 6)), (3, (2, 4, 6)), (9, (2, 4, 6))])
def test_pruning_keeps_the_newest_and_deletes_interrupted_writes(folder, keep, left):
    (folder / f".step-00000008.{os.getpid()}").mkdir()
    prune(folder, keep)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in left]


def test_copies_with_other_names_are_neither_read_nor_renamed_nor_deleted(folder):
    mine = ("notes.txt", "step-00000002-good", "step-00000009_best", "step-000000010", "step-7")
    for name in mine[1:]:
        shutil.copytree(folder / "step-00000002", folder / name)
    (folder / "notes.txt").write_text("mine")
    assert are_equal(newest(folder, pytest.fail), make_checkpoint(6))
    set_aside(folder, 4)
    prune(folder, 1)
    expected = {*mine, "step-00000004", "broken-step-00000006"}
    assert {path.name for path in folder.iterdir()} == expected


def test_a_copy_under_the_name_of_another_step_is_not_read(folder):
    shutil.copytree(folder / "step-00000002", folder / "step-00000009")
    messages = []
    assert are_equal(newest(folder, messages.append), make_checkpoint(6))
    assert "step-00000009 holds the checkpoint of step 2" in messages[0]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_read_permission_is_named_before_an_older_one_is_read(
    folder, name, monkeypatch
):
    def refuse(path, *arguments, **options):
        if path == folder / "step-00000006" / name:
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    messages = []
    assert are_equal(newest(folder, messages.append), make_checkpoint(4))
    assert f"step-00000006/{name} cannot be read (Perm" in messages[0]
    assert len(messages) == 1


def test_checkpoints_in_a_folder_that_cannot_be_listed_are_not_missing(folder, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda _: exec("raise PermissionError(13, 'no')"))
    with pytest.raises(PermissionError):
        newest(folder, print)


@pytest.mark.parametrize(
    "changes",
    [{"files": 3}, {"files": {"../a": {}}}, {"files": {"model.safetensors": 1}}, {"state": [1]}],
)
def test_a_crafted_manifest_is_refused(folder, changes):
    path = folder / "step-00000006/manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": digest}))
    with pytest.raises(CorruptFileError, match=r"manifest\.json describes no checkpoint"):
        read(path.parent)


def test_on_a_full_disk_the_error_names_the_checkpoints_that_are_kept(folder):
    with (
        full_disk(300),
        pytest.raises(WriteError, match="step-00000008 cannot be written") as error,
    ):
        write(folder / "step-00000008", make_checkpoint(8))
    assert "whole checkpoints: step-00000002, step-00000004, step-00000006" in str(error.value)
    assert len(list(folder.iterdir())) == 3
