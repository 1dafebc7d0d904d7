"""Arrays of .npy files: what an item is, what is refused, and that single rows are read."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcore.core.process import Process
from diffcore.training.data import Arrays, DataOrder, load_batches
from diffcore.training.data.arrays import shards
from tests.helpers.hostile_files import Bomb
from tests.helpers.training_runs import crash_after, hashes, make_trainer, train

POINTS = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)


@pytest.fixture
def write(tmp_path):
    """A function that writes an array below the folder of the test, and returns its path."""

    def write(name, array):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        np.save(path, array)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        ("uint8", [0, 51, 255], [-1, -0.6, 1]),
        ("uint16", [0, 13107, 65535], [-1, -0.6, 1]),
        ("int8", [-128, 0, 64], [-1, 0, 0.5]),
        (">i2", [-32768, 0, 16384], [-1, 0, 0.5]),
        ("float16", [-3, 0.25, 7], [-3, 0.25, 7]),
        (">f8", [-3, 0.1, 7], [-3, 0.1, 7]),
    ],
)
def test_floats_are_kept_and_integers_are_scaled_by_their_type(write, dtype, stored, expected):
    x0, label = Arrays(write("x0.npy", np.array([stored, stored], dtype)))[1]
    assert (x0.dtype, label) == (torch.float32, -1)
    assert torch.allclose(x0, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-7)


def test_channels_are_moved_to_the_front_only_on_request(write):
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    path = write("images.npy", images)
    assert Arrays(path)[2][0].shape == (4, 6, 3)
    expected = torch.from_numpy(images[2]).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(Arrays(path, channels="last")[2][0], expected)


@pytest.mark.parametrize("named", ["shards", "shards/part-*.npy"])
def test_several_files_are_joined_by_name_with_their_labels(write, tmp_path, named):
    for part, first in enumerate((0, 17, 23)):
        write(f"shards/part-{part}.npy", POINTS[first : (17, 23, 40)[part]])
    write("labels.npy", np.arange(40) % 7)
    data = Arrays(str(tmp_path / named), str(tmp_path / "labels.npy"))
    assert len(data) == 40
    for index in (0, 16, 17, 22, 23, 39, -1):
        assert torch.equal(data[index][0], torch.from_numpy(POINTS[index]))
        assert data[index][1] == range(40)[index] % 7
    with pytest.raises(IndexError):
        data[40]


def test_labels_beside_the_data_are_not_data(write, tmp_path):
    write("all/points.npy", POINTS)
    labels = write("all/labels.npy", np.zeros(40, np.uint8))
    assert len(Arrays(str(tmp_path / "all"), labels)) == 40


def test_labels_are_read_from_an_archive(write, tmp_path):
    points = write("points.npy", POINTS)
    np.savez(tmp_path / "one.npz", anything=np.arange(40))
    np.savez(tmp_path / "two.npz", labels=np.arange(40), names=np.array(["a"] * 40))
    np.savez(tmp_path / "unclear.npz", a=np.arange(40), b=np.arange(40))
    assert Arrays(points, str(tmp_path / "one.npz"))[3][1] == 3
    assert Arrays(points, str(tmp_path / "two.npz")).labels.tolist() == list(range(40))
    with pytest.raises(ValueError, match="it has the arrays a, b, expected one that is named"):
        Arrays(points, str(tmp_path / "unclear.npz"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"has the shape \(4,\), expected \(items, \*shape of x_0\)"),
        (np.zeros((0, 2)), "cannot be read as an array|is empty"),
        (np.zeros((4, 2), np.int64), "holds int64, whose range is not known: convert it to float"),
        (np.zeros((4, 2), bool), "holds bool, whose range is not known"),
        (np.array([["a", "b"]]), "holds <U1, expected numbers"),
        (np.zeros((4, 2), [("x", "f4"), ("y", "f4")]), "expected numbers of one type"),
        (np.asfortranarray(np.zeros((4, 2))), "is in Fortran order"),
    ],
)
def test_an_array_that_holds_no_items_is_refused(write, array, message):
    with pytest.raises(ValueError, match=message) as caught:
        Arrays(write("x0.npy", array))
    assert "\n" not in str(caught.value)


def test_python_objects_are_refused_and_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bombs = np.empty((2, 1), object)
    bombs[:] = Bomb()
    np.save("bombs.npy", bombs, allow_pickle=True)
    np.save("points.npy", POINTS)
    np.savez("bombs.npz", label=bombs)
    with pytest.raises(ValueError, match=r"bombs.npy cannot be read as an array"):
        Arrays("bombs.npy")
    for labels in ("bombs.npy", "bombs.npz"):
        with pytest.raises(ValueError, match="cannot be read as labels: Object arrays"):
            Arrays("points.npy", labels)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("length", [0, 5, 64, 200, 447])
def test_a_truncated_file_is_refused_at_the_start_and_while_it_is_read(write, length):
    path = write("x0.npy", POINTS)
    content, data = Path(path).read_bytes(), Arrays(path)
    Path(path).write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"x0.npy cannot be read as an array") as caught:
        Arrays(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"x0.npy became shorter since the start of the run"):
        data[39]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(39, int), "has 39 labels, but the data has 40 items"),
        (np.zeros(40), "holds float64 of shape"),
        (np.zeros((40, 1), int), "expected an integer label for each item"),
    ],
)
def test_labels_that_do_not_fit_are_refused(write, labels, message):
    points = write("points.npy", POINTS)
    with pytest.raises(ValueError, match=message):
        Arrays(points, write("labels.npy", labels))


def test_paths_that_name_no_array_are_refused(write, tmp_path):
    write("points.npy", POINTS)
    (tmp_path / "text.txt").write_text("no array")
    for name, message in (
        ("missing.npy", "names no .npy file"),
        ("*.npz", "names no .npy file"),
        ("text.txt", "is not a .npy file"),
    ):
        with pytest.raises(ValueError, match=message):
            Arrays(str(tmp_path / name))
    write("shards/a.npy", POINTS)
    write("shards/b.npy", POINTS[:, :1])
    with pytest.raises(ValueError, match=r"rows of shape \(1,\), and .* of shape \(2,\)"):
        Arrays(str(tmp_path / "shards"))
    with pytest.raises(ValueError, match="channels is 'middle', expected first or last"):
        Arrays(str(tmp_path / "points.npy"), channels="middle")
    with pytest.raises(ValueError, match="without an axis of channels"):
        Arrays(str(tmp_path / "points.npy"), channels="last")


def read_samples(data, world, accumulation, workers, start=0):
    """{position: x_0 and label} of steps `start` .. 5 of all ranks."""
    samples = {}
    for rank in range(world):
        order = DataOrder(len(data), 5, 12, accumulation, rank, world).steps(start, 6)
        batches = load_batches(data, order, Process(shape=(2,), classes=7), workers)
        for number, batch in enumerate(batches):
            step = start + number // accumulation
            for row, in_batch in enumerate(batch.batch_index.tolist()):
                samples[12 * step + in_batch] = (*batch.x0[row].tolist(), int(batch.label[row]))
    return samples


def test_samples_do_not_depend_on_ranks_accumulation_workers_and_the_first_step(write):
    data = Arrays(write("x0.npy", POINTS), write("labels.npy", np.arange(40) % 7))
    whole = read_samples(data, 1, 1, 0)
    assert len(whole) == 72
    assert read_samples(data, 2, 2, 0) == whole
    assert read_samples(data, 1, 2, 2) == whole
    assert read_samples(data, 2, 1, 0, start=4) == {p: whole[p] for p in range(48, 72)}


def test_a_run_is_resumed_bit_for_bit_and_refused_on_other_data(write, tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    path, labels = write("x0.npy", images), write("labels.npy", np.arange(30) % 10)
    train(tmp_path / "straight", data=Arrays(path, labels))
    crash_after(make_trainer(tmp_path / "run", data=Arrays(path, labels), save_every=4), 4)
    images[29] = 255 - images[29]
    write("x0.npy", images)
    with pytest.raises(ValueError, match="data"):
        train(tmp_path / "run", data=Arrays(path, labels), save_every=4, resume=True)
    images[29] = 255 - images[29]
    write("x0.npy", images)
    train(tmp_path / "run", data=Arrays(path, labels), save_every=4, resume=True)
    name = "checkpoints/step-00000006"
    assert hashes(tmp_path / "run" / name) == hashes(tmp_path / "straight" / name)


def test_the_hash_depends_on_content_labels_names_and_options(write):
    images = np.zeros((6, 3, 3, 3), np.uint8)
    path = write("x0.npy", images)
    found = [Arrays(path).content_hash, Arrays(path, channels="last").content_hash]
    found += [Arrays(path, write("y.npy", np.arange(6) // k)).content_hash for k in (2, 3)]
    found.append(Arrays(write("x1.npy", images)).content_hash)
    images[3, 1, 1, 1] = 1
    found.append(Arrays(write("x0.npy", images)).content_hash)
    assert len(set(found)) == len(found)


def test_the_hash_of_a_large_file_reads_a_part_that_reaches_its_end(write, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "BLOCKS", 4)
    array = np.zeros((64, 8), np.float32)
    path = write("x0.npy", array)
    before = Arrays(path).content_hash
    array[-1, -1] = 1
    write("x0.npy", array)
    assert Arrays(path).content_hash != before


def test_files_of_different_sizes_are_hashed_whole_if_they_are_small_together(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "BLOCKS", 8)
    files = [tmp_path / "a", tmp_path / "b"]
    files[1].write_bytes(bytes(28))
    found = set()
    for changed in range(100):
        files[0].write_bytes(bytes([0] * changed + [1] + [0] * (99 - changed)))
        found.add(shards.hash_shards(files))
    assert len(found) == 100


MEMORY = """
import sys
import psutil
from diffcore.core.process import Process
from diffcore.training.data import Arrays, DataOrder, load_batches

data = Arrays(sys.argv[1])
order = DataOrder(len(data), 0, 64, 1, 0, 1).steps(0, len(data) // 64)
batches = load_batches(data, order, Process(shape=(3, 64, 64)), 0)
next(batches)
process = psutil.Process()
before = largest = process.memory_info().rss
for batch in batches:
    largest = max(largest, process.memory_info().rss)
print((largest - before) / 2**20, data.content_hash)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    count = 200 * 2**20 // (3 * 64 * 64)
    array = np.lib.format.open_memmap(
        tmp_path / "x0.npy", "w+", dtype=np.uint8, shape=(count, 3, 64, 64)
    )
    array[::97] = 7  # the rest is a hole of the file
    del array
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEMORY, str(tmp_path / "x0.npy")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(ended.stdout.split()[0]) < 30
