"""What a pipeline says of a training that starts from it: the settings that its file leaves open."""

from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from diffcore import schedules
from diffcore.io.specs import to_spec

READERS = {"network": "Pretrained", "data": "Encoded"}
"""The components that read a pipeline."""


def filled(argv: list[str]) -> list[str]:
    """The arguments with the settings of their file, the first of them, completed by the pipeline that either names.

    Raises:
        ValueError: the file starts from a pipeline, and none is named.
    """
    words = dict(pairwise(argv)) | dict(word.split("=", 1) for word in argv if "=" in word)
    if {"-h", "--help"} & set(argv) or not Path(words.get("--config", "")).is_file():
        return argv
    settings = yaml.safe_load(Path(words["--config"]).read_text()) or {}
    folder = words.get("--pipeline", settings.get("pipeline"))
    if not folder:
        if any(
            _named(settings.get(part)) == kind and not _own(settings[part])
            for part, kind in READERS.items()
        ):
            raise ValueError(
                "this training starts from a pipeline: name the folder of one of diffusers, --pipeline FOLDER"
            )
        return argv
    if "--pipeline" in words and (
        other := {_own(settings.get(part)) for part in READERS} - {"", folder, str(Path(folder))}
    ):
        raise ValueError(
            f"pipeline is {folder}, but {words['--config']} reads {other.pop()}: leave --pipeline out, or begin with the recipe"
        )
    at = 2 if argv[0] == "--config" else 1
    return [
        "--config",
        yaml.safe_dump(completed(settings, str(folder)), allow_unicode=True),
        *argv[at:],
    ]


def completed(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Settings of a training with what a pipeline says of its process, and the pipeline where it is read.

    A schedule around another (ZeroTerminalSNR, Shifted) that names none is around the pipeline's.
    """
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

    own = {
        name: to_spec(value) for name, value in PipelineIndex(Path(folder)).process_fields.items()
    }
    process = own | _options(settings.get("process"), "process")
    process["schedule"] = _around(process["schedule"], own["schedule"])
    parts = {
        part: _reading(settings[part], folder)
        for part, kind in READERS.items()
        if _named(settings.get(part)) == kind
    }
    return settings | parts | {"pipeline": folder, "process": process}


def _reading(component: Any, folder: str) -> dict[str, Any]:
    component = {"class_path": component} if isinstance(component, str) else component
    return component | {
        "init_args": {"pipeline": folder} | _options(component.get("init_args"), "init_args")
    }


def _own(component: Any) -> str:
    """The pipeline that a component says itself it reads."""
    options = component.get("init_args") if isinstance(component, dict) else None
    return str(options.get("pipeline") or "") if isinstance(options, dict) else ""


def _options(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name} is {value!r}, expected a table of settings")
    return value or {}


def _around(schedule: Any, own: dict[str, Any]) -> dict[str, Any]:
    if isinstance(schedule, str):
        schedule = {"class_path": schedule}
    kind = getattr(schedules, _named(schedule), None)
    if kind is None or "inner" not in signature(kind).parameters:
        return schedule
    inner = own["init_args"]["inner"] if _named(own) == kind.__name__ == "ZeroTerminalSNR" else own
    return schedule | {
        "init_args": {"inner": inner} | _options(schedule.get("init_args"), "init_args")
    }


def _named(component: Any) -> str:
    """The class's own name."""
    path = component.get("class_path", "") if isinstance(component, dict) else component
    return str(path).rpartition(".")[2]
