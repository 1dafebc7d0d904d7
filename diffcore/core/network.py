"""What a network may add to `nn.Module`: its own export, and a hash of frozen weights."""

from pathlib import Path
from typing import Any

from torch import nn

from diffcore.core.process import Process

__all__ = ["ExportableNetwork", "frozen_hash"]


class ExportableNetwork(nn.Module):
    """A network that writes itself as another library loads it, such as one of a diffusers
    pipeline.
    """

    @property
    def content_hash(self) -> str:
        """Hash of the weights that are not part of the state, such as those under an adapter; "" if
        none.

        A run is not resumed on other frozen weights.
        """
        return ""

    def export(self, folder: Path, process: Process) -> None:
        """Write the network into a run's folder.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.

        Raises:
            ValueError: The process cannot be expressed there; the message contains the reason.
        """
        raise NotImplementedError

    def exported_parts(self, folder: Path) -> Any:
        """The parts of the pipeline to sample from: this network with what `export` wrote to
        `folder`.
        """
        raise NotImplementedError


def frozen_hash(network: nn.Module) -> str:
    """Hash of the frozen weights of a network; "" for any network that does not know them."""
    return network.content_hash if isinstance(network, ExportableNetwork) else ""
