"""`diffcore features train`: train a classifier whose features evaluations compare."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffcore.cli.arguments import wants_help
from diffcore.cli.commands.sample import find_device
from diffcore.cli.evaluation.data import read_images
from diffcore.cli.sample_request import MAXIMUM_THREADS
from diffcore.evaluation.features.classifier_training import train_classifier
from diffcore.evaluation.features.feature_table import chunks
from diffcore.evaluation.features.local_classifier import write_classifier
from diffcore.io.parser import ComponentParser

__all__ = ["FeatureTraining", "main"]


@dataclass(frozen=True)
class FeatureTraining:
    """How the classifier is trained, and where it is written.

    Args:
        out: safetensors file to write.
        size: height and width in pixels to which images are resized; 0: that of the images, at most
            64.
        width: channels of the first convolution; there are twice as many features.
        steps: number of training steps.
        batch_size: number of images in a step.
        lr: largest learning rate.
        seed: seed of the initial weights, the held-out tenth and the order.
        threads: number of processor threads; 0: torch's default.
        device: device of the training: auto, cpu, cuda, ...
    """

    out: str
    size: int = 0
    width: int = 32
    steps: int = 1000
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0
    threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 < self.lr < float("inf"):
            raise ValueError(
                f"steps is {self.steps}, batch_size {self.batch_size} and lr {self.lr}, expected "
                "positive numbers"
            )
        if not 0 <= self.threads <= MAXIMUM_THREADS:
            raise ValueError(
                f"threads is {self.threads}, expected at most {MAXIMUM_THREADS}, or 0 for torch's "
                "default"
            )
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .safetensors")


def main(argv: Sequence[str]) -> None:
    """Train a classifier on the data that the words name.

    Args:
        argv: command-line words after `features`; the first is `train`.
    """
    words = list(argv)
    if words[:1] != ["train"] and not wants_help(words):
        raise ValueError("expected: diffcore features train DATA --out FILE")
    parser = ComponentParser(
        prog="diffcore features train",
        usage="diffcore features train DATA --out FILE [--option value ...]",
        description="Train a small classifier on labelled images, and write it as safetensors for "
        "`diffcore evaluate --features FILE`. DATA is a folder of images with one sub-folder for "
        "each class, a run (its data), a .npy or .safetensors file with labels, or a data set such "
        "as Digits.",
    )
    parser.add_argument("data", type=str, metavar="DATA", help="labelled images")
    parser.add_class_arguments(FeatureTraining)
    settings = parser.instantiate(parser.parse_args(words[words[:1] == ["train"] :])).as_dict()
    data = settings.pop("data")
    _train(data, FeatureTraining(**settings))


def _train(data: str, request: FeatureTraining) -> None:
    if request.threads:
        torch.set_num_threads(request.threads)
    source = read_images(data)
    size = request.size or min(64, *source.shape[1:])
    images = torch.cat([source.read(rows) for rows in chunks(len(source))])
    trained = train_classifier(
        images,
        source.labels,
        size,
        request.width,
        request.steps,
        request.batch_size,
        request.lr,
        request.seed,
        find_device(request.device),
    )
    write_classifier(
        request.out,
        trained.network,
        data=data,
        accuracy=f"{trained.accuracy:.4f}",
        seed=request.seed,
    )
    print(
        f"{len(source) - trained.held_out} images of {trained.network.options['classes']} classes "
        f"-> {request.out}: {trained.accuracy:.1%} of {trained.held_out} held-out images are "
        f"recognised; {2 * request.width} features"
    )
