"""Checkpoints: what was written comes back bit for bit, and what is not what was written is named."""

import json
import pickle
import random
import shutil

import pytest
import torch

from diffcore.io.files import CorruptFileError
from diffcore.training.checkpoint import Checkpoint, newest, prune, read, write

FILES = ("model.safetensors", "training.safetensors", "manifest.json")


def made(step=4):
    torch.manual_seed(step)
    model = {
        "a.weight": torch.randn(3, 4).T,
        "a.seen": torch.tensor(step),
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
        write(tmp_path / f"step-{step:08d}", made(step))
    return tmp_path


def same(first, second):
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


def test_a_checkpoint_comes_back_bit_for_bit_from_safetensors_and_json_alone(tmp_path):
    write(tmp_path / "step-00000004", made())
    assert same(read(tmp_path / "step-00000004"), made())
    assert {path.name for path in (tmp_path / "step-00000004").iterdir()} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("first", "second"):
        write(tmp_path / name, made())
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
def test_a_file_with_something_added_is_named(folder, name):
    path = folder / "step-00000004" / name
    path.write_bytes(path.read_bytes() + b"\x01")
    with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
        read(path.parent)


@pytest.mark.parametrize("name", FILES[:2])
def test_any_flipped_bit_of_the_tensors_is_named(folder, name):
    path = folder / "step-00000004" / name
    bits = random.Random(0).sample(range(8 * path.stat().st_size), 100)
    for bit in bits:
        flip(path, bit)
        with pytest.raises(CorruptFileError, match=f"step-00000004/{name}"):
            read(path.parent)
        flip(path, bit)
    assert same(read(path.parent), made(4))


def test_any_flipped_bit_of_the_manifest_is_named_or_changes_nothing(folder):
    path, unseen = folder / "step-00000006" / "manifest.json", []
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 200):
        flip(path, bit)
        said = []
        found = newest(folder, said.append)
        if said == []:
            assert same(found, made(6))
            unseen.append(bit)
        else:
            assert "step-00000006/manifest.json" in said[0]
            assert same(found, made(4))
        flip(path, bit)
    assert len(unseen) <= 4  # an e of 1e-05 as E: the same JSON value


# "[]" and "[1]" were not named: `[].pop("sha256")` is a TypeError, which `_manifest` does not catch.
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"x"', "{}", '{"sha256": 3}', "[1]", '{"a": NaN}']
)
def test_a_manifest_that_is_other_json_is_named(folder, text):
    path = folder / "step-00000004" / "manifest.json"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=r"step-00000004/manifest\.json"):
        read(path.parent)


def test_the_newest_is_read_in_silence(folder):
    said = []
    assert same(newest(folder, said.append), made(6))
    assert said == []


@pytest.mark.parametrize("name", FILES)
def test_of_broken_checkpoints_each_is_named_before_an_older_one_is_used(folder, name):
    flip(folder / "step-00000006" / name, 321)
    shutil.rmtree(folder / "step-00000004")
    (folder / "step-00000004").mkdir()
    said = []
    assert same(newest(folder, said.append), made(2))
    assert len(said) == 2
    assert f"step-00000006/{name}" in said[0]
    assert "step-00000004/manifest.json" in said[1]
    assert all("before" in line for line in said)


def test_no_whole_checkpoint_is_none(folder, tmp_path):
    for path in folder.iterdir():
        (path / "manifest.json").unlink()
    said = []
    assert newest(folder, said.append) is None
    assert len(said) == 3
    assert newest(tmp_path / "nothing", said.append) is None


def test_a_crash_while_writing_leaves_no_checkpoint(folder, monkeypatch):
    monkeypatch.setattr("diffcore.training.checkpoint.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(folder / "step-00000008", made(8))
    monkeypatch.undo()
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert left  # otherwise this tests nothing
    said = []
    assert same(newest(folder, said.append), made(6))
    assert said == []
    write(folder / "step-00000008", made(8))
    prune(folder, 10)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-{step:08d}" for step in (2, 4, 6, 8)
    ]


def test_a_crash_while_replacing_does_not_harm_the_checkpoint_of_that_name(folder, monkeypatch):
    monkeypatch.setattr("diffcore.training.checkpoint.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(folder / "step-00000006", made(8))
    monkeypatch.undo()
    assert same(read(folder / "step-00000006"), made(6))
    write(folder / "step-00000006", made(8))
    assert same(read(folder / "step-00000006"), made(8))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_no_pickle_is_opened(folder):
    step = folder / "step-00000006"
    for name in (
        "optimizer.pt",
        "model.bin",
        "random_states_0.pkl",
    ):  # beside the files: not looked at
        (step / name).write_bytes(pickle.dumps(Bomb()))
    assert same(newest(folder, print), made(6))
    with pytest.raises(SystemExit):
        pickle.loads((step / "model.bin").read_bytes())  # it would have gone off
    for name in FILES:  # in place of them: refused
        path, data = step / name, (step / name).read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CorruptFileError, match=name):
            read(step)
        path.write_bytes(data)


def test_a_manifest_cannot_name_a_file_outside_the_folder_that_was_not_hashed(folder):
    path = folder / "step-00000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000004/model.safetensors"] = manifest["files"].pop(
        "model.safetensors"
    )
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="manifest"):
        read(path.parent)


@pytest.mark.parametrize(("keep", "left"), [(1, (6,)), (2, (4, 6)), (3, (2, 4, 6)), (9, (2, 4, 6))])
def test_pruning_keeps_the_newest_and_drops_what_a_crash_left(folder, keep, left):
    (folder / ".step-00000008.123").mkdir()
    (folder / "notes.txt").write_text("mine")
    prune(folder, keep)
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes.txt",
        *(f"step-{step:08d}" for step in left),
    ]
