"""A file of weights carries its own hash: damage is detected, and the error contains the remedy."""

import random

import pytest
import torch
from safetensors.torch import save_file

from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import read_weights, write_weights


@pytest.fixture
def path(tmp_path):
    write_weights(tmp_path / "ema.safetensors", tensors(), step=7, note="λ")
    return tmp_path / "ema.safetensors"


def tensors():
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 4).T,
        "a": torch.randn(5).bfloat16(),
        "counter": torch.tensor(3),
        "none": torch.zeros(0),
    }


def test_weights_come_back_bit_for_bit_and_no_other_file_remains(path):
    back = read_weights(path)
    assert back.keys() == tensors().keys()
    for name, value in tensors().items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name
    assert list(path.parent.iterdir()) == [path]


def test_equal_weights_are_equal_files(path):
    other = path.with_name("other.safetensors")
    write_weights(other, dict(reversed(tensors().items())), step=7, note="λ")
    assert read_weights(other).keys() == tensors().keys()
    write_weights(other, tensors(), step=7, note="λ")
    assert other.read_bytes() == path.read_bytes()


def test_any_flipped_bit_is_detected(path):
    data = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(data)), 300):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(
            CorruptFileError,
            match=r"ema\.safetensors .*: resume the run to write it again, or copy it again",
        ):
            read_weights(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_detected(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CorruptFileError, match=r"ema\.safetensors cannot be read .*copy it again"):
        read_weights(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CorruptFileError, match=r"ema\.safetensors cannot be read"):
        read_weights(tmp_path / "ema.safetensors")


# Metadata that is a JSON list is a TypeError.
@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"diffcore": "{}"}, {"diffcore": "no json"}, {"diffcore": "[]"}],
)
def test_weights_that_diffcore_did_not_write_are_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(CorruptFileError, match=r"other\.safetensors"):
        read_weights(tmp_path / "other.safetensors")
