"""The denoiser: any network with its process, asked about x at a level, answers with a Prediction(x0, eps)."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffcore.core.prediction import Prediction, predict, scale_input
from diffcore.core.process import Process
from diffcore.schedules import Level, Real


class Denoise(Protocol):
    """What samplers and guidance ask: a network's Denoiser, or an exact one of diffcore.core.oracle."""

    process: Process

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        """The x_0 and ε in x, of shape (B, *shape), given labels of shape (B,) or nothing."""
        ...


class Denoiser(nn.Module):
    """(x_0, ε) = predict(network(x, time, class_labels=condition), x, level).

    The network is any module whose forward takes x, one number a row for the level, and, if the process has classes, the
    keyword `class_labels`; it returns a tensor, a tuple that begins with it, or an object with it as `sample`, as
    diffusers' networks do. x and the prediction keep the dtype of x; the network gets its own.
    """

    def __init__(self, network: nn.Module, process: Process) -> None:
        super().__init__()
        _check_embeddings(network, process)
        self.network = network
        self.process = process

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def forward(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        process = self.process
        return predict(
            process.prediction, self.output(x, level, condition), x, level.to(x), process.sigma_data
        )

    def output(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The network's own F at x, in the dtype of x."""
        process = self.process
        scaled = scale_input(process.prediction, x, level.to(x), process.sigma_data)
        if condition is None:
            condition = null_condition(self.process, len(x), x.device)
        arguments = {} if condition is None else {"class_labels": condition}
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        answer = self.network(scaled.to(dtype), _rows(self.process.time(level), x), **arguments)
        output = tensor_of(answer)
        if output.shape != x.shape:
            raise ValueError(
                f"the network answers {tuple(output.shape)} to x of shape {tuple(x.shape)}: set its channels and size to the "
                f"process's shape {self.process.shape}"
            )
        return output.to(x.dtype)


def null_condition(
    process: Process, rows: int, device: torch.device | None = None
) -> Tensor | None:
    """The condition that means "no condition": the null label, or nothing if the process has no classes."""
    return torch.full((rows,), process.classes, device=device) if process.classes else None


def _rows(time: Real, x: Tensor) -> Tensor:
    """One number a row, (B,), in float32 or better (bf16 holds no index above 256); a map of levels stays a map."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(time, Tensor):
        return torch.full((len(x),), time, dtype=dtype, device=x.device)
    return (time.flatten() if time.numel() == len(x) else time).to(x.device, dtype)


def _check_embeddings(network: nn.Module, process: Process) -> None:
    """Diffusers' networks say how many labels they embed: the classes, and the null label."""
    embeddings = getattr(getattr(network, "config", None), "num_class_embeds", None)
    if process.classes and embeddings is not None and embeddings <= process.classes:
        raise ValueError(
            f"the network embeds {embeddings} labels (num_class_embeds), expected {process.classes + 1}: "
            f"{process.classes} classes and the null label"
        )


def tensor_of(answer: Any) -> Tensor:
    """A network's answer: a tensor, or one first in a tuple or as `sample`."""
    answer = answer[0] if isinstance(answer, tuple) else getattr(answer, "sample", answer)
    if not isinstance(answer, Tensor):
        raise TypeError(
            f"the network answers a {type(answer).__name__}, expected a tensor, or one first or as `sample`"
        )
    return answer
