"""Parts of all studies: a small network, its training, and a file of measurements to continue."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.run import Run
from diffcore.sampling.generation import default_sampler
from diffcore.training.averages.ema import Decay
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.trainer import Trainer

__all__ = [
    "BATCH",
    "continue_study",
    "create_trainer",
    "group_rows",
    "read_measurements",
    "sample_seeds",
    "small_unet",
    "train_averaged",
]

BATCH = 64
"""Images in each training step."""


def small_unet(
    size: int,
    image_channels: int,
    channels: tuple[int, int],
    class_embeddings: int | None = None,
) -> nn.Module:
    """Build a UNet of two resolutions with attention at the lower one.

    Args:
        size: height and width of the images in pixels.
        image_channels: channels of the images.
        channels: channels of the network at each resolution, multiples of 8.
        class_embeddings: number of classes with the null label; None: an unconditional network.

    Returns:
        The network of diffusers, with random weights.
    """
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(  # type: ignore[no-untyped-call, assignment]
        sample_size=size,
        in_channels=image_channels,
        out_channels=image_channels,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=channels[1] // 2,
        num_class_embeds=class_embeddings,
    )
    return network


def create_trainer(
    network: Callable[[], nn.Module],
    data: Dataset[Any],
    process: Process,
    objective: Objective,
    folder: Path,
    seed: int,
    steps: int,
    resume: bool = False,
) -> Trainer:
    """Create a training with the optimizer, learning rate and average of all studies.

    Args:
        network: function that builds the network.
        data: training images.
        process: diffusion process.
        objective: loss and its weight.
        folder: folder of the run.
        seed: seed of everything random in the run.
        steps: optimizer steps.
        resume: whether the folder holds the first steps of this run.

    Returns:
        The trainer, which has not started.
    """
    return Trainer(
        network=network,
        data=data,
        process=process,
        optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.99)),
        folder=folder,
        steps=steps,
        objective=objective,
        lr=LearningRate(1e-3, warmup=50),
        ema=Decay(0.995),
        batch_size=BATCH,
        seed=seed,
        trackers=[],
        resume=resume,
        sampler=default_sampler(process),
    )


def sample_seeds(seed: int, count: int) -> range:
    """The seeds of the samples of a measurement.

    Args:
        seed: seed of the training.
        count: number of samples, at most a million.

    Returns:
        Seeds that no other training uses.
    """
    return range(seed * 10**6, seed * 10**6 + count)


def train_averaged(trainer: Trainer) -> Denoiser:
    """Train a network.

    Args:
        trainer: settings of the run; its folder receives the files of the run.

    Returns:
        The network with the averaged weights after the last step, in evaluation mode.
    """
    trainer.train()
    return Run(trainer.folder).denoiser(network=trainer.network())


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of a study.

    Args:
        path: file with one JSON object in each line; it need not exist.

    Returns:
        The measurements, in the order of the file.
    """
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.is_file()
        else []
    )


def group_rows(
    rows: Iterable[dict[str, Any]], *names: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Group measurements, such as those of all seeds.

    Args:
        rows: measurements.
        *names: keys of the values that the measurements of a group share.

    Returns:
        The groups by these values, in the order of their first measurements.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def continue_study(
    path: Path,
    names: Sequence[str],
    cells: Iterable[tuple[Any, ...]],
    measure: Callable[..., Iterable[Mapping[str, Any]]],
) -> Iterator[str]:
    """Measure the cells of a study that its file does not contain yet, and append them.

    Args:
        path: file of measurements, see `read_measurements`.
        names: names of the values that identify a cell, which are keys of its measurements.
        cells: values of each cell.
        measure: function of these values that returns the measurements of a cell.

    Yields:
        The lines that were appended.
    """
    measured = {tuple(row[name] for name in names) for row in read_measurements(path)}
    for cell in cells:
        if cell in measured:
            continue
        key = dict(zip(names, cell, strict=True))
        lines = [json.dumps({**key, **row}, ensure_ascii=False) for row in measure(*cell)]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        yield from lines
