"""A small conditional network that records its evaluations, for tests of sampling."""

from typing import Any

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from tests.helpers.oracles import process

SEEDS = (11, 2, 7, 30, 5, 1, 4)
LABELS = (0, 1, 1, 0, 2, 1, 0)


class RecordingNetwork(nn.Module):
    """A small conditional network that records its inputs, its batch sizes and its modes.

    Its dropout makes the result depend on the training mode.

    Args:
        fails: whether an evaluation raises RuntimeError.
    """

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
        self.frozen = nn.Dropout(0.5).eval()
        self.batch_sizes: list[int] = []
        self.inputs: list[Tensor] = []
        self.modes: set[bool] = set()
        self.fails = fails

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if self.fails:
            raise RuntimeError("the network failed")
        labels = torch.zeros(len(x)) if class_labels is None else class_labels
        self.batch_sizes.append(len(x))
        self.inputs.append(x)
        self.modes |= {module.training for module in self.modules()}
        return self.layers(torch.cat((x, time[:, None] / 1000, labels[:, None]), 1).to(x))


def small_denoiser(**fields: Any) -> Denoiser:
    """A `RecordingNetwork` with fixed weights, in evaluation mode.

    Args:
        fields: fields of the process that differ from those of `process`.
    """
    torch.manual_seed(0)
    return Denoiser(RecordingNetwork(), process(**fields)).eval()
