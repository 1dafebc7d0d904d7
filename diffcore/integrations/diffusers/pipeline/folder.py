"""The folder of a pipeline, written with some of its parts replaced."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from diffcore.integrations.diffusers.adapters.files import Adapters, changes_of
from diffcore.integrations.diffusers.adapters.low_rank import merge_adapters
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.io.files import write_folder
from diffcore.io.plain_data import read_json

__all__ = ["merge_into_pipeline", "write_pipeline"]

NOT_COPIED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx*", "*.py")
"""Patterns of pickles and code, which are not copied."""


def write_pipeline(folder: str | Path, index: PipelineIndex, parts: Mapping[str, Any]) -> None:
    """Write a pipeline's folder with other parts, and copy the rest of its files.

    Args:
        folder: folder to write, which is empty.
        index: pipeline whose other parts are copied, without pickles and code.
        parts: models and scheduler of diffusers or transformers that replace parts, by their names.
    """
    folder, content = Path(folder), dict(index.content)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name in index.parts - {*parts}:
        shutil.copytree(
            index.folder / name, folder / name, ignore=shutil.ignore_patterns(*NOT_COPIED)
        )
    if "scheduler" in parts:
        cls = type(parts["scheduler"])
        library = "diffusers" if cls.__module__.startswith("diffusers.") else cls.__module__
        content["scheduler"] = [library, cls.__name__]
    text = json.dumps(content, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def merge_into_pipeline(
    folder: str | Path,
    index: PipelineIndex,
    changes: Sequence[tuple[Adapters, float]],
    scheduler: str | Path | None = None,
) -> None:
    """Write a pipeline whose weights contain adapters.

    Args:
        folder: folder to write, which must not exist.
        index: pipeline that the adapters belong to.
        changes: changes by part and layer, and the strength of each.
        scheduler: folder of the scheduler that the pipeline gets; None keeps its own.

    Raises:
        ValueError: the folder exists, or an adapter does not fit.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already: choose another folder, or remove it")
    parts: dict[str, Any] = {}
    for part in sorted({part for adapters, _ in changes for part in adapters}):
        parts[part] = index.read(part)
        merge_adapters(parts[part], changes_of(part, changes))
    if scheduler is not None:
        parts["scheduler"] = _read_scheduler(Path(scheduler))
    write_folder(folder, lambda path: write_pipeline(path, index, parts))


def _read_scheduler(folder: Path) -> Any:
    """The scheduler of a run's folder."""
    config = read_json(folder / "scheduler_config.json")
    name = str(config.get("_class_name"))
    cls = (
        DiffcoreScheduler if name == DiffcoreScheduler.__name__ else getattr(diffusers, name, None)
    )
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"{folder} holds a {name}, expected a scheduler of diffusers")
    build: Any = cls.from_config
    return build(config)
