"""`diffcore doctor FOLDER`: the process that the network of a run or pipeline was trained on."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffcore.cli.image_model import (
    ImageModel,
    PipelineOptions,
    is_pipeline,
    load_image_model,
)
from diffcore.doctor.findings import Finding, format_finding, write_findings
from diffcore.doctor.process import check_process, draw_errors, format_scores
from diffcore.io.parser import ComponentParser
from diffcore.run import Run
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.checks import split_item
from diffcore.training.data.image_folder import ImageFolder
from diffcore.training.data.source import DataSource

__all__ = ["examine_folder", "items_of"]


def examine_folder(argv: Sequence[str]) -> list[Finding]:
    """Rank processes by the denoising error of a network, and print the ranking and the verdict.

    Args:
        argv: command-line words; the first is the folder of a run or of a diffusers pipeline.

    Returns:
        The findings.

    Raises:
        ValueError: the folder holds no network, there are no images, or they do not fit it.
    """
    arguments = _parser().parse_args(list(argv))
    folder = Path(arguments.folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = load_image_model(folder, PipelineOptions(), device or torch.device("cpu"))
    source = _data(folder, arguments.data, model)
    x0, condition = items_of(source, model, max(arguments.count, 2))
    found = check_process(model.denoiser, x0, condition)
    print(f"The config describes {found.claim}.")
    print(f"Denoising error on {len(x0)} images, relative to the best linear denoiser:")
    print("\n".join(format_scores(found)))
    for note in found.notes:
        print(f"note     {note}")
    print(format_finding(found.finding))
    if arguments.out:
        out = Path(arguments.out)
        write_findings(out, [found.finding])
        draw_errors(found, out / "denoising-error.png")
    return [found.finding]


def _parser() -> ComponentParser:
    parser = ComponentParser(
        prog="diffcore doctor",
        usage="diffcore doctor FOLDER [--data IMAGES] [--count N] [--out OUT]",
        description="Find the process that a network was trained on (prediction type, schedule, "
        "time conditioning) by its denoising error on images, and compare the one that its config "
        "describes. The exit status is 1 if another one is decisively better.",
    )
    parser.add_argument(
        "folder", type=str, metavar="FOLDER", help="folder of a run or of a diffusers pipeline"
    )
    parser.add_argument(
        "--data",
        type=str,
        default="",
        help='folder of images like those that the network was trained on; "": the data of the run',
    )
    parser.add_argument("--count", type=int, default=64, help="number of images, at least 2")
    parser.add_argument(
        "--out", type=str, default="", help="folder for findings.json and a figure of the errors"
    )
    return parser


def _data(folder: Path, images: str, model: ImageModel) -> DataSource:
    """The images of a folder at the size of the network, or the data of a run."""
    if images:
        shape = model.image_process.shape
        if len(shape) != 3 or shape[1] != shape[2] or shape[0] not in (1, 3):
            raise ValueError(
                f"the network is of shape {shape}, expected square images of 1 or 3 channels: "
                "leave --data out to use the data of the run"
            )
        return ImageFolder(images, shape[1], "RGB" if shape[0] == 3 else "L", unreadable="skip")
    if is_pipeline(folder):
        raise ValueError("a pipeline names no data: give a folder of images, --data IMAGES")
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--data", type=Dataset)
    settings = parser.parse_object({"data": Run(folder).settings()["data"]})
    return as_data_source(parser.instantiate(settings).data)


def items_of(source: DataSource, model: ImageModel, count: int) -> tuple[Tensor, Tensor | None]:
    """x_0 of images that are evenly spread over the data, and their labels if they are needed.

    Args:
        source: images of a folder in [-1, 1], or the data of the run, which is x_0 itself.
        model: the network, with the encoder of its latents.
        count: largest number of images.

    Returns:
        x_0 (N, *shape), and labels (N,); None for the null label, which is used wherever the
        network was trained with it.
    """
    process = model.denoiser.process
    rows = _rows_of_shape(source, process.shape)
    count = min(count, len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    items = [split_item(source[row], row) for row in chosen]
    x0 = torch.stack([item.x0 for item in items])
    if isinstance(source, ImageFolder):
        x0 = _encoded(x0, model)
    device = model.denoiser.device
    labels = [item.label for item in items]
    has_labels = process.classes and all(0 <= label < process.classes for label in labels)
    # Without condition dropout the null label was never trained.
    uses_labels = has_labels and not process.dropout
    return x0.to(device), torch.tensor(labels, device=device) if uses_labels else None


def _rows_of_shape(source: DataSource, shape: tuple[int, ...]) -> Sequence[int]:
    """Indices of the items of a shape; all of them if the data has no buckets."""
    groups = source.groups
    if groups is None or not groups.shapes:
        return range(len(source))
    rows = [row for row in range(len(source)) if groups.shape(row) == shape]
    if not rows:
        raise ValueError(
            f"no bucket of the data holds items of the process's shape {shape}: examine the "
            "network on other data"
        )
    return rows


def _encoded(images: Tensor, model: ImageModel) -> Tensor:
    """Images in [-1, 1] as x_0 of the network: latents, or images in the range of the process."""
    process = model.denoiser.process
    if model.latents is not None:
        return torch.stack([model.encode(image) for image in images])
    return process.low + (images + 1) / 2 * (process.high - process.low)
