"""Sharded checkpoints: every rank writes and reads the shards that it holds.

    checkpoints/step-00000400/model.rank-00000.safetensors
                              ema.rank-00000.safetensors
                              training.rank-00000.safetensors
                              model.rank-00001.safetensors
                              ...
                              manifest.json

The planner of torch.distributed.checkpoint (DCP) decides which rank writes which shard, and its
HuggingFaceStorageReader reads them into any other sharding. Its HuggingFaceStorageWriter would
write the same format, but three entries of metadata in no fixed order: equal states would not give
equal bytes. The default format of DCP is not used, because its metadata is a pickle.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from diffcore.io.manifest import SHARDED
from diffcore.training.checkpoints.checkpoint import (
    replace_checkpoint,
    write_entry,
    write_manifest,
)
from diffcore.training.ranks.coordination import gather_results

__all__ = ["Shard", "flatten_parts", "plan_shards", "write_shards"]

OFFSETS = "DCP_SHARDING_INFO"
"""Entry of a file's metadata in which DCP finds the offsets of its shards."""


class Shard(NamedTuple):
    """A block of a tensor, which one rank writes.

    Args:
        tensor: the block.
        offsets: index of its first entry in the whole tensor.
    """

    tensor: Tensor
    offsets: tuple[int, ...]


def flatten_parts(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts of a checkpoint under the names that a sharded one gives them.

    Args:
        parts: tensors by name, for the file name of each part, such as ema.safetensors.

    Returns:
        The tensors by "part/name".
    """
    return {
        f"{Path(file).stem}/{name}": value
        for file, tensors in parts.items()
        for name, value in tensors.items()
    }


def plan_shards(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Shard]:
    """The shards that this rank writes. Every rank must call it.

    A block that several ranks hold is written by the first of them.

    Args:
        tensors: tensors by "part/name", sharded or equal on all ranks.
        group: the ranks; None for a single one.

    Returns:
        Shards by the name of their tensor; they share its memory.
    """
    rank = 0 if group is None else dist.get_rank(group)
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    if group is None:
        (plan,), _ = planner.create_global_plan([plan])
    else:
        plan = _exchange_plans(planner, plan, group)
    return {
        item.index.fqn: Shard(
            cast("Tensor", planner.resolve_data(item)), tuple(item.tensor_data.chunk.offsets)
        )
        for item in planner.finish_plan(plan).items
        if item.tensor_data is not None
    }


def _exchange_plans(planner: SavePlanner, plan: SavePlan, group: dist.ProcessGroup) -> SavePlan:
    """The plan of this rank that agrees with those of the others."""
    first, is_first = dist.get_global_rank(group, 0), dist.get_rank(group) == 0
    plans: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(plan, plans, dst=first, group=group)
    if plans is not None:
        plans, _ = planner.create_global_plan(plans)
    own: list[Any] = [None]
    dist.scatter_object_list(own, plans, src=first, group=group)
    return cast("SavePlan", own[0])


def write_shards(
    folder: str | Path,
    shards: Mapping[str, Shard],
    state: Mapping[str, Any],
    group: dist.ProcessGroup | None,
) -> None:
    """Write a sharded checkpoint atomically, as `checkpoint.write`. Every rank must call it.

    Args:
        folder: folder to write, on a disk that all ranks share.
        shards: result of `plan_shards` on this rank; the tensors of a part are written together.
        state: plain data beside them, of the first rank.
        group: the ranks; None for a single one.

    Raises:
        WriteError: A rank cannot write; the older checkpoints are kept.
    """

    def write_on_first(temporary: Path) -> None:
        files = _write_on_rank(temporary, shards, group)
        write_manifest(temporary, {"format": SHARDED, "state": state, "files": files})

    if group is None or dist.get_rank(group) == 0:
        replace_checkpoint(folder, write_on_first)
    else:
        _write_on_rank(None, shards, group)


def _write_on_rank(
    temporary: Path | None, shards: Mapping[str, Shard], group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Write the files of this rank; the manifest's entries of all files."""

    def make_folder() -> str:
        if temporary is not None:
            temporary.mkdir(parents=True)
        return str(temporary)

    rank = 0 if group is None else dist.get_rank(group)
    folder = Path(gather_results(make_folder, group)[0])
    entries = gather_results(partial(_write_files, folder, shards, rank), group)
    return {name: entry for files in entries for name, entry in files.items()}


def _write_files(folder: Path, shards: Mapping[str, Shard], rank: int) -> dict[str, Any]:
    by_part: dict[str, dict[str, Shard]] = {}
    for name, shard in shards.items():
        by_part.setdefault(name.partition("/")[0], {})[name] = shard
    files = {}
    for part, own in by_part.items():
        name = f"{part}.rank-{rank:05d}.safetensors"
        files[name] = write_entry(folder / name, _serialize(own))
    return files


def _serialize(shards: Mapping[str, Shard]) -> bytes:
    offsets = {name: {"saved_offsets": shard.offsets} for name, shard in sorted(shards.items())}
    tensors = {name: shard.tensor.detach().contiguous() for name, shard in shards.items()}
    return save(tensors, {OFFSETS: json.dumps(offsets)})
