"""Feature extractors by name or path."""

from pathlib import Path

import torch

from diffcore.evaluation.features.extractor import FeatureExtractor
from diffcore.evaluation.features.inception import InceptionFeatures
from diffcore.evaluation.features.local_classifier import ClassifierFeatures
from diffcore.evaluation.features.pixels import PixelFeatures
from diffcore.evaluation.features.pretrained import NAMES, PretrainedFeatures, find_pretrained

__all__ = ["load_features"]


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The feature extractor of a name.

    Args:
        name: pixels; inception, or a .pth file of its weights; clip or dinov2, or a folder of a
            model of transformers; or a .safetensors file of `diffcore features train`.
        device: device of the network.

    Returns:
        The extractor.

    Raises:
        ValueError: the name is unknown, or a file is missing; the message is the remedy.
    """
    path = Path(name)
    if name == "pixels":
        return PixelFeatures()
    if name == "inception" or path.suffix == ".pth":
        return InceptionFeatures(None if name == "inception" else path, device)
    if path.suffix == ".safetensors":
        return ClassifierFeatures(path, device)
    if name in NAMES or (path / "config.json").is_file():
        return PretrainedFeatures(find_pretrained(name) if name in NAMES else path, device)
    raise ValueError(
        f"features is {name!r}, expected pixels, inception, {', '.join(NAMES)}, a file of "
        "`diffcore features train`, or a folder of a model of transformers"
    )
