"""The data order: the same global batches for every number of ranks, micro-batches and workers."""

import os
import signal

import pytest
import torch

from diffcore.core.process import Process
from diffcore.io.mistakes import is_mistake
from diffcore.io.specs import to_spec
from diffcore.training.construction import build_state
from diffcore.training.data import DataOrder, Digits, as_data_source, load_batches
from diffcore.training.data.order import batches as order_module
from diffcore.training.loop import training_batches
from tests.helpers.training_runs import ListDataset, make_trainer

SIZE, BATCH, SEED = 37, 8, 2**40 + 3
DIGITS = Process(shape=(1, 8, 8), classes=10)


def read_order(world=1, accumulation=1, start=0, stop=12, seed=SEED):
    """{step: {index in the global batch: index of the item}} of all ranks and micro-batches.

    Args:
        world: number of ranks.
        accumulation: number of micro-batches of a rank in a step.
        start: first step.
        stop: step after the last one.
        seed: seed of the run.

    Returns:
        The order.
    """
    items = {step: {} for step in range(start, stop)}
    for rank in range(world):
        order = DataOrder(SIZE, seed, BATCH, accumulation, rank, world).steps(start, stop)
        assert len(order) == len(list(order)) == (stop - start) * accumulation
        for micro in order:
            assert len(micro) == BATCH // world // accumulation
            for index, position in micro:
                assert position % BATCH not in items[position // BATCH]
                items[position // BATCH][position % BATCH] = index
    return items


@pytest.mark.parametrize(
    ("world", "accumulation"),
    [(1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)],
)
def test_the_global_batch_is_the_same_for_every_split(world, accumulation):
    whole = read_order()
    assert all(sorted(step) == list(range(BATCH)) for step in whole.values())
    assert read_order(world, accumulation) == whole


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_micro_batch_is_spread_over_the_global_batch_in_whole_groups(group):
    parts = [
        DataOrder(SIZE, SEED, 24, 2, rank, 2).keep_together(group).parts[part]
        for part in range(2)
        for rank in range(2)
    ]
    assert sorted(index for indices in parts for index in indices) == list(range(24))
    for number, indices in enumerate(parts):
        groups = torch.tensor(indices).view(-1, group)
        first = torch.arange(number, 24 // group, 4) * group
        assert torch.equal(groups, first[:, None] + torch.arange(group))


def test_starting_later_continues_the_same_order():
    whole = read_order()
    assert read_order(start=5) == {step: whole[step] for step in range(5, 12)}
    assert read_order(2, 2, start=5) == {step: whole[step] for step in range(5, 12)}


def test_each_epoch_is_a_different_permutation_of_the_data():
    order = DataOrder(SIZE, SEED, BATCH, 1, 0, 1)
    epochs = [[order.index(epoch * SIZE + offset) for offset in range(SIZE)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(SIZE))


def test_the_order_depends_on_all_64_bits_of_the_seed():
    assert read_order(seed=3) != read_order(seed=4)
    assert read_order(seed=3) != read_order(seed=2**40 + 3)  # their low 32 bits are equal


def test_a_batch_larger_than_the_data_repeats_items():
    order = DataOrder(3, 0, 8, 1, 0, 1).steps(0, 3)
    indices = [index for micro in order for index, _ in micro]
    assert len(indices) == 24
    assert all(sorted(indices[first : first + 3]) == [0, 1, 2] for first in range(0, 24, 3))


def test_a_batch_holds_the_items_and_their_indices():
    data = Digits()
    order = DataOrder(len(data), 0, 8, 2, 1, 2)
    for step, parts in enumerate(
        zip(*[load_batches(data, order.steps(0, 3), DIGITS, 0)] * 2, strict=True)
    ):
        for part, batch in enumerate(parts):
            in_batch = [2 * part + 1, 2 * part + 5]  # the second rank of two
            assert batch.batch_index.tolist() == in_batch
            assert batch.index.tolist() == [order.index(8 * step + index) for index in in_batch]
            assert torch.equal(batch.x0, data.x0[batch.index])
            assert torch.equal(batch.label, data.labels[batch.index])


def test_data_without_labels_has_the_label_minus_one():
    images = ListDataset(*(torch.full((2,), float(i)) for i in range(5)))
    process = Process(shape=(2,), high=4.0)
    order = DataOrder(5, 0, 4, 1, 0, 1).steps(0, 1)
    (batch,) = load_batches(as_data_source(images), order, process, 0)
    assert batch.label.tolist() == [-1] * 4
    assert batch.x0[:, 0].tolist() == batch.index.tolist()


def test_workers_do_not_change_the_batches():
    data = Digits()

    def batches(workers):
        order = DataOrder(len(data), 7, 16, 2, 0, 1).steps(90, 100)  # crosses the end of an epoch
        return list(load_batches(data, order, DIGITS, workers))

    for first, second in zip(batches(0), batches(2), strict=True):
        for name in ("x0", "label", "index", "batch_index"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_workers_read_ahead_as_the_settings_of_a_run_demand(tmp_path, monkeypatch):
    given = []
    loader = order_module.DataLoader
    monkeypatch.setattr(
        order_module, "DataLoader", lambda *data, **options: given.append(options) or loader(*data)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = ("workers", "prefetch", "pin_memory")
    for values in [(0, 5, True), (3, 5, True), (3, 2, False)]:
        trainer = make_trainer(tmp_path, **dict(zip(names, values, strict=True)))
        assert tuple(to_spec(trainer)[name] for name in names) == values  # of config.yaml
        training_batches(build_state(trainer), 1)
    names = ("num_workers", "prefetch_factor", "pin_memory")
    found = [tuple(options[name] for name in names) for options in given]
    assert found == [(0, None, True), (3, 5, True), (3, 2, False)]


class CrashingDataset(ListDataset):
    """A data set whose third item ends the worker that reads it, as a crash of a library does."""

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_with_the_remedy():
    data = as_data_source(CrashingDataset(*(torch.zeros(2) for _ in range(4))))
    order = DataOrder(4, 0, 4, 1, 0, 1).steps(0, 1)
    with pytest.raises(ValueError, match=r"a worker .* ended .*--workers 0 shows where") as caught:
        list(load_batches(data, order, Process(shape=(2,)), 1))
    assert is_mistake(caught.value, [])


@pytest.mark.parametrize(
    "extras", [{}, {"a": torch.zeros(2)}, {"a": torch.zeros(1), "b": torch.zeros(1)}]
)
def test_items_with_other_extras_than_the_first_are_refused(extras):
    """A further one would be left out of the batch without a word."""
    data = ListDataset((torch.zeros(2), 0, {"a": torch.zeros(1)}), (torch.zeros(2), 1, extras))
    order = DataOrder(2, SEED, 2, 1, 0, 1).steps(0, 1)
    process = Process(shape=(2,))
    with pytest.raises(ValueError, match="expected the same names and shapes in all items"):
        next(load_batches(as_data_source(data), order, process, 0))
