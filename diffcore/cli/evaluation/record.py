"""Where the results of an evaluation are written, and the facts that every record holds."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffcore import __version__
from diffcore.cli.evaluation.data import is_run
from diffcore.cli.image_model import is_pipeline
from diffcore.io.files import hash_file, write_file
from diffcore.run import AVERAGED, Run

__all__ = ["default_out", "environment_facts", "has_data", "weights_facts", "write_record"]


def has_data(folder: Path) -> bool:
    """Whether a folder is that of a run, which names its data, and not that of a pipeline."""
    return is_run(folder) and not is_pipeline(folder)


def default_out(folder: Path, name: str = "evaluation") -> Path:
    """The folder of results: in that of a run; beside a pipeline or images, which it must not
    change.

    Args:
        folder: folder of the run, of the pipeline or of images.
        name: name of the folder of results.

    Returns:
        The folder, which need not exist.
    """
    if has_data(folder):
        return folder / name
    folder = folder.resolve()  # "." and ".." have no name
    return folder.with_name(f"{folder.name}-{name}")


def weights_facts(folder: Path, weights: str) -> dict[str, str]:
    """Which weights of a run were evaluated, by the hash that its report compares.

    Args:
        folder: folder of the model.
        weights: name of the weights, see `Run.read_weights`.

    Returns:
        Plain data; empty for a pipeline.
    """
    if not has_data(folder):
        return {}
    is_average = weights == AVERAGED and Run(folder).weights.is_file()
    hashed = {"weights": hash_file(Run(folder).weights)} if is_average else {}
    return {"selected_weights": weights, **hashed}


def environment_facts() -> dict[str, Any]:
    """The number of threads and the versions, on which the last digits of a result depend.

    Returns:
        Plain data.
    """
    return {
        "threads": torch.get_num_threads(),
        "versions": {
            "diffcore": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON.

    Args:
        path: file to write; its folder is created.
        record: plain data.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(record, indent=1).encode())
