"""From seeds to samples: `sample`, its checks before the first step, and its chunks."""

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.core.condition_values import resolve, with_seeds
from diffcore.core.conditions import LABEL, BatchCondition, Conditions, null_condition
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.network import find_learned_levels
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, find_networks
from diffcore.guidance.reference import Condition
from diffcore.samplers import DDIM, DDPM, AdamsMoulton, Consistency, Sampler
from diffcore.sampling.graph import graph_of_loop
from diffcore.sampling.loop import (
    Callback,
    check_guidance,
    check_levels,
    count_evaluations,
    evaluation_mode,
    integrate,
)
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Grid, Level, UniformBlend

__all__ = [
    "DEFAULT_GRID",
    "DEFAULT_SAMPLER",
    "NonFiniteWarning",
    "Samples",
    "add_noise",
    "check_sampling",
    "default_sampler",
    "evaluation_mode",
    "padded_chunks",
    "sample",
    "warn_of_non_finite",
]

DEFAULT_SAMPLER: Sampler = AdamsMoulton(3, every=10)
"""Default sampler; with DEFAULT_GRID nearest to the exact flow (docs/benchmarks.md)."""
DEFAULT_GRID: Grid = UniformBlend(1.25, 0.5)
"""Default grid: from pure noise to clean, densest in λ at σ/α = 0.5."""


def default_sampler(process: Process) -> Sampler:
    """The sampler of a network of which no other is chosen.

    Args:
        process: process of the network.

    Returns:
        DEFAULT_SAMPLER; Consistency() for a consistency network, DDIM() for one that estimates the
        mean velocity, and DDPM() for one with a learned encoder.
    """
    others = {"consistency": Consistency(), "mean_velocity": DDIM(), "encoded_mean": DDPM()}
    return others.get(process.estimate, DEFAULT_SAMPLER)


class NonFiniteWarning(RuntimeWarning):
    """Samples contain NaN or infinity."""


class Samples(NamedTuple):
    """The result of `sample`.

    Args:
        x: (N, *shape) samples on the host, one for each seed.
        knots: levels between which the sampler stepped, including those that guidance adds. Learned
            levels of the elements are functions of their times.
        evaluations: mean number of network evaluations for each sample.
        planned: number of evaluations if no rule stops early; None for an adaptive sampler.
    """

    x: Tensor
    knots: tuple[Level, ...]
    evaluations: float
    planned: int | None


def sample(
    denoiser: DenoiserProtocol,
    sampler: Sampler | None = None,
    grid: Grid = DEFAULT_GRID,
    steps: int = 25,
    *,
    seeds: Sequence[int] | Tensor,
    condition: Condition = None,
    guidance: Guidance = CFG(1.0),
    image: Tensor | None = None,
    batch_size: int = 64,
    micro_batch: int = 0,
    dtype: torch.dtype = torch.float32,
    path: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    graph: bool = False,
) -> Samples:
    """Draw one sample for each seed. A sample is a function of its seed and its condition alone.

    The network is always evaluated on `batch_size` samples (and as many for each reference, in the
    same call); the last chunk is padded. Equal batch sizes give equal bits, whatever else is in the
    batch; another size agrees to rounding.

    Args:
        denoiser: network with its process, or an exact denoiser.
        sampler: numerical integrator; None: that of the process (`default_sampler`).
        grid: rule that places the knots.
        steps: number of steps; 1 to 4 are enough for a distilled network.
        seeds: N integers of 64 bits, one for each sample: a sequence, or an integer tensor (N,).
        condition: N class labels (the null label is no condition), or a table of values by the name
            of the condition, of which `label` is the class: {"label": [3, 3], "image": (N, C, H,
            W)}; one value without N is that of all samples. None: unconditional samples.
        guidance: guidance rule; CFG(1) is the conditional model. Levels at which the rule changes
            its mode become knots.
        image: x_0 to start from (image-to-image), (N, *shape) or (*shape). The first x is α x_0 + σ
            z at the first knot, so that the grid determines how much of the image is kept:
            Within(grid, low=λ of that noise).
        batch_size: number of samples that are integrated together.
        micro_batch: number of samples in each call of the network; 0: `batch_size` and its
            references in one call.
        dtype: dtype of the samples during integration.
        path: True draws the noise of stochastic samplers as increments of one Brownian path for
            each seed (see Noise), so that the same seed with more steps gives a nearby sample.
        progress: True shows a progress bar.
        callback: receives each step of each chunk of `batch_size` samples, and can stop that chunk.
        graph: True captures the loop of a deterministic sampler as a CUDA graph, which is replayed
            for each chunk.

    Returns:
        The samples, their knots, and the number of network evaluations. A NonFiniteWarning counts
        samples with NaN or infinity.

    Raises:
        ValueError: The arguments do not fit together. It is raised before the first step, with the
            remedy.

    Example:
        sample(Run(Path("runs/digits")).denoiser(), seeds=range(16), condition=[3] * 16,
        guidance=CFG(2.0))
    """
    process = denoiser.process
    sampler = sampler or default_sampler(process)
    knots = insert_levels(grid.knots(process.schedule, steps), guidance.levels(process))
    given = check_sampling(process, knots, seeds, condition, guidance, batch_size, sampler)
    _check_computation(micro_batch, dtype)
    image = None if image is None else _images(process, knots[0], len(seeds), image)
    device, all_seeds = denoiser.device, torch.tensor([int(seed) for seed in seeds])
    learned = find_learned_levels(denoiser.network)
    captured = None
    if graph:
        captured = graph_of_loop(denoiser, sampler, knots, guidance, micro_batch, callback)
    chunks, evaluations = [], 0
    bar = tqdm(total=len(seeds), unit="sample", disable=not progress)
    with torch.no_grad(), evaluation_mode(denoiser, *find_networks(guidance)), bar:
        for chunk, real in padded_chunks(len(seeds), batch_size):
            noise = Noise(all_seeds[chunk], process.shape, device, dtype, path)
            levels = (
                knots
                if learned is None
                else learned.knots(knots, learned.sample_latent(all_seeds[chunk]))
            )
            first = levels[0]
            x = (
                noise.first_sample(first, process.sigma_data)
                if image is None
                else add_noise(image[chunk], first, noise)
            )
            chosen = None if given is None else given[chunk].to(device)
            if captured is not None:
                x, count = captured(x, chosen)
            else:
                x, count = integrate(
                    denoiser,
                    sampler,
                    x,
                    levels,
                    noise,
                    guidance,
                    chosen,
                    micro_batch,
                    callback,
                    checked=True,
                )
            chunks.append(x.cpu())
            evaluations += count * real
            bar.update(real)
    x = torch.cat(chunks)[: len(seeds)]
    warn_of_non_finite(x)
    return Samples(
        x,
        knots,
        evaluations / len(seeds),
        count_evaluations(process, sampler, knots, guidance),
    )


def _check_computation(micro_batch: int, dtype: torch.dtype) -> None:
    """Raise ValueError if the size of a call of the network or the dtype of samples is wrong."""
    if micro_batch < 0:
        raise ValueError(
            f"micro_batch is {micro_batch}, expected a number of samples, or 0 for one call of the "
            "network"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a floating-point type such as torch.float32")


def warn_of_non_finite(x: Tensor) -> None:
    """Warn with NonFiniteWarning of samples with NaN or infinity, and count them.

    Args:
        x: (N, *shape) samples.
    """
    bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(x)} samples are not finite, the first at index {bad[0]}: check "
            "the weights, or use less guidance, more steps or another sampler",
            NonFiniteWarning,
            stacklevel=3,
        )


def add_noise(image: Tensor, level: Level, noise: Noise) -> Tensor:
    """α x_0 + σ z, where z is the noise from which sampling starts.

    Args:
        image: (B, *shape) x_0.
        level: level of the result.
        noise: noise of the samples.

    Returns:
        (B, *shape) noisy samples, in the dtype and on the device of `noise`.
    """
    z = noise.start()
    return level.alpha * image.to(z) + level.sigma * z


def check_sampling(
    process: Process,
    knots: tuple[Level, ...],
    seeds: Sequence[int] | Tensor,
    condition: Condition,
    guidance: Guidance,
    batch_size: int,
    sampler: Sampler | None = None,
) -> BatchCondition | None:
    """Check all arguments of sampling, and return the condition.

    Args:
        process: process of the network.
        knots: levels between which the sampler steps.
        seeds: one integer for each sample.
        condition: one label for each sample, values by name, or None.
        guidance: guidance rule.
        batch_size: number of samples that are integrated together.
        sampler: numerical integrator; None: an algorithm that needs the posterior mean.

    Returns:
        The labels (N,), the null label without a condition; `Conditions` if the process has named
        ones; None without either.

    Raises:
        ValueError: An argument is out of range, or the arguments do not fit together.
    """
    check_levels(process, knots)
    if process.levels == "learned":
        _check_learned_levels(process, knots, guidance, sampler)
    if not len(seeds):
        raise ValueError("seeds is empty, expected one integer a sample")
    for seed in seeds:
        if not _is_seed(seed):
            beyond = ", which is beyond 64 bits:" if isinstance(seed, int) else ","
            raise ValueError(f"seeds has {seed!r}{beyond} expected integers within [-2^63, 2^63)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    condition = None if isinstance(condition, Mapping) and not condition else condition
    check_guidance(process, knots, condition, guidance, sampler)
    given = _condition(process, len(seeds), condition, guidance.reads_condition)
    return with_seeds(process, given, seeds)


def _check_learned_levels(
    process: Process, knots: tuple[Level, ...], guidance: Guidance, sampler: Sampler | None
) -> None:
    """Raise ValueError if a rule or a sampler needs one level for all elements of x."""
    if guidance.levels(process):
        raise ValueError(
            f"{guidance} changes at levels, and the levels of the process are learned, one for "
            "each element of x: use a rule for all levels, such as CFG"
        )
    if sampler is None:
        return
    if sampler.is_adaptive or not {*map(id, sampler.evaluation_levels(knots))} <= {*map(id, knots)}:
        raise ValueError(
            f"{sampler} evaluates the network between its knots, where the learned levels of the "
            "process are unknown to it: use a sampler of one evaluation for each step, such as "
            "DDIM, DDPM or AdamsMoulton"
        )


def _is_seed(seed: object) -> bool:
    """Whether a value is an integer of 64 bits, also one of numpy or of a tensor."""
    try:
        return -(2**63) <= operator.index(seed) < 2**63  # type: ignore[arg-type]  # else TypeError
    except TypeError:
        return False


def _condition(
    process: Process, count: int, condition: Condition, read: bool
) -> BatchCondition | None:
    """The condition of `count` samples, in the form that the process has."""
    if isinstance(condition, Conditions):
        if len(condition) != count or set(condition.values) != set(process.conditions):
            raise ValueError(
                f"condition has {len(condition)} samples and the names "
                f"{', '.join(condition.values)}, expected {count} and "
                f"{', '.join(process.conditions) or 'none'}"
            )
        return condition
    if isinstance(condition, Mapping):
        named = {name: value for name, value in condition.items() if name != LABEL}
        labels = condition.get(LABEL)
    else:
        named, labels = {}, condition
    checked = None if labels is None else _labels(process, count, labels, read)
    if named or process.conditions:
        return resolve(process, count, named, checked)
    return null_condition(process, count) if checked is None else checked


def _labels(process: Process, count: int, given: Sequence[int] | Tensor, read: bool) -> Tensor:
    labels = torch.as_tensor(given)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"condition holds {labels.dtype}, expected integers, the index of each sample's class"
        )
    if not process.classes and not read:
        raise ValueError("condition was given, but this network has no classes: leave it out")
    if labels.shape != (count,):
        raise ValueError(
            f"condition has shape {tuple(labels.shape)}, expected one label for each of {count} "
            "seeds"
        )
    if not process.classes:
        return labels  # of the classifier
    wrong = labels[(labels < 0) | (labels > process.classes)].tolist()
    if wrong:
        raise ValueError(
            f"labels {sorted(set(wrong))} are out of range, expected 0 .. {process.classes - 1} "
            f"({process.classes} is no condition)"
        )
    return labels


def _images(process: Process, first: Level, count: int, image: Tensor) -> Tensor:
    if image.shape not in (process.shape, (1, *process.shape), (count, *process.shape)):
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected {process.shape}, or one of these for "
            f"each of {count} seeds"
        )
    if process.estimate == "encoded_mean":
        raise ValueError(
            "the process has a learned encoder, so that α image + σ z is not x at its levels: "
            "leave image out, or use a network without an encoder"
        )
    if first.alpha == 0:
        raise ValueError(
            "the first knot is pure noise, which keeps nothing of the image: start at a finite "
            "level, Within(grid, low=λ)"
        )
    return image.expand(count, *process.shape)


def padded_chunks(count: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of the samples of each chunk, always `size` of them: the last chunk repeats the last
    index.

    Args:
        count: number of samples.
        size: number of samples in a chunk.

    Returns:
        An iterator over int64 tensors of shape (size,), each with its number of samples without
        repetitions.
    """
    for start in range(0, count, size):
        yield torch.arange(start, start + size).clamp(max=count - 1), min(size, count - start)
