"""The digits data set has a fixed split."""

import pytest
import torch

from diffcore.training.data import Digits


def test_training_and_test_digits_are_fixed_and_disjoint():
    train, test = Digits(), Digits("test")
    assert (len(train), len(test)) == (1500, 297)
    assert torch.equal(train.labels[:10], torch.arange(10))
    assert test.labels[-5:].tolist() == [9, 0, 8, 9, 8]
    for data in (train, test):
        x0, label = data[3]
        assert (x0.shape, x0.dtype, type(label)) == ((1, 8, 8), torch.float32, int)
        assert (data.x0.min(), data.x0.max()) == (-1, 1)
        assert set(data.labels.tolist()) == set(range(10))
    scans = {tuple(scan.flatten().tolist()) for scan in train.x0}
    assert not any(tuple(scan.flatten().tolist()) in scans for scan in test.x0)
    with pytest.raises(ValueError, match="split is 'valid', expected train or test"):
        Digits("valid")
