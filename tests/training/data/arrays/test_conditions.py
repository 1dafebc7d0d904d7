"""Conditions of array data sets: one row for each item."""

import numpy as np
import pytest
import torch

from diffcore.io.safetensors import write_weights
from diffcore.training.data import Arrays, Tensors

X = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 3)).astype(np.float32)
IMAGE = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
NUMBER = np.linspace(0, 1, 5, dtype=np.float32)[:, None]


@pytest.fixture
def arrays(tmp_path):
    for name, values in (("x", X), ("image", IMAGE), ("number", NUMBER)):
        np.save(tmp_path / f"{name}.npy", values)
    names = {"image": str(tmp_path / "image.npy"), "number": str(tmp_path / "number.npy")}
    return Arrays(str(tmp_path), channels="last", conditions=names)


def test_row_i_of_each_condition_belongs_to_item_i(arrays):
    assert len(arrays) == 5
    x0, label, conditions = arrays[3]
    assert torch.equal(x0, torch.from_numpy(X[3]).movedim(-1, 0))
    assert label == -1
    assert torch.equal(conditions["number"], torch.tensor([0.75]))
    expected = torch.from_numpy(IMAGE[3, :, :, 0])[None] / 127.5 - 1
    assert torch.equal(conditions["image"], expected)


def test_a_condition_has_one_row_for_each_item(tmp_path, arrays):
    np.save(tmp_path / "number.npy", NUMBER[:4])
    with pytest.raises(ValueError, match=r"4 rows of the condition number, but the data has 5"):
        Arrays(str(tmp_path / "x.npy"), conditions={"number": str(tmp_path / "number.npy")})


def test_the_hash_contains_the_conditions(tmp_path, arrays):
    options = {"conditions": {"number": str(tmp_path / "number.npy")}}
    path = str(tmp_path / "x.npy")
    before = Arrays(path, **options).content_hash
    assert before != Arrays(path).content_hash
    np.save(tmp_path / "number.npy", 1 - NUMBER)
    assert Arrays(path, **options).content_hash != before


def test_tensors_have_conditions_by_key(tmp_path):
    for part, rows in enumerate((slice(0, 2), slice(2, 5))):
        tensors = {"x0": X, "depth": IMAGE, "number": NUMBER}
        content = {name: torch.from_numpy(value[rows]) for name, value in tensors.items()}
        write_weights(tmp_path / f"{part}.safetensors", content)
    names = {"image": "depth", "number": "number"}
    data = Tensors(str(tmp_path), channels="last", conditions=names)
    x0, _, conditions = data[3]
    assert torch.equal(x0, torch.from_numpy(X[3]).movedim(-1, 0))
    assert torch.equal(conditions["number"], torch.tensor([0.75]))
    assert conditions["image"].shape == (1, 2, 2)
    with pytest.raises(ValueError, match="no tensor 'colour'"):
        Tensors(str(tmp_path), channels="last", conditions={"image": "colour"})
