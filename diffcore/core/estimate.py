"""What the pair (x_0, ε) of a network is: a mean over the data, or a point of the flow."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from diffcore.core.process import Process

__all__ = ["Estimate", "check_point_of_flow", "require_posterior_mean"]

Estimate = Literal["posterior_mean", "consistency", "mean_velocity"]
"""What the pair of a network is; see `Process.estimate`."""


def check_point_of_flow(process: "Process") -> None:
    """Raise ValueError if the output of no network of a process gives a point of the flow.

    Args:
        process: process whose estimate is consistency or mean_velocity.
    """
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


def require_posterior_mean(process: "Process", subject: str) -> None:
    """Raise ValueError if the pair of a network is not E[x_0 | x] and E[ε | x].

    Args:
        process: process of the network.
        subject: what needs the posterior mean; it begins the message.
    """
    if process.estimate != "posterior_mean":
        raise ValueError(
            f"{subject} needs E[x_0 | x] at each level, and the pair of this network is a "
            f"point of the flow (estimate {process.estimate}): use the network that it was "
            "distilled from, or one that is trained by denoising"
        )
