"""Files of samples: arrays on a full disk, ranks that share a folder, hashes of networks."""

import numpy as np
import pytest
import torch
from torch import nn

from diffcore.core.process import Process
from diffcore.io.files import WriteError
from diffcore.sampling import files
from diffcore.sampling.files import FolderWriter, SampleKey, hash_networks, write_arrays
from tests.helpers.file_faults import full_disk

KEYS = [SampleKey(0, seed) for seed in range(10)]
X = torch.arange(1000.0).view(10, 100)


@pytest.mark.parametrize("suffix", files.ARRAY_SUFFIXES)
def test_arrays_are_whole_or_an_error_and_a_full_disk_keeps_the_older_ones(tmp_path, suffix):
    path = tmp_path / f"samples{suffix}"
    write_arrays(path, KEYS, X)
    whole = path.read_bytes()
    with full_disk(1000), pytest.raises(WriteError, match=f"{path} cannot be written"):
        write_arrays(path, KEYS, X + 1)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_of_numpy_hold_the_samples(tmp_path):
    for suffix in (".npy", ".npz"):
        write_arrays(tmp_path / f"samples{suffix}", KEYS, X)
    assert np.array_equal(np.load(tmp_path / "samples.npy"), X.numpy())
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["x"], X.numpy())
        assert arrays["seed"].tolist() == list(range(10))


def test_a_rank_accepts_samples_that_another_one_writes_while_it_starts(tmp_path, monkeypatch):
    writer = FolderWriter(tmp_path, Process(shape=(1, 2, 2)), "", {"steps": 3})
    is_file = type(tmp_path).is_file

    def is_file_before_the_other_rank_writes(path):
        found = is_file(path)
        if path.name == files.RECORD and not found:
            monkeypatch.undo()
            writer.prepare(KEYS)
            writer.add(KEYS[:1], torch.zeros(1, 1, 2, 2))
        return found

    monkeypatch.setattr(type(tmp_path), "is_file", is_file_before_the_other_rank_writes)
    writer.prepare(KEYS)
    assert writer.missing(KEYS) == KEYS[1:]


class WithState(nn.Linear):
    """A layer whose state is not only tensors."""

    def get_extra_state(self):
        return {"scale": 2}

    def set_extra_state(self, state):
        pass


def test_a_network_with_other_state_than_tensors_has_a_hash_of_its_weights():
    layer = WithState(2, 2)
    before = hash_networks([layer])
    with torch.no_grad():
        layer.weight += 1
    assert hash_networks([layer]) != before
