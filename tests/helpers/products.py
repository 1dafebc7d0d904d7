"""Cross products of test parameters, of which a fixed sample runs by default.

The remaining combinations carry the marker `thorough` and run with `make test-thorough`.
"""

import random
from collections.abc import Hashable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def sampled(*axes: Sequence[Any], count: int, names: Iterable[str] = ()) -> list[Any]:
    """The cross product of the axes, of which about `count` combinations are not `thorough`.

    The sample depends only on the lengths of the axes, and every value of every axis is in it.

    Args:
        axes: values of each parameter, in the order of the parameters.
        count: number of combinations that run by default; more if an axis needs more to be covered.
        names: test identifiers of the combinations, in the order of the product; default: pytest's.

    Returns:
        One `pytest.param` per combination, in the order of `itertools.product`.
    """
    indices = list(product(*(range(len(axis)) for axis in axes)))
    kept = _sample(indices, count)
    identifiers = list(names) or [None] * len(indices)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, index, strict=True)),
            marks=() if index in kept else pytest.mark.thorough,
            id=identifier,
        )
        for index, identifier in zip(indices, identifiers, strict=True)
    ]


def thinned(cases: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """The cases, of which `count`, evenly spaced from the first, are not `thorough`.

    Args:
        cases: values of the parameters of each case.
        count: number of cases that run by default.

    Returns:
        One `pytest.param` per case, in their order.
    """
    kept = {index * len(cases) // count for index in range(count)}
    return [
        pytest.param(*case, marks=() if index in kept else pytest.mark.thorough)
        for index, case in enumerate(cases)
    ]


def covered(cases: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """Part of a cross product, of which about `count` cases are not `thorough`.

    Values are told apart by their text, and every value of every parameter is in those cases.

    Args:
        cases: values of the parameters of each case.
        count: number of cases that run by default; more if a parameter needs more to be covered.

    Returns:
        One `pytest.param` per case, in their order.
    """
    names = [tuple(map(str, case)) for case in cases]
    kept = _sample(names, count)
    return [
        pytest.param(*case, marks=() if name in kept else pytest.mark.thorough)
        for name, case in zip(names, cases, strict=True)
    ]


def _sample(indices: Sequence[tuple[Hashable, ...]], count: int) -> set[tuple[Hashable, ...]]:
    """A fixed choice of `count` combinations in which every value of every axis occurs."""
    shuffled = list(indices)
    random.Random(0).shuffle(shuffled)
    kept: set[tuple[Hashable, ...]] = set()
    seen: set[tuple[int, Hashable]] = set()
    for index in shuffled:
        values = set(enumerate(index))
        if values - seen:
            kept.add(index)
            seen |= values
    for index in shuffled:
        if len(kept) >= count:
            break
        kept.add(index)
    return kept
