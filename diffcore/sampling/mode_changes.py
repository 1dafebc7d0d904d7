"""Levels at which guidance changes its mode: they become knots, at which samplers forget."""

from collections.abc import Sequence

from diffcore.samplers import Sampler, State
from diffcore.schedules import Level

__all__ = ["find_mode_changes", "forget_at_mode_change", "insert_levels"]

SAME_LEVEL = 1e-9
"""Tolerance in λ: a level nearer than this to a knot is the knot."""


def insert_levels(knots: tuple[Level, ...], logsnrs: Sequence[float]) -> tuple[Level, ...]:
    """The knots with further levels inserted between them.

    Args:
        knots: strictly monotone levels.
        logsnrs: λ of the levels to insert; those at a knot, outside of the range, or cleaner than
            the levels of training are left out.

    Returns:
        Strictly monotone levels in the direction of `knots`.
    """
    found = {float(knot.logsnr): knot for knot in knots}
    for logsnr in logsnrs:
        level = knots[0].schedule.at(logsnr)
        if (
            min(found) < logsnr < max(found)
            and not level.is_beyond_training
            and all(abs(known - logsnr) > SAME_LEVEL for known in found)
        ):
            found[logsnr] = level
    return tuple(
        found[logsnr] for logsnr in sorted(found, reverse=bool(knots[0].logsnr > knots[-1].logsnr))
    )


def find_mode_changes(knots: tuple[Level, ...], logsnrs: Sequence[float]) -> frozenset[float]:
    """λ of the knots at which guidance changes its mode.

    Args:
        knots: levels between which the sampler steps.
        logsnrs: λ at which the rule changes its mode (`Guidance.levels`).

    Returns:
        λ of the knots that are at one of `logsnrs`.
    """
    return frozenset(
        float(knot.logsnr)
        for knot in knots
        for logsnr in logsnrs
        if abs(float(knot.logsnr) - logsnr) <= SAME_LEVEL
    )


def forget_at_mode_change(sampler: Sampler, state: State, mode_changes: frozenset[float]) -> State:
    """The state, without its memory if it starts a step at a change of the guidance mode.

    Args:
        sampler: sampler whose memory it is.
        state: state after a step. Within a step (Heun evaluates the end of a step) it is unchanged.
        mode_changes: λ as `find_mode_changes` returns them.

    Returns:
        The state from which the loop continues.
    """
    if (
        not mode_changes
        or state.done
        or state.level is state.remaining[0]
        or float(state.level.logsnr) not in mode_changes
    ):
        return state
    return sampler.forget(state)
