"""Whether the elements of x share one noise level, or each has its own, which is learned."""

from typing import TYPE_CHECKING, Literal, get_args

from diffcore.schedules import LogLinear

if TYPE_CHECKING:
    from diffcore.core.process import Process

__all__ = ["LevelType", "check_level_type"]

LevelType = Literal["shared", "learned"]
"""Levels of the elements of x; see `Process.levels`."""


def check_level_type(process: "Process") -> None:
    """Raise ValueError if the levels of a process are unknown, or learned where they cannot be.

    Args:
        process: process with its other fields.
    """
    if process.levels not in get_args(LevelType):
        raise ValueError(f"levels is {process.levels!r}, expected shared or learned")
    if process.levels == "shared":
        return
    if not isinstance(process.schedule, LogLinear):
        raise ValueError(
            f"levels are learned on {process.schedule}, expected a LogLinear schedule, between "
            "whose ends the levels are learned"
        )
    if (process.variance, process.estimate) != ("fixed", "posterior_mean"):
        raise ValueError(
            f"levels are learned, and variance is {process.variance} and estimate "
            f"{process.estimate}: expected fixed and posterior_mean, or shared levels"
        )
