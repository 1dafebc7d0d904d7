"""Denoisers: functions from x at a noise level to a prediction (x_0, ε).

`Denoiser` combines a network with its process.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffcore.core.conditions import BatchCondition, as_conditions, condition_arguments
from diffcore.core.encoding.encoded_mean import check_mean_encoder, decode_prediction
from diffcore.core.network import evaluation_dtype, find_learned_levels, network_config
from diffcore.core.prediction import Prediction, hypot, predict, scale_input
from diffcore.core.process import Process
from diffcore.schedules import Level, Real

__all__ = [
    "Denoiser",
    "DenoiserProtocol",
    "DenoiserWrapper",
    "LevelMatchedDenoiser",
    "extract_tensor",
]


class DenoiserProtocol(Protocol):
    """The interface of a denoiser, which samplers and guidance rules evaluate.

    `Denoiser` and the exact denoisers of `diffcore.core.oracle` implement it. A class that derives
    from it inherits the defaults of `device` and `network`.
    """

    process: Process
    """The diffusion process that the denoiser belongs to."""

    @property
    def device(self) -> torch.device:
        """The device on which x and the condition are expected; the host by default."""
        return torch.device("cpu")

    @property
    def network(self) -> nn.Module | None:
        """The network, or None for a denoiser without one, such as a closed formula."""
        return None

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        """E[x_0 | x] and E[ε | x], both of the shape and dtype of x.

        Args:
            x: noisy samples (B, *shape).
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for no condition.
        """
        ...


class DenoiserWrapper(DenoiserProtocol):
    """A denoiser around an inner one, with its process, device and network.

    Args:
        inner: denoiser that a subclass evaluates in `__call__`.
    """

    def __init__(self, inner: DenoiserProtocol) -> None:
        self.inner, self.process = inner, inner.process

    @property
    def device(self) -> torch.device:
        """The device of the inner denoiser."""
        return self.inner.device

    @property
    def network(self) -> nn.Module | None:
        """The network of the inner denoiser, or None."""
        return self.inner.network


class LevelMatchedDenoiser(DenoiserWrapper):
    """A denoiser that accepts x and levels of another schedule.

    Levels are matched in λ, and x is multiplied by the ratio of √(α² + σ²). Two of them around the
    same denoiser are equal, so that their evaluations can share a call.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LevelMatchedDenoiser) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash(self.inner)

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        if self.process.schedule == level.schedule:
            return self.inner(x, level, condition)
        matched = self.process.schedule.at(level.logsnr)
        ratio = hypot(matched.alpha, matched.sigma) / hypot(level.alpha, level.sigma)
        ratio = ratio.to(x) if isinstance(ratio, Tensor) else ratio
        return self.inner(ratio * x, matched, condition)


class Denoiser(nn.Module):
    """The denoiser defined by a network and its diffusion process.

        (x_0, ε) = predict(network(x, time, class_labels=condition), x, level)

    The network is any module whose forward takes x (B, *shape), the time conditioning (B,) of the
    noise level, and, if the process has classes, the keyword `class_labels` (B,). A named condition
    of the process is a further keyword (`condition_arguments`). If the process estimates the mean
    velocity, the keyword `end_time` (B,) is the time conditioning of `Level.end`. The network
    returns a tensor of the shape of x, a tuple that begins with it, or an object with it as
    attribute `sample`, as the networks of diffusers do. It is evaluated in the dtype of its
    parameters (`evaluation_dtype`), and the prediction has the dtype of x.

    If the variance of the process is learned, the network has 2C output channels for C channels of
    x: F, and 2v - 1 of the prediction's variance v.

    Args:
        network: the network, on any device.
        process: the diffusion process that the network was trained on.

    Raises:
        ValueError: a diffusers network embeds fewer labels than the classes and the null label, or
            labels that the process does not have (set its `num_class_embeds` to classes + 1), or
            it cannot halve the height and width of x as often as its levels require, or it has as
            many output channels as x and the variance of the process is learned, or it contains
            learned levels and the process has shared ones, or the reverse, or it contains an
            encoder of x_0 and the process has none, or the reverse.

    Example:
        >>> process = Process(shape=(1, 8, 8), prediction="sample")
        >>> class Zero(nn.Module):
        ...     def forward(self, x, time):
        ...         return torch.zeros_like(x)
        >>> denoiser = Denoiser(Zero(), process)
        >>> denoiser(torch.ones(2, 1, 8, 8), process.schedule.level(0.5)).x0.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, network: nn.Module, process: Process) -> None:
        super().__init__()
        _check_embeddings(network, process)
        _check_size(network, process)
        _check_channels(network, process)
        _check_learned_levels(network, process)
        check_mean_encoder(network, process)
        self.network = network
        self.process = process

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters, or the host if it has none."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def forward(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        """The prediction (x_0, ε), both of the shape and dtype of x.

        Args:
            x: noisy samples (B, *shape).
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for the absent value of each.
        """
        output, variance = self.outputs(x, level, condition)
        process, level = self.process, level.to(x)
        prediction = predict(process.prediction, output, x, level, process.sigma_data)
        if process.estimate == "encoded_mean":
            return decode_prediction(self.network, prediction, level)
        return prediction if variance is None else replace(prediction, variance=variance)

    def output(self, x: Tensor, level: Level, condition: BatchCondition | None = None) -> Tensor:
        """The network's output F at x, of the shape and dtype of x.

        Args:
            x: noisy samples (B, *shape), not scaled.
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for the absent value of each.

        Raises:
            ValueError: as `outputs`.
        """
        return self.outputs(x, level, condition)[0]

    def outputs(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output F at x, and v if the variance of the process is learned.

        Args:
            x: noisy samples (B, *shape), not scaled.
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for the absent value of each.

        Returns:
            F, of the shape and dtype of x; and v, of the same shape, or None if the variance is
            fixed.

        Raises:
            ValueError: the output has another shape than x, or the network has no embedding of the
                null label. Set the network's channels and size, or its number of embeddings. Or the
                levels of the elements are learned, and the level is not a map of them.
        """
        return self._split(self.raw_output(x, level, condition), x)

    def raw_output(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Tensor:
        """The output of the network at x, of whatever shape and dtype it has.

        Args:
            x: noisy samples (B, *shape), not scaled.
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,), or `Conditions` of a process with named conditions;
                None for the absent value of each.

        Returns:
            The tensor in the output (`extract_tensor`).

        Raises:
            ValueError: the network has no embedding of the null label.
        """
        process, network = self.process, self.network
        if process.levels == "learned":
            _check_map(level, x)
        scaled = scale_input(process.prediction, x, level.to(x), process.sigma_data)
        condition = as_conditions(process, condition, x.shape[0], x.device)
        scaled = scaled.to(evaluation_dtype(network, x.dtype))
        arguments = condition_arguments(process, condition, scaled.dtype)
        time = _time_tensor(process.time(level), x)
        if process.estimate == "mean_velocity":
            arguments["end_time"] = _time_tensor(process.time(level.end or level), x)
        try:
            return extract_tensor(network(scaled, time, **arguments))
        except IndexError as error:
            if not process.classes:
                raise
            raise ValueError(
                f"the network fails for x of shape {tuple(x.shape)} and labels from 0 to "
                f"{process.classes} (IndexError: {error}). It needs {process.classes + 1} label "
                f"embeddings: {process.classes} classes and the null label {process.classes}"
            ) from error

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """F and v, in the dtype of x, from the network's output."""
        is_learned = self.process.variance == "learned"
        if output.shape != (_doubled(x.shape) if is_learned else x.shape):
            raise ValueError(_wrong_shape(output.shape, x.shape, self.process))
        if not is_learned:  # the comparison is quicker than `to`
            return output if output.dtype == x.dtype else output.to(x.dtype), None
        mean, variance = output.to(x.dtype).chunk(2, 1)
        return mean, (variance + 1) / 2


def _time_tensor(time: Real, x: Tensor) -> Tensor:
    """The time conditioning (B,), or of the shape of a map of levels.

    The dtype is at least float32, since bfloat16 represents integers exactly only up to 256. A map
    that broadcasts over the batch stays a map, whatever its number of elements.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(time, Tensor):
        return torch.full((x.shape[0],), time, dtype=dtype, device=x.device)
    is_per_sample = time.ndim == x.ndim and len(time) == time.numel() == len(x)
    return (time.flatten() if is_per_sample else time).to(x.device, dtype)


def _check_embeddings(network: nn.Module, process: Process) -> None:
    """Raise ValueError if a diffusers network does not embed the classes and the null label."""
    config, classes = network_config(network), process.classes
    embeddings = config.get("num_class_embeds")
    if embeddings is not None and (embeddings <= classes or not classes):
        raise ValueError(
            f"the network embeds {embeddings} labels, and the process has {classes} classes, which "
            f"need {classes + 1 if classes else 0}: the classes and the null label. Set the "
            f"process's classes to at most {embeddings - 1}, or the network's number of labels "
            f"(num_class_embeds) to classes + 1"
        )
    has_table = embeddings is not None or config.get("class_embed_type") is not None
    if classes and _is_unet(config) and not has_table:
        raise ValueError(
            f"the process has {classes} classes, and the network embeds no labels: set its "
            f"num_class_embeds to {classes + 1}, the classes and the null label; or the process's "
            f"classes to 0"
        )


def _check_size(network: nn.Module, process: Process) -> None:
    """Raise ValueError if a UNet2DModel cannot halve the height and width of x at each level."""
    config = network_config(network)
    if not _is_unet(config) or len(process.shape) != 3:
        return
    halvings = len(config.get("down_block_types") or (None,)) - 1
    if any(size % 2**halvings for size in process.shape[1:]):
        raise ValueError(
            f"the shape of x is {process.shape}, and the network halves height and width "
            f"{halvings} times: expected multiples of {2**halvings}; crop or resize the data, or "
            f"use fewer levels (down_block_types)"
        )


def _check_channels(network: nn.Module, process: Process) -> None:
    """Raise ValueError if a network has no output channels for the variance that is learned."""
    outputs, channels = network_config(network).get("out_channels"), process.shape[0]
    if process.variance == "learned" and outputs == channels:
        raise ValueError(
            f"the variance of the process is learned, which needs {2 * channels} output channels, "
            f"and the network has {outputs}: set its out_channels to {2 * channels}, or the "
            f"process's variance to fixed"
        )


def _check_learned_levels(network: nn.Module, process: Process) -> None:
    """Raise ValueError if a network contains no learned levels and should, or the reverse."""
    is_found = find_learned_levels(network) is not None
    if is_found != (process.levels == "learned"):
        raise ValueError(
            f"the levels of the process are {process.levels}, and the network contains "
            f"{'learned' if is_found else 'no learned'} levels: set process.levels to learned with "
            "a LearnedLevelsNetwork, and to shared with any other network"
        )


def _check_map(level: Level, x: Tensor) -> None:
    """Raise ValueError if a level is not one of each element."""
    logsnr = level.logsnr
    if not isinstance(logsnr, Tensor) or logsnr.shape[1:] != x.shape[1:]:
        raise ValueError(
            "the levels of the process are learned, one for each element of x, and the network is "
            "evaluated at one level for all: use sample() or diffcore sample with a sampler such "
            "as DDIM, and variational_bound() or diffcore likelihood --method bound, which compute "
            "the levels; other functions need a process with shared levels"
        )


def _doubled(shape: torch.Size) -> torch.Size:
    """The shape with twice as many channels."""
    return torch.Size((shape[0], 2 * shape[1], *shape[2:]))


def _wrong_shape(found: torch.Size, x: torch.Size, process: Process) -> str:
    """The message for an output of another shape than F, or F and the variance."""
    double = _doubled(x)
    if process.variance == "learned":
        return (
            f"the network's output has shape {tuple(found)}, expected {tuple(double)}, since the "
            f"variance of the process is learned: set its output channels to twice those of the "
            f"process's shape {process.shape}, or the process's variance to fixed"
        )
    hint = ""
    if found == double:
        hint = ", or the process's variance to learned if half of the channels are a variance"
    return (
        f"the network's output has shape {tuple(found)}, expected that of x, {tuple(x)}: set its "
        f"channels and size to the process's shape {process.shape}{hint}"
    )


def _is_unet(config: Mapping[str, Any]) -> bool:
    """Whether a network's config is that of a UNet2DModel of diffusers, which takes no text."""
    return "num_class_embeds" in config and "cross_attention_dim" not in config


def extract_tensor(output: Any) -> Tensor:
    """The tensor in a network's output: the output itself, its first item, or its `sample`.

    Returns:
        The network's output F, of the shape of its input.

    Raises:
        TypeError: the output contains no such tensor. Return one of these three forms.
    """
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network's output is a {type(output).__name__}, expected a tensor, a tuple that "
            f"begins with one, or an object with one as attribute `sample`"
        )
    return output
