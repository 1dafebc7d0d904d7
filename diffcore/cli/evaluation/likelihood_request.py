"""The options of `diffcore likelihood`."""

from dataclasses import dataclass, field
from typing import Literal

from diffcore.cli.sample_request import MAXIMUM_COUNT, MAXIMUM_THREADS
from diffcore.evaluation.likelihood.density import DEFAULT_SOLVER
from diffcore.evaluation.likelihood.dequantisation import (
    Dequantisation,
    TruncatedNormal,
    Uniform,
)
from diffcore.evaluation.likelihood.trace import ExactTrace, Hutchinson, Trace
from diffcore.run import AVERAGED
from diffcore.samplers import Sampler
from diffcore.schedules import Grid, Trailing

__all__ = ["LikelihoodRequest"]

FEW_DIMENSIONS = 16
"""Largest number of elements of x for which the command computes the exact trace by default."""


@dataclass(frozen=True)
class LikelihoodRequest:
    """What is measured, and how.

    Args:
        method: ode, the density of the probability flow; or bound, the variational bound of the
            steps of DDPM.
        n: number of items of the data, spread evenly over it; 0: all of them. Of a stream, number
            of its first items, at most its `window`.
        dequantisation: noise that turns the density into a probability of quantised data:
            truncated_normal (at the level whose noise fills the bin), uniform, or none for the
            density of continuous data. auto: truncated_normal if the data are quantised. It has no
            effect on the bound, which needs no noise.
        bins: number of equally spaced values of the data, from the low to the high end of the
            process's range: 256 for images of 8 bits. 0: the number that is found in the data.
        tau: standard deviations of the truncated normal noise in half of a bin.
        importance: number of draws of the noise for each item, which are importance weighted. More
            draws give a tighter bound, and take as many integrations.
        trace: divergence of the flow: exact (one backward pass for each element of x in every
            evaluation), hutchinson (random vectors), or auto, which is exact up to 16 elements.
        probes: number of random vectors of hutchinson for each item.
        solver: deterministic sampler that integrates the flow.
        steps: number of steps of a solver that is not adaptive (0: 1), or of the bound (0: every
            entry of a table, 1000 for a continuous schedule).
        grid: rule that places the knots of the bound; the last one is clean.
        variance: v within [0, 1] of the variance β̃^(1-v) β^v of the bound's steps: 0 is β̃, 1 is β;
            null: the variance that the network predicts, or 1 if that of its process is fixed.
        conditional: whether the labels and named conditions of the data condition the network.
        seed: seed of the noise and of the random vectors.
        weights: weights of a run: averaged, raw (the trained weights in the newest checkpoint), a
            checkpoint such as step-00000400 or step-00000400/raw, or a safetensors file.
        batch_size: number of items in one call of the network.
        threads: number of processor threads; 0: torch's default. The last digits of the result
            depend on it.
        device: device of the network: auto, cpu, cuda, ...
        out: folder of likelihood.json; "": the run's folder for its averaged weights, else
            evaluation in it, or FOLDER-evaluation beside a pipeline.
    """

    method: Literal["ode", "bound"] = "ode"
    n: int = 256
    dequantisation: Literal["auto", "truncated_normal", "uniform", "none"] = "auto"
    bins: int = 0
    tau: float = 3.0
    importance: int = 1
    trace: Literal["auto", "exact", "hutchinson"] = "auto"
    probes: int = 1
    solver: Sampler = field(default_factory=lambda: DEFAULT_SOLVER)
    steps: int = 0
    grid: Grid = field(default_factory=Trailing)
    variance: float | None = None
    conditional: bool = True
    seed: int = 0
    weights: str = AVERAGED
    batch_size: int = 64
    threads: int = 0
    device: str = "auto"
    out: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.n <= MAXIMUM_COUNT:
            raise ValueError(f"n is {self.n}, expected 0 for all items, or up to {MAXIMUM_COUNT:,}")
        if min(self.bins, self.steps, self.seed) < 0 or self.seed >= 2**62:
            raise ValueError(
                f"bins is {self.bins}, steps {self.steps} and seed {self.seed}, expected 0 or more,"
                " and a seed below 2^62"
            )
        if min(self.batch_size, self.importance) < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and importance {self.importance}, expected at "
                "least 1"
            )
        if not 0 <= self.threads <= MAXIMUM_THREADS:
            raise ValueError(
                f"threads is {self.threads}, expected at most {MAXIMUM_THREADS}, or 0 for torch's "
                "default"
            )

    def resolve_trace(self, size: int) -> Trace:
        """The trace for x of a number of elements.

        Args:
            size: number of elements.

        Returns:
            The exact trace, or an estimate by `probes` random vectors.
        """
        is_exact = self.trace == "exact" or (self.trace == "auto" and size <= FEW_DIMENSIONS)
        return ExactTrace() if is_exact else Hutchinson(self.probes)

    def resolve_dequantisation(self, bins: int | None) -> Dequantisation | None:
        """The noise for data of a number of values.

        Args:
            bins: number of values of the data; None: they are continuous.

        Returns:
            The noise; None for the density of continuous data.

        Raises:
            ValueError: the option does not fit the data.
        """
        if bins is None:
            if self.dequantisation in ("auto", "none"):
                return None
            raise ValueError(
                f"dequantisation is {self.dequantisation}, but the data is not quantised to "
                "equally spaced values in the process's range: use --dequantisation none, which "
                "measures its density"
            )
        if self.dequantisation == "none":
            raise ValueError(
                f"dequantisation is none, but the data has only {bins} values, whose density has "
                "no upper bound: use truncated_normal or uniform"
            )
        if self.dequantisation == "uniform":
            return Uniform(bins)
        return TruncatedNormal(bins, self.tau)
