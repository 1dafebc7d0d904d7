"""Encoded images whose grey value is their label, and the labels that a run reads."""

import io
from collections.abc import Iterable
from itertools import chain

import torch
from PIL import Image

from diffcore.core.process import Process
from diffcore.training.data import DataSource, load_batches

PROCESS = Process(shape=(1, 2, 2), classes=100)


def flat(batches: Iterable[list[int]]) -> list[int]:
    """The labels of several batches."""
    return list(chain.from_iterable(batches))


def encoded(value: int) -> bytes:
    """A PNG file of 2x2 pixels of one grey value."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def labels_of(
    data: DataSource,
    steps: tuple[int, int],
    accumulation: int = 1,
    world: int = 1,
    workers: int = 0,
    batch: int = 8,
) -> list[list[int]]:
    """The labels of each global batch; every image is checked against its label."""
    result = []
    readers = [
        load_batches(
            data, data.order(3, batch, accumulation, rank, world).steps(*steps), PROCESS, workers
        )
        for rank in range(world)
    ]
    for _ in range(*steps):
        found = [0] * batch
        for _ in range(accumulation):
            for reader in readers:
                part = next(reader)
                value = (part.x0[:, 0, 0, 0] + 1) * 127.5
                assert torch.equal(value.round().long(), part.label)
                for position, label in zip(
                    part.batch_index.tolist(), part.label.tolist(), strict=True
                ):
                    found[position] = label
        result.append(found)
    assert not [part for reader in readers for part in reader]
    return result
