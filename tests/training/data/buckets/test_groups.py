"""Orders of grouped items: batches of one bucket, every item equally often, parts in proportion."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from diffcore.training.data import DataOrder
from diffcore.training.data.buckets.groups import Groups, Interleaving

SHAPES = ((1, 8, 8), (1, 4, 16), (1, 16, 4))
COUNTS = (23, 9, 1)
BATCH, SEED = 4, 2**40 + 3
GROUPS = Groups(SHAPES, torch.tensor([b for b, count in enumerate(COUNTS) for _ in range(count)]))


def read_steps(steps, world=1, accumulation=1, start=0, groups=GROUPS, batch=BATCH, seed=SEED):
    """The items of the global batch of each step, from all ranks and micro-batches."""
    items = {step: [None] * batch for step in range(start, steps)}
    for rank in range(world):
        split = (accumulation, rank, world)
        order = DataOrder(len(groups), seed, batch, *split, groups).steps(start, steps)
        for micro in order:
            for index, position in micro:
                items[position // batch][position % batch] = index
    return items


def test_every_global_batch_is_of_one_bucket():
    for items in read_steps(60).values():
        assert len({GROUPS.shape(index) for index in items}) == 1


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_the_grouped_order_is_the_same_for_every_split_and_start(world, accumulation):
    whole = read_steps(40)
    assert read_steps(40, world, accumulation) == whole
    assert read_steps(40, world, accumulation, 17) == {step: whole[step] for step in range(17, 40)}


def test_every_item_is_read_equally_often_and_no_remainder_is_dropped():
    """33 items in batches of 4: 33 · 4 steps are 16 epochs of the data."""
    counts = Counter(index for items in read_steps(33 * 4).values() for index in items)
    assert set(counts) == set(range(33))
    assert max(counts.values()) - min(counts.values()) <= 4  # a whole batch of the bucket of one
    assert abs(counts[32] - 16) <= 4
    assert {counts[index] for index in range(23)} <= {15, 16, 17}


def test_a_bucket_finishes_its_epoch_before_an_item_comes_again():
    order = [
        i
        for items in read_steps(40, groups=Groups(SHAPES[:1], torch.zeros(7).long())).values()
        for i in items
    ]
    for first in range(0, 140, 7):
        # One bucket: its batches are shuffled within an epoch of two steps, 8 samples.
        assert len(set(order[first : first + 7])) >= 4
    assert Counter(order[:56]) == dict.fromkeys(range(7), 8)


def test_the_order_of_buckets_depends_on_the_seed_and_the_epoch():
    def buckets(seed, start):
        order = DataOrder(33, seed, BATCH, 1, 0, 1, GROUPS)
        return [order.shape(step) for step in range(start, start + 9)]

    assert buckets(1, 0) != buckets(2, 0)
    assert buckets(1, 0) != buckets(1, 9)
    assert buckets(1, 0) == buckets(1, 0)


def test_each_batch_contains_two_parts_in_their_proportion():
    """12 items of part 0 at a rate of 1 and 4 of part 1 at 3: half of every batch each."""
    part = torch.tensor([0] * 12 + [1] * 4)
    groups = Groups(SHAPES[:1], torch.zeros(16).long(), part, (1.0, 3.0))
    for items in read_steps(50, groups=groups, batch=6).values():
        assert sorted(part[items].tolist()) == [0, 0, 0, 1, 1, 1]
    counts = Counter(i for items in read_steps(48, groups=groups, batch=6).values() for i in items)
    assert {counts[i] for i in range(12)} == {12}
    assert {counts[i] for i in range(12, 16)} == {36}


def test_an_interleaving_counts_each_part_without_gaps_at_any_length():
    rates = [Fraction(0.1), Fraction(3), Fraction(1, 7), Fraction(2)]
    sequence = Interleaving(rates)
    seen = [0] * 4
    for t in range(3000):
        part, before = sequence[t]
        assert before == seen[part]
        seen[part] += 1
    for count, rate in zip(seen, rates, strict=True):
        assert abs(count - 3000 * rate / sum(rates)) < 2
    assert sequence[10**15][1] == pytest.approx(10**15 * rates[sequence[10**15][0]] / sum(rates))


def test_the_groups_of_a_subset_keep_their_shapes_and_rates():
    chosen = GROUPS.select([32, 0, 23])
    assert [chosen.shape(index) for index in range(3)] == [SHAPES[2], SHAPES[0], SHAPES[1]]
    assert chosen.content_hash != GROUPS.content_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket": torch.tensor([0, 3])}, "values up to 3, expected one index in 0 .. 2"),
        ({"bucket": torch.tensor([0]), "visits": (0.0,)}, "visits is"),
        ({"bucket": torch.tensor([0]), "part": torch.tensor([1])}, "part is"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Groups(SHAPES, **change)
