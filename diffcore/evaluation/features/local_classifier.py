"""A small classifier that `diffcore features train` trains on labelled images of one's own."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffcore.evaluation.features.extractor import Extracted, FeatureExtractor, resize, to_rgb
from diffcore.io.files import CorruptFileError, hash_file
from diffcore.io.safetensors import read_weights_and_metadata, write_weights

__all__ = ["ClassifierFeatures", "ClassifierNetwork", "write_classifier"]

KIND = "features classifier"
MAXIMUM = {"size": 256, "channels": 3, "classes": 10_000, "width": 512}
"""Largest value of each option that a file may contain."""


class ClassifierNetwork(nn.Module):
    """Three convolutions, of which two halve the resolution, their mean over space, and logits.

    Args:
        size: height and width of the images in pixels.
        channels: 1 or 3.
        classes: number of classes.
        width: channels of the first convolution; there are twice as many features.
    """

    def __init__(self, size: int, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.options = {"size": size, "channels": channels, "classes": classes, "width": width}
        for name, value in self.options.items():
            if not 1 <= value <= MAXIMUM[name]:
                raise ValueError(f"{name} is {value}, expected 1 to {MAXIMUM[name]}")
        layers: list[nn.Module] = []
        for inputs, stride in ((channels, 1), (width, 2), (2 * width, 2)):
            outputs = width if inputs == channels and stride == 1 else 2 * width
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1),
                nn.GroupNorm(1, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Features of images.

        Args:
            x: (N, channels, size, size) values from -1 to 1.

        Returns:
            (N, 2 width) features.
        """
        features: Tensor = self.body(x).mean((-2, -1))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images x (N, channels, size, size) with values from -1 to 1."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the network receives them.

        Args:
            images: (N, C, H, W) bytes of 1 or 3 channels.

        Returns:
            (N, channels, size, size) values from -1 to 1.

        Raises:
            ValueError: the images are of colour, and the network is of grey images.
        """
        channels = self.options["channels"]
        if images.shape[1] > channels:
            raise ValueError(
                "the classifier of the features was trained on grey images, but these have "
                f"{images.shape[1]} channels: train one on colour images"
            )
        x = resize(images, self.options["size"]) / 127.5 - 1
        return to_rgb(x) if channels == 3 else x


def write_classifier(path: str | Path, network: ClassifierNetwork, **facts: int | str) -> None:
    """Write a trained classifier as safetensors.

    Args:
        path: file to write; its folder is created.
        network: trained network.
        **facts: what is recorded beside its options, such as the accuracy on held-out images.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    write_weights(path, tensors, kind=KIND, **network.options, **facts)


class ClassifierFeatures(FeatureExtractor):
    """Features and logits of a classifier that `diffcore features train` wrote.

    Args:
        path: safetensors file.
        device: device of the network.

    Raises:
        ValueError: the file is missing, damaged, or holds no such classifier.
    """

    name = "local"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        tensors, metadata = read_weights_and_metadata(path)
        if metadata.get("kind") != KIND:
            raise ValueError(
                f"{path} holds no classifier of features: train one with `diffcore features train "
                "DATA --out FILE`"
            )
        try:
            self.network = ClassifierNetwork(**{name: int(metadata[name]) for name in MAXIMUM})
            self.network.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise CorruptFileError(
                f"{path} does not fit the options that it holds: {error}"
            ) from None
        self.network.to(device).eval()
        self.device = torch.device(device)
        self.digest, self.classes = hash_file(path), self.network.options["classes"]
        size = self.network.options["size"]
        self.resizing = f"cubic, antialiased, to {size} x {size}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features (N, 2 width) and logits (N, classes) of images (N, C, H, W) of bytes."""
        features = self.network.features(self.network.prepare(images).to(self.device))
        return Extracted(features.cpu(), self.network.head(features).cpu())
