"""The studies of docs/claims.md by name."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from experiments.claims import arms, coupling, guided, input_scale, likelihood, oracles

__all__ = ["STUDIES"]

STUDIES: dict[str, Callable[[Path, Iterable[int]], Iterator[str]]] = {
    "arms": arms.run_study,
    "guided": guided.run_study,
    "coupling": coupling.run_study,
    "input-scale": input_scale.run_study,
    "likelihood": likelihood.run_study,
    "oracles": oracles.run_study,
}
"""Function that measures what its file lacks, from the path of the file and the seeds."""
