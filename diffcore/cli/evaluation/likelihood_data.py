"""The items whose likelihood is measured: x_0, what conditions the network, and their values."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffcore.cli.commands.sample import read_rank
from diffcore.cli.evaluation.data import read_source
from diffcore.cli.evaluation.likelihood_request import LikelihoodRequest
from diffcore.cli.evaluation.samples import wait_for_ranks
from diffcore.cli.image_model import ImageModel
from diffcore.core.conditions import BatchCondition, batch_condition
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.evaluation.likelihood.dequantisation import check_values, detect_bins
from diffcore.training.data.checks import Item, read_item
from diffcore.training.data.source import DataSource

__all__ = ["LikelihoodData", "read_data"]


class LikelihoodData(NamedTuple):
    """The items that are measured.

    Args:
        x0: (N, *shape) clean data, or latents.
        condition: their labels or conditions; None if the network has none.
        bins: number of their values; None if they are continuous.
        origin: description of the choice of the items, such as "64 of 297 items".
        is_latent: whether x_0 are latents of images.
    """

    x0: Tensor
    condition: BatchCondition | None
    bins: int | None
    origin: str
    is_latent: bool


def read_data(name: str, model: ImageModel, request: LikelihoodRequest) -> LikelihoodData:
    """Read the items of a data set that are measured; each rank reads all of them.

    They are spread evenly over the data, or are the first ones of a stream. Images become latents
    if the network works on latents. Latents are drawn from the encoder's distribution, as in
    training, keyed by the seed.

    Args:
        name: name of the data, see `read_source`.
        model: network, and the encoder of its latents.
        request: options of the command.

    Returns:
        The items.

    Raises:
        ValueError: the data does not fit the network or the options.
    """
    process = model.denoiser.process
    source = read_source(name, model.image_process)
    is_latent = source.is_latent or model.latents is not None
    _check(source, request, is_latent)
    _prepare(source, model.denoiser.device)
    known = (
        process if request.conditional else replace(process, classes=0, dropout=0, conditions={})
    )
    rows, origin = _choose(source, request)
    items = [_read_item(source, row, model, known, request.seed) for row in rows]
    x0, label, extras = default_collate(
        [(each.x0, each.label, _used(each, known)) for each in items]
    )
    condition = batch_condition(known, label, extras)
    if request.bins:
        check_values(process, x0, request.bins)
    bins = None if is_latent else request.bins or detect_bins(process, x0)
    return LikelihoodData(x0, condition, bins, origin, is_latent)


def _check(source: DataSource, request: LikelihoodRequest, is_latent: bool) -> None:
    if source.texts and request.conditional:
        raise ValueError(
            "the data has captions, expected items of x_0, or x_0 and a label: name the folder of "
            "the images, a file of arrays, or --conditional false"
        )
    if is_latent and request.bins:
        raise ValueError(
            f"bins is {request.bins}, but latents are continuous: leave it out, and their density "
            "is measured"
        )


def _prepare(source: DataSource, device: torch.device) -> None:
    """Make the items readable, on the first rank and then on the others."""
    rank, ranks = read_rank()
    if rank == 0:
        source.prepare(device, True)
    wait_for_ranks(ranks)
    if rank:
        source.prepare(device, False)


def _choose(source: DataSource, request: LikelihoodRequest) -> tuple[list[int], str]:
    """The indices of the items, and a description of the choice."""
    total = len(source)
    if not source.is_stream:
        count = min(request.n, total) if request.n else total
        return [index * total // count for index in range(count)], f"{count} of {total} items"
    if not 0 < request.n <= total:
        raise ValueError(
            f"n is {request.n}, but a stream has no known number of items, and {total} of its "
            f"first shard can be read by index: set n to 1 .. {total}, or `window` of the stream "
            "to at least n"
        )
    return list(range(request.n)), f"the first {request.n} items of the stream"


def _read_item(
    source: DataSource, row: int, model: ImageModel, process: Process, seed: int
) -> Item:
    """An item that fits the process of the network."""
    if source.is_latent:
        return read_item(partial(source.item, row, seed, row), row, process)
    if model.latents is None:
        return read_item(partial(source.__getitem__, row), row, process)
    images = replace(process, shape=model.image_process.shape, low=-1.0, high=1.0)
    item = read_item(partial(source.__getitem__, row), row, images)
    with torch.no_grad():
        image = item.x0[None].to(model.denoiser.device)
        mean, std = (value[0].cpu() for value in model.latents.posterior(image))
    z = normal(seed, Stream.LATENT, row, mean.shape)[0]
    return item._replace(x0=mean + std * z)


def _used(item: Item, process: Process) -> Mapping[str, Tensor]:
    """The conditions of the process among the extras of an item."""
    return {name: item.extras[name] for name in process.conditions}
