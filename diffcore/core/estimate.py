"""What the pair (x_0, ε) of a network is: a mean over the data, or a point of the flow."""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from diffcore.core.process import Process

__all__ = [
    "POINTS_OF_FLOW",
    "Estimate",
    "check_estimate_of_process",
    "refuse_point_of_flow",
    "require_posterior_mean",
]

Estimate = Literal["posterior_mean", "consistency", "mean_velocity", "encoded_mean"]
"""What the pair of a network is; see `Process.estimate`."""
POINTS_OF_FLOW = ("consistency", "mean_velocity")
"""Estimates of networks of few steps, whose pair is a point of the flow."""


def check_estimate_of_process(process: "Process") -> None:
    """Raise ValueError if the output of no network of a process gives its estimate.

    Args:
        process: process with any estimate.
    """
    if process.estimate == "encoded_mean":
        _check_encoded_mean(process)
    elif process.estimate != "posterior_mean":
        _check_point_of_flow(process)


def _check_encoded_mean(process: "Process") -> None:
    """Raise ValueError if a process has no derivative by λ, or another learned part."""
    schedule = process.schedule
    ends = schedule.logsnr(0.0), schedule.logsnr(1.0)
    if schedule.steps is not None or not all(map(math.isfinite, ends)):
        raise ValueError(
            f"estimate is encoded_mean and the schedule {schedule}, expected continuous levels "
            "between finite λ: use LogLinear, or Truncated"
        )
    if process.variance == "learned":
        raise ValueError(
            "estimate is encoded_mean and variance learned, and no objective trains both: set "
            "variance to fixed"
        )


def _check_point_of_flow(process: "Process") -> None:
    """Raise ValueError if the output of no network of a process gives a point of the flow."""
    if process.prediction == "sample":
        raise ValueError(
            f"estimate is {process.estimate} and prediction is sample, with which x_0 is not x at "
            "the clean level: use v_prediction, flow_prediction, edm or epsilon"
        )
    if process.variance == "learned":
        raise ValueError(
            f"estimate is {process.estimate}, a point of the flow, which has no variance: set "
            "variance to fixed"
        )
    if process.estimate == "mean_velocity" and not process.time.can_express_clean:
        raise ValueError(
            "estimate is mean_velocity, whose second level may be clean (λ = inf), which time "
            f"conditioning by {process.time.variable} cannot express: set a clamp, or condition "
            "on index, t, blend or sigma"
        )


def refuse_point_of_flow(process: "Process", name: str) -> None:
    """Raise ValueError if training by denoising would make a few-step network a denoiser.

    Args:
        process: process of the network.
        name: name of the objective, which trains a mean over the data.
    """
    if process.estimate in POINTS_OF_FLOW:
        raise ValueError(
            f"process.estimate is {process.estimate}, and {name} trains E[x_0 | x] at each level, "
            "with which a network of few steps would unlearn them: set an objective of such "
            "networks (Consistency, MeanFlow, RewardTuning; docs/few-step.md), or fine-tune the "
            "network that it was distilled from, and distil that"
        )


def require_posterior_mean(process: "Process", subject: str) -> None:
    """Raise ValueError if the pair of a network is not E[x_0 | x] and E[ε | x].

    Args:
        process: process of the network.
        subject: what needs the posterior mean; it begins the message.
    """
    if process.estimate == "encoded_mean":
        raise ValueError(
            f"{subject} needs E[x_0 | x] at each level, and the pair of this network is the mean "
            "of an ancestral step (estimate encoded_mean): sample without guidance with DDPM() or "
            "DDIM(eta=1.0), measure the variational bound (--method bound), or use a network that "
            "is trained by denoising"
        )
    if process.estimate != "posterior_mean":
        raise ValueError(
            f"{subject} needs E[x_0 | x] at each level, and the pair of this network is a "
            f"point of the flow (estimate {process.estimate}): use the network that it was "
            "distilled from, or one that is trained by denoising"
        )
