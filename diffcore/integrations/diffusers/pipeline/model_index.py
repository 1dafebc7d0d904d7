"""What the model_index.json of a DiffcorePipeline holds beside the names of its parts, and what of a folder is refused."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers

from diffcore.core.process import Process
from diffcore.guidance import Guidance
from diffcore.integrations.diffusers.loading.folder import NETWORKS, read_json

PIPELINE = "DiffcorePipeline"
SCHEDULER = ["diffcore.integrations.diffusers.scheduler.scheduler", "DiffcoreScheduler"]
COMPONENTS = (*NETWORKS, "vae")


@dataclass(frozen=True)
class Facts:
    """What a pipeline's own config holds: what its scheduler's does not say.

    Args:
        shape: of one x_0, as the network sees it.
        low: lower end of the data's range.
        high: upper end of the data's range.
        classes: number of class labels, 0 for none.
        dropout: share of training samples without their label.
        guidance: unless a call names another.
        num_inference_steps: unless a call names another number.
    """

    shape: tuple[int, ...]
    low: float
    high: float
    classes: int
    dropout: float
    guidance: Guidance
    num_inference_steps: int

    @property
    def of_process(self) -> dict[str, Any]:
        """Those that are fields of a Process."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in Process.__dataclass_fields__
        }


def check_folder(folder: Path, given: dict[str, Any]) -> None:
    """Refuse the folder of a pipeline that is not whole, is not ours, or names code; a component that is `given` is not read.

    Raises:
        ValueError: what it lacks or holds; the message has the remedy.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if (kind := index.get("_class_name")) != PIPELINE:
        raise ValueError(
            f"{folder} holds a {kind}, expected a {PIPELINE}: load it as what it is, or its network by "
            f"diffcore.integrations.diffusers.from_diffusers({str(folder)!r})"
        )
    missing = [
        name
        for name in ("scheduler", *COMPONENTS, *(f.name for f in fields(Facts)))
        if name not in index
    ]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, and a guess would sample another model"
        )
    if "scheduler" not in given and index["scheduler"] != SCHEDULER:
        raise ValueError(
            f"{path} names {index['scheduler']} as scheduler, expected a DiffcoreScheduler: pass scheduler="
        )
    for name in COMPONENTS:
        if name not in given and index[name][1] is not None:
            _check_model(path, name, *index[name][:2])


def _check_model(path: Path, name: str, library: str, kind: str) -> None:
    cls = getattr(diffusers, str(kind), None) if library == "diffusers" else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{path} names {library}.{kind} as {name}, which is no model of diffusers: code that comes with weights is not "
            f"run; import it, load it yourself and pass {name}="
        )
