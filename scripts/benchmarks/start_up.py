"""The seconds until a program starts, each time in a process of its own, beside other libraries."""

import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks.comparison import Comparison, time_pairs
from diffcore.evaluation.flow.order_statistics import median_rank

__all__ = ["measure_start_up"]

IMPORT = "from diffcore import Denoiser, Process, sample"
WORK: tuple[tuple[str, float, Sequence[str], Sequence[str]], ...] = (
    (
        "import of diffcore's sampling, beside torch",
        1.5,
        ("-c", IMPORT),
        ("-c", "import torch"),
    ),
    (
        "import of diffcore's sampling, beside a UNet and a scheduler of diffusers",
        1.0,
        ("-c", IMPORT),
        ("-c", "from diffusers import DDIMScheduler, UNet2DModel"),
    ),
    (
        "`diffcore --help`, beside an empty program",
        10.0,
        ("-m", "diffcore", "--help"),
        ("-c", "pass"),
    ),
    (
        "`diffcore sample --help`, beside torch",
        2.0,
        ("-m", "diffcore", "sample", "--help"),
        ("-c", "import torch"),
    ),
)
"""Name, largest ratio, and the arguments of Python of both sides."""


def measure_start_up(pairs: int = 12) -> list[Comparison]:
    """Start both sides in alternation.

    Args:
        pairs: measured pairs of each comparison, at least 6; a start scatters little.

    Returns:
        The comparisons.

    Raises:
        ValueError: there are fewer than 6 pairs.
    """
    median_rank(pairs)
    return [
        Comparison(name, bound, *time_pairs(_program(ours), _program(other), pairs, warmup=1))
        for name, bound, ours, other in WORK
    ]


def _program(arguments: Sequence[str]) -> Callable[[], None]:
    """A function that runs Python with these arguments until it ends."""

    def run() -> None:
        command = [sys.executable, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return run
