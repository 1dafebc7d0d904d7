"""Averages of the weights with power-function profiles, and the average of any other length.

    average(t) = ∫₀ᵗ p(τ) weights(τ) dτ,   p(τ) = (γ+1) τ^γ / t^(γ+1)

Karras et al. 2024 (EDM2, 2312.02696). The length of a profile is its standard deviation over t.
From the averages of two lengths, saved at several steps, that of any other length is reconstructed
after training: its profile is approximated by a linear combination of the saved profiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from diffcore.io.safetensors import read_weights_and_metadata, write_weights

__all__ = [
    "MAX_LENGTH",
    "Combination",
    "PowerFunction",
    "Profile",
    "Snapshots",
    "combine_profiles",
    "find_snapshots",
    "reconstruct",
    "write_snapshot",
]

MAX_LENGTH = 12**-0.5
"""Length of the profile that is constant over the whole training (γ = 0)."""


@dataclass(frozen=True)
class PowerFunction:
    """Decay β(step) = (1 - 1/step)^(γ+1) of an average with a power-function profile.

    After t steps the weights of step τ have the share (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1), the
    integral of the profile from τ-1 to τ. The initial weights have none.

    Args:
        length: standard deviation of the profile over the number of steps, within (0, 0.2886];
            0.05 averages over about the last tenth of the training.

    Raises:
        ValueError: the length is outside this interval.

    Example:
        >>> round(PowerFunction(0.1).gamma, 2)
        6.94
    """

    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length <= MAX_LENGTH:
            raise ValueError(
                f"the length of an average is {self.length}, expected a standard deviation over "
                f"the training within (0, {MAX_LENGTH:.4f}], such as 0.05 or 0.1"
            )

    @cached_property
    def gamma(self) -> float:
        """γ, the largest root of length² (γ+2)² (γ+3) = γ + 1."""
        inverse = self.length**-2
        roots = np.roots([1.0, 7.0, 16 - inverse, 12 - inverse])
        return max(float(roots.real.max()), 0.0)

    def __call__(self, step: int) -> float:
        """β after `step` optimizer steps, counted from 1."""
        return float((1 - 1 / step) ** (self.gamma + 1))


@dataclass(frozen=True)
class Snapshots:
    """Averages that a run tracks beside its main one, and saves for a reconstruction.

    Each costs a float32 copy of the weights in memory and in each snapshot.

    Args:
        lengths: lengths of their power-function profiles; the published choice is 0.05 and 0.1.
            () tracks none.
        every: number of steps between two snapshots; the last step has one too.

    Raises:
        ValueError: a length is outside (0, 0.2886] or repeated, or `every` is not positive.
    """

    lengths: tuple[float, ...] = ()
    every: int = 1000

    def __post_init__(self) -> None:
        for length in self.lengths:
            PowerFunction(length)
        if len({f"{length:.4f}" for length in self.lengths}) < len(self.lengths):
            raise ValueError(
                f"lengths are {self.lengths}, expected ones that differ in four decimals"
            )
        if self.every < 1:
            raise ValueError(f"every is {self.every}, expected at least 1 step")

    def is_due(self, step: int, last: int) -> bool:
        """Whether a snapshot is written after `step` steps of a run of `last` steps."""
        return bool(self.lengths) and (step % self.every == 0 or step == last)


class Profile(NamedTuple):
    """The profile of a power-function average.

    Args:
        step: number of steps that it covers.
        gamma: exponent γ.
    """

    step: int
    gamma: float


class Combination(NamedTuple):
    """A linear combination of profiles that approximates another one.

    Args:
        coefficients: (N,) coefficient of each profile, in float64; their sum is 1 up to the error.
        error: distance from the approximated profile p, relative to its norm: √(∫ (Σ c_i p_i - p)²
            / ∫ p²).
    """

    coefficients: np.ndarray
    error: float


def combine_profiles(profiles: Sequence[Profile], target: Profile) -> Combination:
    """The combination Σ c_i p_i that is closest to a profile p: the least ∫ (Σ c_i p_i - p)² dτ.

    Args:
        profiles: N profiles.
        target: profile to approximate.

    Returns:
        The coefficients, with which Σ c_i average_i reconstructs the average, and the error.
    """
    gram = np.array([[_overlap(a, b) for b in profiles] for a in profiles])
    right = np.array([_overlap(a, target) for a in profiles])
    c = np.linalg.lstsq(gram, right, rcond=None)[0]
    norm = _overlap(target, target)
    square = float(c @ gram @ c - 2 * c @ right + norm)
    return Combination(c, (max(square, 0.0) / norm) ** 0.5)


def _overlap(a: Profile, b: Profile) -> float:
    """∫ p_a(τ) p_b(τ) dτ over the steps that both cover."""
    both = min(a.step, b.step)
    powers: float = (both / a.step) ** a.gamma * (both / b.step) ** b.gamma
    factor = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return factor * powers * both / (a.step * b.step)


def write_snapshot(
    folder: str | Path, length: float, step: int, average: dict[str, Tensor]
) -> None:
    """Write an average of the weights at a step.

    Args:
        folder: folder of the run's snapshots.
        length: length of the average.
        step: number of optimizer steps.
        average: averaged state of the network.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"length-{length:.4f}-step-{step:08d}.safetensors"
    write_weights(path, average, step=step, length=str(length))


def find_snapshots(folder: str | Path, last: int | None = None) -> list[Path]:
    """The snapshots of a run up to a step.

    Args:
        folder: folder of the run's snapshots.
        last: step of the newest one to consider; None: all.

    Returns:
        Their files, sorted by name.

    Raises:
        ValueError: there is none.
    """
    paths = [
        path
        for path in sorted(Path(folder).glob("length-*-step-*.safetensors"))
        if last is None or _step(path) <= last
    ]
    if not paths:
        until = "" if last is None else f" up to step {last}"
        raise ValueError(
            f"{folder} holds no snapshots{until}: train with --snapshots.lengths '[0.05,0.1]' to "
            "reconstruct averages afterwards"
        )
    return paths


def reconstruct(
    paths: Sequence[str | Path], length: float, step: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The average of a length, from snapshots of other lengths.

    Args:
        paths: files of snapshots, at least one of them at `step`.
        length: length of the average.
        step: step at which the average ends; None: the newest snapshot.

    Returns:
        The averaged state of the network in float32, and the error of its profile, see
        `Combination`.

    Raises:
        ValueError: no snapshot is at `step`, or the length is outside (0, 0.2886].
        CorruptFileError: a file is damaged.
    """
    files = [Path(path) for path in paths]
    step = max(map(_step, files)) if step is None else step
    if step not in map(_step, files):
        known = ", ".join(str(each) for each in sorted(set(map(_step, files))))
        raise ValueError(f"no snapshot is at step {step}, expected one of {known}")
    target = Profile(step, PowerFunction(length).gamma)
    profiles = [Profile(_step(path), PowerFunction(_length(path)).gamma) for path in files]
    coefficients, error = combine_profiles(profiles, target)
    total: dict[str, Tensor] = {}
    for path, coefficient in zip(files, coefficients, strict=True):
        tensors, _ = read_weights_and_metadata(path)
        for name, value in tensors.items():
            if not value.is_floating_point():
                total[name] = value  # a counter: the newest file is the last of its length
            elif name in total:
                total[name].add_(value.double(), alpha=float(coefficient))
            else:
                total[name] = value.double() * float(coefficient)
    average = {name: v.float() if v.is_floating_point() else v for name, v in total.items()}
    return average, error


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _length(path: Path) -> float:
    return float(path.stem.split("-")[1])
