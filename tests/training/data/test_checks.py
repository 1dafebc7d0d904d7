"""Items, labels and classes that do not fit are refused with the index of the item."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from diffcore.core.process import Process
from diffcore.training.data import DataOrder, Digits, ImageFolder, as_data_source, load_batches
from diffcore.training.data.checks import check_data, check_held_out, prepare_data, split_item
from diffcore.training.data.source import DataSource
from tests.helpers.image_folders import write
from tests.helpers.training_runs import ListDataset

CPU = torch.device("cpu")
X0 = torch.zeros(2)
PROCESS = Process(shape=(2,), classes=10)


def read_all(data, process=PROCESS, workers=0):
    """Every item once, as the training loop reads it."""
    source = as_data_source(data)
    order = DataOrder(len(source), 0, len(source), 1, 0, 1).steps(0, 1)
    return list(load_batches(source, order, process, workers))


@pytest.mark.parametrize(
    "label", [3, np.int64(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
)
def test_a_label_is_any_integer(label):
    assert split_item((X0, label), 0) == (X0, 3, {})
    assert type(split_item([X0, label], 0)[1]) is int


def test_an_item_of_x0_alone_has_the_label_minus_one():
    assert split_item(X0, 0) == split_item((X0,), 0) == split_item([X0], 0) == (X0, -1, {})
    (batch,) = read_all(TensorDataset(torch.zeros(3, 2)), Process(shape=(2,)))
    assert (batch.x0.shape, batch.label.tolist()) == ((3, 2), [-1] * 3)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (3.7, "3.7"),
        (3.0, "3.0"),
        (None, "None"),
        ("cat", "'cat'"),
        (torch.tensor([0, 1, 0]), r"tensor\(\[0, 1, 0\]\)"),
        (torch.tensor(25.5), r"tensor\(25.5"),
    ],
)
def test_a_label_that_is_no_integer_is_refused_with_its_index(label, text):
    data = ListDataset((X0, 1), (X0, label))
    with pytest.raises(ValueError, match=f"item 1 of the data has the label {text}.*expected an"):
        read_all(data)


def test_an_item_of_three_parts_is_refused():
    with pytest.raises(ValueError, match=r"item 0 of the data has 3 parts, expected x_0, \("):
        read_all(ListDataset((X0, 1, "a caption")))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(3), 0), r"is torch.float32 of shape \(3,\), .* \(2,\): all items have"),
        ((torch.tensor([0.0, 2.0]), 0), r"lies in \[0, 2\], expected within the process's range"),
        ((torch.tensor([0.0, torch.nan]), 0), "has values that are not finite"),
        ((torch.tensor([0.0, -torch.inf]), 0), "has values that are not finite"),
        ((X0, 10), "has label 10, expected 0 .. 9: set process.classes"),
        (X0, r"has label -1, expected 0 .. 9: return \(x_0, label\)"),
        ((X0.int(), 0), "is torch.int32 of shape .*, expected a float tensor"),
        ({"x": X0}, "is dict, expected a float tensor"),
    ],
)
def test_any_item_that_does_not_fit_is_refused_with_its_index(item, message):
    data = ListDataset(*[(X0, 1)] * 4, item)
    check_data(as_data_source(data), PROCESS)  # reads item 0 alone
    with pytest.raises(ValueError, match=f"item 4 of the data {message}"):
        read_all(data)


def test_values_that_are_not_finite_are_refused_whatever_the_range():
    process = Process(shape=(2,), low=-torch.inf, high=torch.inf)
    with pytest.raises(ValueError, match="item 0 of the data has values that are not finite"):
        read_all(ListDataset(torch.tensor([torch.inf, 0.0])), process)


class BrokenDataset(Dataset):
    """Its last item raises an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2:
            raise self.error
        return X0, 0


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (StopIteration("end"), "StopIteration: end"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("a.png is torn"), "a.png is torn"),
    ],
)
def test_an_error_of_the_data_set_is_raised_with_the_index_of_the_item(error, text):
    with pytest.raises(ValueError, match=f"item 2 of the data cannot be read: {text}") as caught:
        read_all(BrokenDataset(error))
    assert caught.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_error_in_a_worker_is_one_line_and_keeps_the_traceback_as_a_note(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # the worker imports this module
    with pytest.raises(ValueError, match="item 2 of the data cannot be read: KeyError") as caught:
        read_all(BrokenDataset(KeyError("x")), workers=1)
    assert "\n" not in str(caught.value)
    assert "in __getitem__" in caught.value.__notes__[0]


def test_an_image_that_becomes_unreadable_in_a_run_is_named_with_its_index(tmp_path):
    for name in ("0.png", "1.png"):
        write(tmp_path / name)
    data = ImageFolder(str(tmp_path), 8, "L")
    (tmp_path / "1.png").write_bytes(b"torn")
    message = r"item 1 of the data cannot be read: .*1.png cannot be read: it is no image of a"
    with pytest.raises(ValueError, match=message):
        read_all(data, Process(shape=(1, 8, 8)))


@pytest.mark.parametrize("wrong", ["digits", "tensors"])
def test_all_labels_that_are_known_are_checked_before_the_run(wrong):
    if wrong == "digits":
        data, process, message = Digits(), Process(classes=5), "item 5 of the data has label 5"
    else:
        data = TensorDataset(torch.zeros(8, 2), torch.tensor([0, 1, 1, 0, 1, 2, 1, 0]))
        process, message = Process(shape=(2,), classes=2), "item 5 of the data has label 2"
    with pytest.raises(ValueError, match=message):
        check_data(as_data_source(data), process)


@pytest.mark.parametrize("labels", [torch.rand(4), torch.eye(4, dtype=torch.int64)])
def test_ages_and_one_hot_rows_beside_tensors_are_refused(labels):
    data = as_data_source(TensorDataset(torch.zeros(4, 2), labels))
    with pytest.raises(ValueError, match=r"item 0 of the data has the label tensor\("):
        check_data(data, Process(shape=(2,), classes=4))


def image_folder(folder, *names):
    for name in names:
        write(folder / name, mode="RGB")
    return ImageFolder(str(folder), 8)


def test_another_number_of_classes_than_the_folders_is_refused_until_it_is_set(tmp_path):
    data = image_folder(tmp_path, "cat/1.png", "dog/1.png")
    shape = (3, 8, 8)
    message = "process.classes is 10, but the data has 2 classes, cat, dog: set process.classes: 2"
    with pytest.raises(ValueError, match=message):
        check_data(data, Process(shape=shape, classes=10))
    check_data(data, Process(shape=shape, classes=2))


def test_classes_for_images_without_sub_folders_are_refused(tmp_path):
    data = image_folder(tmp_path, "1.png", "2.png")
    shape = (3, 8, 8)
    message = "process.classes is 10, but the data has no classes: put the images into one sub-"
    with pytest.raises(ValueError, match=message):
        check_data(data, Process(shape=shape, classes=10, dropout=0.1))
    check_data(data, Process(shape=shape))


def test_held_out_images_of_other_classes_are_refused(tmp_path):
    data = image_folder(tmp_path / "train", "ant/1.png", "bee/1.png")
    held_out = image_folder(tmp_path / "test", "bee/2.png", "cat/2.png")
    message = "held-out data has the classes bee, cat, expected .* training data, ant, bee: give"
    with pytest.raises(ValueError, match=message):
        check_held_out(held_out, data)
    (tmp_path / "test/cat").rename(tmp_path / "test/ant")
    check_held_out(ImageFolder(str(tmp_path / "test"), 8), data)
    check_held_out(None, data)
    check_held_out(Digits("test"), Digits())


def test_classes_that_are_ignored_are_reported(tmp_path, capsys):
    data = image_folder(tmp_path, "cat/1.png", "dog/1.png")
    prepare_data(data, Process(shape=(3, 8, 8)), CPU, True)
    message = "process.classes is 0, so that the 2 classes of the data are ignored"
    assert message in capsys.readouterr().err


def test_another_shape_of_images_is_refused_with_the_options_that_fit(tmp_path):
    data = image_folder(tmp_path, "1.png")
    message = (
        r"shape \(3, 8, 8\), expected .* \(1, 8, 8\): set process.shape: \[3, 8, 8\], and "
        "network.in_channels and network.out_channels: 3"
    )
    with pytest.raises(ValueError, match=message):
        check_data(data, Process(shape=(1, 8, 8)))


def test_data_that_is_not_ready_is_not_read():
    class Unprepared(DataSource):
        is_ready = False

        def __len__(self):
            return 1

    check_data(Unprepared(), Process(shape=(2,)))
