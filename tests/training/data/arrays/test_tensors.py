"""Tensors of safetensors files: the items, what is refused, and that files are read by rows."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffcore.training.data import Tensors
from tests.helpers.training_runs import make_trainer, train

VIDEO = torch.rand(6, 3, 2, 4, 4) * 2 - 1  # items, channels, frames, height, width
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors below the folder of the test, and returns the path."""

    def write(name="x0.safetensors", **tensors):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        return str(path)

    return write


def test_items_are_rows_with_their_labels(write):
    data = Tensors(write(x0=VIDEO, label=LABELS))
    assert (len(data), data.labels.tolist()) == (6, LABELS.tolist())
    assert torch.equal(data[4][0], VIDEO[4])
    assert data[-1][1] == 2
    assert Tensors(write("plain.safetensors", x0=VIDEO))[0][1] == -1
    assert Tensors(write(x0=VIDEO, label=LABELS), labels_key="").labels is None


def test_names_types_and_channels_are_those_of_the_options(write):
    pixels = torch.randint(0, 256, (3, 4, 5, 3), dtype=torch.uint8)
    path = write(pixels=pixels, latents=VIDEO.bfloat16(), digit=LABELS[:3].byte())
    x0, label = Tensors(path, "pixels", "digit", channels="last")[1]
    assert torch.equal(x0, pixels[1].permute(2, 0, 1).float() / 127.5 - 1)
    assert label == 1
    latents = Tensors(path, "latents", "")[5][0]
    assert torch.equal(latents, VIDEO[5].bfloat16().float())


def test_several_files_are_joined_by_name(write, tmp_path):
    for part, (first, last) in enumerate(((0, 1), (1, 4), (4, 6))):
        write(f"shards/{part}.safetensors", x0=VIDEO[first:last], label=LABELS[first:last])
    data = Tensors(str(tmp_path / "shards"))
    assert torch.equal(torch.stack([data[index][0] for index in range(6)]), VIDEO)
    assert [data[index][1] for index in range(6)] == LABELS.tolist()


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"x": VIDEO}, {}, "has no tensor 'x0', but x: set key"),
        ({"x0": VIDEO}, {"labels_key": "y"}, "has no tensor 'y' of labels"),
        ({"x0": VIDEO, "label": LABELS[:5]}, {}, r"expected an integer for each item, of shape"),
        ({"x0": VIDEO, "label": LABELS.float()}, {}, "has labels of torch.float32"),
        ({"x0": VIDEO[:, 0, 0, 0, 0].clone()}, {}, "reshape numbers to"),
        ({"x0": LABELS[:, None]}, {}, "holds int64, whose range is not known"),
        ({"x0": VIDEO[:0]}, {}, "is empty"),
        ({"x0": VIDEO}, {"channels": "none"}, "channels is 'none'"),
    ],
)
def test_a_file_without_items_is_refused(write, tensors, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tensors(write(**tensors), **options)
    assert "\n" not in str(caught.value)


def test_files_that_differ_are_refused(write, tmp_path):
    write("shards/0.safetensors", x0=VIDEO, label=LABELS)
    write("shards/1.safetensors", x0=VIDEO)
    with pytest.raises(ValueError, match=r"1.safetensors has no tensor 'label' of labels"):
        Tensors(str(tmp_path / "shards"))
    write("shards/1.safetensors", x0=VIDEO[:, :1].clone(), label=LABELS)
    with pytest.raises(ValueError, match=r"1.safetensors has rows of shape"):
        Tensors(str(tmp_path / "shards"))


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\xff" * 64, pickle.dumps([1]), b"\2\0\0\0\0\0\0\0[]", None]
)
def test_garbage_is_refused_in_one_line(write, tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is None:  # truncated
        content = Path(write(x0=VIDEO)).read_bytes()[:-1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.safetensors") as caught:
        Tensors(str(path))
    assert "\n" not in str(caught.value)


def test_a_run_trains_on_tensors_in_workers(write, tmp_path):
    images = torch.rand(30, 1, 8, 8) * 2 - 1
    path = write(x0=images, label=torch.arange(30) % 10)
    losses = []
    for workers in (0, 2):
        data = Tensors(path)
        state = train(tmp_path / f"run{workers}", data=data, workers=workers, steps=2)
        losses.append(torch.cat([value.flatten() for value in state.network.parameters()]))
    assert torch.equal(*losses)


def test_the_hash_depends_on_content_and_options(write):
    path = write(x0=VIDEO, label=LABELS)
    found = [Tensors(path).content_hash, Tensors(path, labels_key="").content_hash]
    found.append(Tensors(path, channels="last").content_hash)
    found.append(Tensors(write("1.safetensors", x0=VIDEO.flip(0), label=LABELS)).content_hash)
    assert len(set(found)) == 4


def test_data_that_does_not_fit_the_process_names_its_index(write, tmp_path):
    images = torch.zeros(30, 1, 8, 8)
    images[0] = 5
    data = Tensors(write(x0=images, label=torch.zeros(30, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"item 0 of the data lies in \[5, 5\]"):
        make_trainer(tmp_path / "run", data=data)
