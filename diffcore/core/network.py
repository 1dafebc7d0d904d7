"""Optional capabilities of a network: export to another library, and a hash of frozen weights."""

from pathlib import Path
from typing import Any

from torch import nn

from diffcore.core.process import Process

__all__ = ["ExportableNetwork", "frozen_hash"]


class ExportableNetwork(nn.Module):
    """A network that can be exported in another library's format, such as a diffusers pipeline."""

    @property
    def content_hash(self) -> str:
        """Hash of the weights outside the state dict, such as those under an adapter; "" if none.

        Training is resumed only if this hash is unchanged.
        """
        return ""

    def export(self, folder: Path, process: Process) -> None:
        """Write the network into a folder, in the format of the other library.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.

        Raises:
            ValueError: the format cannot express the process; the message states the reason.
        """
        raise NotImplementedError

    def exported_parts(self, folder: Path) -> Any:
        """The parts of the exported pipeline, with this network as one of them.

        Args:
            folder: folder that `export` has written to.

        Returns:
            The network and the other parts of the pipeline, ready for sampling.
        """
        raise NotImplementedError


def frozen_hash(network: nn.Module) -> str:
    """Hash of the frozen weights of a network.

    Returns:
        The network's `content_hash`, or "" if it is not an `ExportableNetwork`.
    """
    return network.content_hash if isinstance(network, ExportableNetwork) else ""
