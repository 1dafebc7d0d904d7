"""What the playground samples: an exact distribution, or the network of a run or of a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from diffcore.cli.commands.playground.request import is_exact
from diffcore.cli.image_model import ImageModel, PipelineOptions, load_image_model
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.oracle import Oracle, plane_distribution
from diffcore.core.process import Process
from diffcore.schedules import Schedule

__all__ = ["PlaygroundModel", "load_model"]

MODELS_KEPT = 2
"""Number of models that stay in memory: a pipeline is one for each set of prompts."""


@dataclass(frozen=True)
class PlaygroundModel:
    """A denoiser and how its samples are decoded.

    Args:
        name: name of a distribution, or folder of a run or of a pipeline.
        denoiser: network with its process, or the exact denoiser of the distribution.
        network: network of a run or a pipeline with its decoder; None for a distribution.
    """

    name: str
    denoiser: DenoiserProtocol
    network: ImageModel | None = None

    @property
    def oracle(self) -> Oracle | None:
        """The exact distribution, or None for a network."""
        return self.denoiser if isinstance(self.denoiser, Oracle) else None

    @property
    def sample_process(self) -> Process:
        """The process with the shape and the range of decoded samples."""
        return self.denoiser.process if self.network is None else self.network.image_process

    @property
    def is_text_conditioned(self) -> bool:
        """Whether a label stands for a prompt."""
        return self.network is not None and self.network.is_text_conditioned

    def decode(self, x: Tensor) -> Tensor:
        """Decode samples.

        Args:
            x: (N, *shape) samples of the process.

        Returns:
            (N, *sample_process.shape) samples; those of a process without latents are unchanged.
        """
        return x if self.network is None else self.network.decode(x)


def load_model(
    name: str, schedule: Schedule, prompts: Sequence[str], device: torch.device
) -> PlaygroundModel:
    """Load a model, with the safeguards of `diffcore sample`; the last ones stay in memory.

    Args:
        name: name of a distribution, or folder of a run or of a pipeline.
        schedule: noise levels of a distribution.
        prompts: prompts of a pipeline.
        device: device of the network.

    Returns:
        The model.

    Raises:
        ValueError: the folder is neither a run's nor a pipeline's, or a run has no prompts.
    """
    if is_exact(name):
        return PlaygroundModel(name, plane_distribution(name, schedule))
    return _load_network(name, tuple(prompts), device)


@lru_cache(maxsize=MODELS_KEPT)
def _load_network(name: str, prompts: tuple[str, ...], device: torch.device) -> PlaygroundModel:
    model = load_image_model(Path(name), PipelineOptions(prompt=prompts), device)
    return PlaygroundModel(name, model.denoiser, model)
