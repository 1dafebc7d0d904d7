"""The data protocol: defaults of a plain data set, and data that does not fit."""

import pytest
import torch
from torch.utils.data import Dataset

from diffcore.core.process import Process
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.checks import prepare_data, process_with_captions
from diffcore.training.data.source import DataSource


class UnlabelledDataset(Dataset):
    """x_0 without labels."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((2,), float(index))


class PreparedSource(DataSource):
    """A data set whose items exist only after `prepare`."""

    def __init__(self, item):
        self.prepared, self.items = item, []

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.items[index]

    @property
    def is_ready(self):
        return bool(self.items)

    def prepare(self, device, is_main_process):
        self.items = [self.prepared]


def test_a_plain_data_set_has_the_default_of_every_member():
    data, network = as_data_source(UnlabelledDataset()), torch.nn.Identity()
    assert len(data) == 5
    assert torch.equal(data.item(3, seed=1, position=7), data[3])
    assert (data.texts, data.vae, data.is_latent, data.content_hash) == ((), None, False, "")
    assert data.is_ready
    assert data.label_wrapper(torch.device("cpu"))(network) is network
    assert torch.equal(data.decode(data[2]), data[2])


def test_a_data_source_is_not_adapted_again():
    data = PreparedSource(torch.zeros(2))
    assert as_data_source(data) is data


def test_data_that_overrides_prepare_alone_is_prepared_and_checked():
    class PreparedOnly(PreparedSource):
        is_ready = True

        def __getitem__(self, index):
            return self.items[index] if self.items else torch.zeros(2)

    prepare_data(
        data := PreparedOnly(torch.zeros(2)), Process(shape=(2,)), torch.device("cpu"), True
    )
    assert data.items
    with pytest.raises(ValueError, match="expected a float tensor of the process's shape"):
        prepare_data(PreparedOnly(torch.zeros(3)), Process(shape=(2,)), torch.device("cpu"), True)


def test_data_is_checked_after_it_was_prepared():
    process = Process(shape=(2,))
    prepare_data(good := PreparedSource(torch.zeros(2)), process, torch.device("cpu"), True)
    assert good.is_ready
    with pytest.raises(ValueError, match="expected a float tensor of the process's shape"):
        prepare_data(PreparedSource(torch.zeros(3)), process, torch.device("cpu"), True)


def test_captions_define_the_classes_of_the_process():
    data = PreparedSource(torch.zeros(2))
    data.texts = ("a", "b", "c")
    assert process_with_captions(Process(shape=(2,)), data).classes == 3
    with pytest.raises(ValueError, match="classes is 2, but the data has 3 captions"):
        process_with_captions(Process(shape=(2,), classes=2), data)


@pytest.mark.parametrize(
    ("data", "message"),
    [(iter([1]), "list_iterator has no length: expected a map-style"), ([], "list is empty")],
)
def test_data_that_is_not_map_style_or_empty_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        as_data_source(data)
