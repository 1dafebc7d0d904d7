"""Checks of a network before the first step of a run."""

import torch
from torch import nn

from diffcore.core.conditions import condition_arguments, null_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.encoding.encoded_mean import find_mean_encoder
from diffcore.core.network import LabelWrapper, find_learned_levels
from diffcore.core.process import Process

__all__ = ["check_dtype", "check_network", "check_trained"]

TWO_TIMES = "; a network of one time receives the second one inside of diffcore.networks.TwoTimes"
"""Remedy for a network without the argument end_time."""


def check_dtype(network: nn.Module) -> None:
    """Refuse trained weights in which small updates are lost by rounding.

    Args:
        network: network before the first step.

    Raises:
        ValueError: a trained weight has fewer than 32 bits.
    """
    for name, value in network.named_parameters():
        if value.requires_grad and value.dtype.itemsize < 4:
            raise ValueError(
                f"the weights {name} of the network are {value.dtype}, in which small updates are "
                "lost: train float32 weights (network.float()), and set precision: bf16 to "
                "evaluate the network in bfloat16"
            )


def check_trained(network: nn.Module, name: str) -> None:
    """Refuse a network of which nothing can be trained.

    Args:
        network: network before the first step.
        name: what it is, for the message.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    if not any(value.requires_grad for value in network.parameters()):
        raise ValueError(
            f"{name} has no parameters that require a gradient, and an optimizer nothing to "
            "train: name a network class that has some, or leave them unfrozen"
        )


@torch.no_grad()
def check_network(network: nn.Module, label_wrapper: LabelWrapper, process: Process) -> None:
    """Evaluate the network once, so that one that does not fit the process fails before the run.

    Args:
        network: network on the CPU; it is in training mode afterwards.
        label_wrapper: wraps it so that it accepts the labels of the data.
        process: process of the run.

    Raises:
        ValueError: the network cannot be evaluated on data and conditions of the process.
    """
    x, level = torch.zeros(2, *process.shape), process.schedule.level(0.5)
    denoiser = Denoiser(label_wrapper(network.eval()), process)
    try:
        if learned := find_learned_levels(network):
            (level,) = learned.knots((level,), learned.sample_latent(torch.arange(2)))
        denoiser.output(x, level)
        if encoder := find_mean_encoder(network):
            encoder.target(x, level.to(x))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the network cannot be evaluated for x of shape {tuple(x.shape)}, and takes (x, time"
            f"{', class_labels=' if process.classes else ''}{_named(process)}): set its "
            f"channels and size to the process's shape {process.shape}, or its forward"
            f"{TWO_TIMES if process.estimate == 'mean_velocity' else ''} "
            f"({type(error).__name__}: {error})"
        ) from error
    network.train()


def _named(process: Process) -> str:
    """The keyword arguments of the named conditions, for messages."""
    null = null_condition(process, 1)
    names = condition_arguments(process, null, torch.float32).keys() - {"class_labels"}
    end = ["end_time"] if process.estimate == "mean_velocity" else []
    return "".join(f", {name}=" for name in [*sorted(names), *end])
