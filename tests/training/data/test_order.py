"""The data order: a run reads the same global batches for every number of ranks, parts and workers."""

import pytest
import torch
from torch.utils.data import Dataset

from diffcore.training.data import DataOrder, Digits, as_data_source, load_batches

SIZE, BATCH, SEED = 37, 8, 2**40 + 3


def seen(world=1, accumulation=1, start=0, stop=12, seed=SEED):
    """{step: {place: index}} over all ranks and parts."""
    found = {step: {} for step in range(start, stop)}
    for rank in range(world):
        order = DataOrder(SIZE, seed, BATCH, accumulation, rank, world).steps(start, stop)
        assert len(order) == len(list(order)) == (stop - start) * accumulation
        for micro in order:
            assert len(micro) == BATCH // world // accumulation
            for index, position in micro:
                assert position % BATCH not in found[position // BATCH]
                found[position // BATCH][position % BATCH] = index
    return found


@pytest.mark.parametrize(
    ("world", "accumulation"),
    [(1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)],
)
def test_the_global_batch_is_the_same_however_it_is_split(world, accumulation):
    whole = seen()
    assert all(sorted(step) == list(range(BATCH)) for step in whole.values())
    assert seen(world, accumulation) == whole


def test_starting_later_continues_the_same_order():
    whole = seen()
    assert seen(start=5) == {step: whole[step] for step in range(5, 12)}
    assert seen(2, 2, start=5) == {step: whole[step] for step in range(5, 12)}


def test_every_epoch_is_another_permutation_of_the_data():
    order = DataOrder(SIZE, SEED, BATCH, 1, 0, 1)
    epochs = [[order.index(epoch * SIZE + place) for place in range(SIZE)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(SIZE))


def test_the_order_is_a_function_of_all_of_the_seed():
    assert seen(seed=3) != seen(seed=4)
    assert seen(seed=3) != seen(seed=2**40 + 3)  # a 32-bit seed would confuse them


def test_a_batch_larger_than_the_data_takes_items_again():
    order = DataOrder(3, 0, 8, 1, 0, 1).steps(0, 3)
    indices = [index for micro in order for index, _ in micro]
    assert len(indices) == 24
    assert all(sorted(indices[first : first + 3]) == [0, 1, 2] for first in range(0, 24, 3))


class Bare(Dataset):
    """x_0 without labels."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((2,), float(index))


def test_a_batch_says_where_its_samples_stand():
    data = Digits()
    order = DataOrder(len(data), 0, 8, 2, 1, 2)
    for step, parts in enumerate(zip(*[load_batches(data, order.steps(0, 3), 0)] * 2, strict=True)):
        for part, batch in enumerate(parts):
            assert batch.batch_index.tolist() == [
                4 * part + 2,
                4 * part + 3,
            ]  # the second rank of two
            assert batch.index.tolist() == [
                order.index(8 * step + index) for index in batch.batch_index.tolist()
            ]
            assert torch.equal(batch.x0, data.x0[batch.index])
            assert torch.equal(batch.label, data.labels[batch.index])


def test_data_without_labels_has_the_label_minus_one():
    (batch,) = load_batches(as_data_source(Bare()), DataOrder(5, 0, 4, 1, 0, 1).steps(0, 1), 0)
    assert batch.label.tolist() == [-1] * 4
    assert batch.x0[:, 0].tolist() == batch.index.tolist()


def test_workers_change_nothing():
    data = Digits()

    def made(workers):
        order = DataOrder(len(data), 7, 16, 2, 0, 1).steps(90, 100)  # crosses the end of an epoch
        return list(load_batches(data, order, workers))

    for ours, theirs in zip(made(0), made(2), strict=True):
        for name in ("x0", "label", "index", "batch_index"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
