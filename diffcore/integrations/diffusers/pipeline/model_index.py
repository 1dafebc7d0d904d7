"""The settings in the model_index.json of a DiffcorePipeline, and the check of its folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers

from diffcore.core.estimate import Estimate
from diffcore.core.process import Process
from diffcore.guidance import Guidance
from diffcore.integrations.diffusers.loading.folder import NETWORKS
from diffcore.integrations.diffusers.loading.parts import check_part, read_json
from diffcore.io.files import check_links, verify_folder

__all__ = ["COMPONENTS", "PROCESS_SETTINGS", "PipelineSettings", "check_folder"]

PIPELINE = "DiffcorePipeline"
SCHEDULER = ["diffcore.integrations.diffusers.scheduler.scheduler", "DiffcoreScheduler"]
COMPONENTS = (*NETWORKS, "vae")


@dataclass(frozen=True)
class PipelineSettings:
    """The settings of a pipeline that its scheduler does not contain.

    Args:
        shape: shape of one x_0, the input of the network.
        low: lower bound of the data.
        high: upper bound of the data.
        classes: number of class labels; 0 for none.
        dropout: share of training samples without their label.
        guidance: default guidance rule of a call.
        num_inference_steps: default number of steps of a call.
        estimate: what the pair of the network is (`Process.estimate`).
    """

    shape: tuple[int, ...]
    low: float
    high: float
    classes: int
    dropout: float
    guidance: Guidance
    num_inference_steps: int
    estimate: Estimate = "posterior_mean"

    def process_settings(self) -> dict[str, Any]:
        """The settings that are fields of a Process.

        Returns:
            Name -> value.
        """
        return {name: getattr(self, name) for name in PROCESS_SETTINGS}


PROCESS_SETTINGS = tuple(
    f.name for f in fields(PipelineSettings) if f.name in Process.__dataclass_fields__
)
"""Names of the settings that are fields of a Process."""


def check_folder(folder: str | Path, given: dict[str, Any]) -> None:
    """Check that a folder holds a complete DiffcorePipeline, and that no code of it is executed.

    Args:
        folder: folder of the pipeline.
        given: components by name that the caller passes, which are not read from the folder.

    Raises:
        ValueError: A part is missing, of another class or not what was written; the message
            contains the remedy.
    """
    folder = Path(folder)
    check_links(folder)
    verify_folder(folder)
    path = folder / "model_index.json"
    index = read_json(path)
    if (name := index.get("_class_name")) != PIPELINE:
        raise ValueError(
            f"{folder} holds a {name}, expected a {PIPELINE}: load it as such, or its network by "
            f"diffcore.integrations.diffusers.from_diffusers({str(folder)!r})"
        )
    missing = [
        name
        for name in ("scheduler", *COMPONENTS, *(f.name for f in fields(PipelineSettings)))
        if name not in index
    ]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, and a guess would sample another model"
        )
    if "scheduler" not in given and index["scheduler"] != SCHEDULER:
        raise ValueError(
            f"{path} names {index['scheduler']} as scheduler, expected a DiffcoreScheduler: pass "
            "scheduler="
        )
    for name in COMPONENTS:
        if not (isinstance(index[name], list) and len(index[name]) > 1):
            raise ValueError(
                f"{path} has {index[name]!r} as {name}, expected [library, class] or [null, null]"
            )
        if name not in given and index[name][1] is not None:
            check_part(folder / name, _model_class(path, name, *index[name][:2]))


def _model_class(path: Path, component: str, library: str, name: str) -> type:
    cls = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{path} names {library}.{name} as {component}, which is no model of diffusers: code "
            f"that lies beside weights is not executed; import it, load it yourself and pass "
            f"{component}="
        )
    return cls
