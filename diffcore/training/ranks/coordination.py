"""How the ranks of a run agree, wait for each other, and end when one of them is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from diffcore.io.files import WriteError

__all__ = ["DelayedMaximum", "explain_lost_ranks", "gather_results", "run_on_first_rank"]

T = TypeVar("T")


class DelayedMaximum:
    """The largest of a small number over all ranks, one call later; it never waits for the device.

    Each call starts a reduction on the hosts and returns the result of the call before, so that all
    ranks act on the same value at the same step.

    Args:
        accelerator: accelerator of this rank.
        rank_timeout: number of seconds after which waiting for another rank is an error.
    """

    def __init__(self, accelerator: Accelerator, rank_timeout: int) -> None:
        timeout = timedelta(seconds=rank_timeout)
        self.is_single = accelerator.num_processes == 1
        self.group = None if self.is_single else dist.new_group(backend="gloo", timeout=timeout)
        self.value = torch.zeros((), dtype=torch.int64)
        self.pending: Any = None

    def update(self, value: int) -> int:
        """Add this rank's number. Every rank must call it equally often.

        Args:
            value: number of this rank, at least 0.

        Returns:
            The maximum of the call before; on a single rank `value` itself.
        """
        if self.is_single:
            return value
        before = self.finish()
        self.value = torch.tensor(value)
        self.pending = dist.all_reduce(
            self.value, dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return before

    def finish(self) -> int:
        """Wait for the reduction that the last call started.

        Returns:
            Its maximum; 0 if there is none.
        """
        if self.pending is not None:
            self.pending.wait()
        self.pending = None
        return int(self.value)


def run_on_first_rank(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Run an action on the first rank while the others wait, however long it takes.

    Args:
        accelerator: accelerator of this rank. Every rank must call this function.
        action: called on the first rank.

    Raises:
        ValueError: The action failed on the first rank, which raises its own error.
    """
    if accelerator.num_processes == 1:
        action()
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as caught:
            error = caught
    reason = [f"{type(error).__name__}: {error}" if error else ""]
    dist.broadcast_object_list(reason, group=group)
    if error:
        raise error
    if reason[0]:
        raise ValueError(f"the first rank failed: {reason[0]}")


def gather_results(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run an action that writes files on every rank, and gather what it returned.

    Args:
        action: called on every rank; its result is plain data.
        group: the ranks; None for a single one.

    Returns:
        The results of all ranks, on each of them.

    Raises:
        WriteError: The action failed on some rank. Every rank raises it, once all have ended.
    """
    result, number, reason = None, None, ""
    try:
        result = action()
    except OSError as error:
        number, reason = error.errno, str(error)
    found: list[Any] = [(result, number, reason)]
    if group is not None:
        found *= dist.get_world_size(group)
        dist.all_gather_object(found, (result, number, reason), group=group)
    for rank, (_, number, reason) in enumerate(found):
        if reason:
            raise WriteError(reason if group is None else f"rank {rank}: {reason}", number)
    return [result for result, _, _ in found]


@contextmanager
def explain_lost_ranks(accelerator: Accelerator, rank_timeout: int) -> Iterator[None]:
    """Context in which a lost connection to another rank is an error that names the cause.

    Args:
        accelerator: accelerator of this rank.
        rank_timeout: number of seconds after which waiting for another rank is an error.

    Yields:
        Nothing.

    Raises:
        ValueError: Another rank ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        # torch raises a RuntimeError without a class of its own for gloo.
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise ValueError(
            f"rank {accelerator.process_index} of {accelerator.num_processes} lost another rank, "
            f"which ended (see its message) or did not answer for {rank_timeout} s "
            "(rank_timeout): continue with --resume true"
        ) from error
