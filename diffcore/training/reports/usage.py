"""Speed and memory of a run. They depend on the machine, and have a file of their own."""

import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Usage", "peak_memory"]


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory of this process since its start, in bytes.

    Args:
        device: device of this rank.

    Returns:
        On CUDA `memory_allocated`, of tensors, and `memory_reserved`, with what torch's allocator
        keeps for later ones; elsewhere `memory_resident`, the largest resident size of the process;
        nothing where the system does not report it.
    """
    if device.type == "cuda":
        return {
            "memory_allocated": float(torch.cuda.max_memory_allocated(device)),
            "memory_reserved": float(torch.cuda.max_memory_reserved(device)),
        }
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return {}
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_resident": float(size if sys.platform == "darwin" else size * 1024)}


class Usage:
    """Images per second since the last report, and the largest memory of a rank.

    Args:
        accelerator: accelerator of this rank.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.images, self.start = 0, time.perf_counter()

    def restart(self) -> None:
        """Begin to count and to measure time anew."""
        self.images, self.start = 0, time.perf_counter()

    def count(self, images: int) -> None:
        """Add images of a step, over all ranks."""
        self.images += images

    def read(self) -> dict[str, float]:
        """Read speed and memory, and restart. Every rank must call it.

        Returns:
            `images_per_second`, which includes the time of previews, held-out losses and
            checkpoints; and the entries of `peak_memory`, the largest of all ranks.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        found = {"images_per_second": self.images / seconds}
        device = self.accelerator.device
        if memory := peak_memory(device):
            # float32, in which a device of any kind can gather: exact to 1 part in 10^7.
            own = torch.tensor([list(memory.values())], device=device)
            largest = self.accelerator.gather(own).amax(0).tolist()
            found |= dict(zip(memory, largest, strict=True))
        self.restart()
        return found
