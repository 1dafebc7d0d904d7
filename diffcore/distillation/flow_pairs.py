"""Pairs of noise and the end of a teacher's flow, on which Reflow trains the next flow."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.core.random import Stream, uniform, words
from diffcore.distillation.teacher import Teacher
from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import check_header, read_weights, write_weights
from diffcore.io.specs import to_spec
from diffcore.samplers import Sampler
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, sample
from diffcore.schedules import Grid
from diffcore.training.data.cache import hash_content
from diffcore.training.data.source import NOISE, DataSource

__all__ = ["FlowPairs"]

SHARD = 1024
"""Number of pairs in a file: what an interrupted computation loses at most."""
BATCH = 256
"""Number of samples in a call of the network, times two with guidance."""


class FlowPairs(DataSource):
    """Pairs (ε, x_0), where x_0 is the end of the teacher's flow from ε, with their class labels.

    Training on the straight lines between the pairs is Reflow: the objective takes the ε of a pair
    in place of independent noise. Pairs are drawn once, before the first step, and kept in shards
    of 1024; an interrupted computation continues with the next shard. Pair i is a function of
    (seed, i): ε is not stored, and labels are uniform over the classes.

    Source: Liu et al. 2023, "Flow Straight and Fast" (2209.03003, Algorithm 1).

    Args:
        teacher: teacher whose flow is solved, with its guidance.
        folder: folder of the shards; those of other settings may lie in it too.
        count: number of pairs.
        sampler: solver of the flow, which should add no noise.
        grid: knots of the solver.
        steps: number of steps of the solver.
        seed: 64-bit seed of the pairs.

    Raises:
        ValueError: there are no pairs or no steps, or the teacher needs prompts.
    """

    has_noise = True

    def __init__(
        self,
        teacher: Teacher,
        folder: str,
        count: int = 20_000,
        sampler: Sampler = DEFAULT_SAMPLER,
        grid: Grid = DEFAULT_GRID,
        steps: int = 25,
        seed: int = 0,
    ) -> None:
        for name, value in (("count", count), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} of the pairs is {value}, expected at least 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed of the pairs is {seed}, expected within [0, 2^63)")
        if teacher.needs_prompts:
            raise ValueError(
                "the teacher is conditioned on text, and pairs have class labels only: distil it "
                "with Consistency or DistributionMatching, on images with captions"
            )
        self.teacher, self.count, self.seed = teacher, count, seed
        self.sampler, self.grid, self.steps = sampler, grid, steps
        self.folder = Path(folder)
        self.process = teacher.process
        classes, index = self.process.classes, torch.arange(count)
        u = uniform(seed, Stream.PAIR, index)[:, 0]
        self.labels = (u * classes).long().clamp(max=classes - 1) if classes else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        index = range(self.count)[index]
        shard, row = divmod(index, SHARD)
        x0 = _open(self._path(shard)).get_slice("x0")[row]
        label = -1 if self.labels is None else int(self.labels[index])
        noise = Noise(self._seeds(range(index, index + 1)), self.process.shape).start()[0]
        return x0, label, {NOISE: noise}

    @property
    def shards(self) -> list[Path]:
        """Paths of the files, each of which holds the tensor x0 of its pairs."""
        return [self._path(shard) for shard in range(math.ceil(self.count / SHARD))]

    @cached_property
    def _key(self) -> str:
        """Hash of everything that a pair depends on beside its index, apart from rounding."""
        parts = (self.sampler, self.grid, self.teacher.guidance)
        return hash_content(
            self.teacher.content_hash, str([to_spec(part) for part in parts]), f"{self.steps}"
        )

    def _path(self, shard: int) -> Path:
        size = min(SHARD, self.count - shard * SHARD)
        return self.folder / f"{self._key}-{self.seed}-{shard:05d}-{size}.safetensors"

    def _seeds(self, indices: Sequence[int]) -> Tensor:
        """Seeds (B,) of the noise of pairs, 64 bits, far from seeds that users choose."""
        high, low = words(self.seed, Stream.PAIR_SEED, torch.tensor(indices), 2).unbind(1)
        return (high << 32) | low

    @property
    def content_hash(self) -> str:
        return hash_content(self._key, f"{self.seed} {self.count}")

    @property
    def is_ready(self) -> bool:
        return all(path.is_file() for path in self.shards)

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        """Solve the flow for the shards that are missing.

        Args:
            device: device of the teacher's network.
            is_main_process: True on the rank that does the work.

        Raises:
            ValueError: a shard is corrupt.
        """
        if not is_main_process:
            return
        for path in filter(Path.is_file, self.shards):
            _check(path)
        missing = [shard for shard, path in enumerate(self.shards) if not path.is_file()]
        if not missing:
            return
        denoiser = self.teacher.denoiser(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard in tqdm(missing, desc="pairs of the flow", unit="shard", mininterval=0.5):
            x0 = self._solve(denoiser, range(shard * SHARD, min((shard + 1) * SHARD, self.count)))
            write_weights(self._path(shard), {"x0": x0})

    def _solve(self, denoiser: DenoiserProtocol, indices: range) -> Tensor:
        labels = None if self.labels is None else self.labels[indices.start : indices.stop]
        return sample(
            denoiser,
            self.sampler,
            self.grid,
            self.steps,
            seeds=self._seeds(indices),
            condition=labels,
            batch_size=BATCH,
        ).x


@lru_cache(maxsize=256)
def _open(path: Path) -> Any:
    """A shard whose rows are read one by one."""
    try:
        check_header(path)
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _check(path: Path) -> None:
    try:
        read_weights(path)
    except CorruptFileError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} of the pairs cannot be read ({error}): delete it, and it is computed again"
    )
