"""How a run saves: in which format, and whether training waits for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from diffcore.training.checkpoints import checkpoint
from diffcore.training.checkpoints.checkpoint import Checkpoint
from diffcore.training.checkpoints.resume import checkpoint_of
from diffcore.training.checkpoints.sharded import Shard, flatten_parts, plan_shards, write_shards
from diffcore.training.state import TrainState

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """Writes the checkpoints of a run, in a thread beside the training if the settings say so.

    The thread receives copies on the host, so that it writes the bytes of the step at which it was
    started. Used as a context, it waits for the last checkpoint on exit. Every rank must call each
    method equally often.

    Args:
        state: state of the run.
    """

    def __init__(self, state: TrainState) -> None:
        settings = state.settings
        self.settings = settings.checkpoints
        is_shared = self.settings.format == "sharded" and state.accelerator.num_processes > 1
        timeout = timedelta(seconds=settings.rank_timeout)
        # A thread must not use the groups of the training.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if is_shared else None
        self.executor = ThreadPoolExecutor(1) if self.settings.asynchronous else None
        self.pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with suppress(Exception) if error else nullcontext():
            self.wait()
        if self.executor:
            self.executor.shutdown()

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of the present step, or start to.

        Args:
            state: state of the run.

        Raises:
            WriteError: This checkpoint cannot be written, or the one before could not.
        """
        self.wait()
        prepare = self._prepare_sharded if self.settings.format == "sharded" else self._prepare
        write = prepare(state, state.settings.run.checkpoints / checkpoint.name(state.step))
        is_first, keep = state.accelerator.is_main_process, state.settings.keep

        def write_and_prune() -> None:
            write()
            if is_first:
                checkpoint.prune(state.settings.run.checkpoints, keep)

        if self.executor:
            self.pending = self.executor.submit(write_and_prune)
        else:
            write_and_prune()

    def check(self) -> None:
        """Raise the error of a checkpoint that was written beside the training; do not wait.

        Raises:
            WriteError: It could not be written.
        """
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            WriteError: It could not be written.
        """
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def _prepare(self, state: TrainState, folder: Path) -> Callable[[], None]:
        """Gather the state on the first rank; the function that writes it there."""
        content = checkpoint_of(state, is_gathered=state.is_sharded or not self.executor)
        if not state.accelerator.is_main_process:
            return lambda: None
        if self.executor:
            tensors = {file: _copy_to_host(part) for file, part in content.tensors.items()}
            content = Checkpoint(tensors, content.state)
            _wait_for_copies(state.accelerator.device)
        return lambda: checkpoint.write(folder, content)

    def _prepare_sharded(self, state: TrainState, folder: Path) -> Callable[[], None]:
        """Plan which rank writes what; the function that writes the shards of this rank."""
        content = checkpoint_of(state, is_gathered=False)
        shards = plan_shards(flatten_parts(content.tensors), self.group)
        if self.executor:
            copies = _copy_to_host({name: shard.tensor for name, shard in shards.items()})
            shards = {name: Shard(copies[name], shard.offsets) for name, shard in shards.items()}
            _wait_for_copies(state.accelerator.device)
        return lambda: write_shards(folder, shards, content.state, self.group)


def _copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Start copies to the host, pinned for those of a CUDA device; `tensors` becomes empty."""
    return {name: _copy_one(tensors.pop(name)) for name in list(tensors)}


def _copy_one(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.detach().to("cpu", copy=True)
    copy = torch.empty_like(value, device="cpu", pin_memory=True)
    return copy.copy_(value.detach(), non_blocking=True)


def _wait_for_copies(device: torch.device) -> None:
    """The host does not know otherwise when pinned memory is written."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
