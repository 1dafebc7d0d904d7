"""Features of Inception-v3 with the weights of the original Fréchet inception distance."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from diffcore.evaluation.features.extractor import Extracted, FeatureExtractor, resize, to_rgb
from diffcore.io.files import hash_file

__all__ = ["WEIGHTS", "InceptionFeatures", "default_weights"]

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file of torch-fidelity's release v0.2.0; it ends with the beginning of its hash."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
HASH = "6726825d"
SIZE = 299


def default_weights() -> Path:
    """The place where torch-fidelity and torchmetrics keep the weights.

    Returns:
        The path below the hub of torch, which `TORCH_HOME` moves.
    """
    return Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of the last pooling layer, and the 1008 logits without bias.

    The network is that of torch-fidelity, which torchmetrics uses too. Images are resized with
    antialiasing and rounded to bytes before, so that its own resizing has no effect.

    Args:
        path: file of the weights; None: `default_weights`.
        device: device of the network.

    Raises:
        ValueError: the weights are missing or other ones, or torch-fidelity is not installed.
    """

    name = "inception"
    resizing = f"cubic, antialiased, to {SIZE} x {SIZE}, rounded to bytes"

    def __init__(self, path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        path = default_weights() if path is None else Path(path)
        if not path.is_file():
            raise ValueError(
                f"the weights of Inception are missing: download {URL} to {path}, or use other "
                "features, such as --features FILE of `diffcore features train`"
            )
        self.digest = hash_file(path)
        if not self.digest.startswith(HASH):
            raise ValueError(
                f"{path} has SHA-256 {self.digest[:8]}…, expected {HASH}…: download {URL} again"
            )
        if find_spec("torch_fidelity") is None or find_spec("torchvision") is None:
            raise ValueError(
                "the features of Inception need torch-fidelity and torchvision: pip install "
                "torch-fidelity"
            )
        module = import_module("torch_fidelity.feature_extractor_inceptionv3")
        self.device = torch.device(device)
        self.network = module.FeatureExtractorInceptionV3(
            self.name,
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=os.fspath(path),
        ).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features (N, 2048) and logits (N, 1008) of images (N, C, H, W) of bytes."""
        x = resize(to_rgb(images), SIZE).round().byte().to(self.device)
        features, logits = self.network(x)
        return Extracted(features.cpu(), logits.cpu())
