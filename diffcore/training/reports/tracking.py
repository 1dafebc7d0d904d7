"""Trackers of a run: TensorBoard, Weights & Biases and others, by accelerate."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from diffcore.io.files import CorruptFileError, write_file
from diffcore.io.plain_data import read_json
from diffcore.io.specs import to_spec

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffcore.training.trainer import Trainer

__all__ = ["Trackers", "Tracking"]

TENSORBOARD, WANDB = "tensorboard", "wandb"
IDENTITY_BYTES = 8


@dataclass(frozen=True)
class Tracking:
    """Names under which trackers show a run.

    Args:
        project: project of Weights & Biases and of other trackers that group runs.
        name: name of the run in Weights & Biases; "": the name of the run's folder.

    Raises:
        ValueError: The project is empty.
    """

    project: str = "diffcore"
    name: str = ""

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError('tracking.project is "", expected the name of a project')


class Trackers:
    """The trackers of a run. Only the first rank writes.

    Args:
        settings: settings of the run.
        accelerator: accelerator of this rank, made for the trackers of the settings.
    """

    def __init__(self, settings: "Trainer", accelerator: "Accelerator") -> None:
        self.settings, self.accelerator = settings, accelerator

    def start(self, step: int) -> None:
        """Start the trackers of the settings, if any. Every rank must call it.

        TensorBoard discards what an interrupted run wrote after the step; a run of Weights & Biases
        is continued, and keeps what it has.

        Args:
            step: number of steps taken.
        """
        settings, accelerator = self.settings, self.accelerator
        if not settings.trackers:
            return
        options = {"purge_step": step + 1} if step else {}
        folder = str(settings.run.folder)
        accelerator.log_with = [
            TensorBoardTracker(TENSORBOARD, folder, **options) if name == TENSORBOARD else name
            for name in settings.trackers
        ]
        wandb = self._wandb_options(step) if WANDB in settings.trackers else {}
        accelerator.init_trackers(settings.tracking.project, init_kwargs={WANDB: wandb})
        if accelerator.is_main_process:
            self._log_settings(step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers.

        Args:
            values: numbers by name; those that are not finite are left out.
            step: number of steps taken.
        """
        shown = {name: value for name, value in values.items() if np.isfinite(value)}
        for tracker in self._receivers(step):
            tracker.log(shown, step=step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Send an image to TensorBoard and Weights & Biases.

        Args:
            name: name of the image.
            image: the image, RGB.
            step: number of steps taken.
        """
        for tracker in self._receivers(step):
            if tracker.name == TENSORBOARD:
                tracker.log_images({name: np.asarray(image)[None]}, step, dataformats="NHWC")
            elif tracker.name == WANDB:
                tracker.log_images({name: [image]}, step)

    def _receivers(self, step: int) -> list[Any]:
        """The trackers that have nothing of a later step.

        Weights & Biases keeps the points of steps that a resumed run takes again. They are the
        same, and it would refuse each of them with a warning.
        """
        if not self.accelerator.is_main_process:
            return []
        return [
            tracker
            for tracker in self.accelerator.trackers
            if tracker.name != WANDB or step >= tracker.tracker.step
        ]

    def _wandb_options(self, step: int) -> dict[str, Any]:
        """Arguments of wandb.init: those of the run that is continued, or of a new one."""
        settings = self.settings
        if not self.accelerator.is_main_process:
            return {}
        project, path = settings.tracking.project, settings.run.wandb
        identity = _read_identity(path) if step and path.is_file() else {}
        if identity.get("project") != project:
            identity = {"id": secrets.token_hex(IDENTITY_BYTES), "project": project}
            write_file(path, json.dumps(identity).encode())
        name = settings.tracking.name or settings.run.folder.resolve().name
        return {"name": name, "id": identity["id"], "resume": "allow"}

    def _log_settings(self, step: int) -> None:
        """Send the settings of the run, as text to TensorBoard at its start."""
        values = self._settings()
        for tracker in self.accelerator.trackers:
            if tracker.name != TENSORBOARD:
                tracker.store_init_configuration(values)
            elif not step:
                text = yaml.safe_dump(values, sort_keys=False)
                tracker.tracker.add_text("settings", f"```\n{text}```", 0)

    def _settings(self) -> dict[str, Any]:
        """The settings as plain data: of config.yaml, or of a trainer built in Python."""
        if self.settings.config:
            values: dict[str, Any] = yaml.safe_load(self.settings.config)
            return values
        names = [field.name for field in fields(self.settings)]
        specs = {name: to_spec(getattr(self.settings, name)) for name in names}
        plain: dict[str, Any] = json.loads(json.dumps(specs, default=repr))
        return plain


def _read_identity(path: Any) -> dict[str, str]:
    """The record of a run of Weights & Biases."""
    identity = read_json(path)
    if not all(isinstance(identity.get(name), str) for name in ("id", "project")):
        raise CorruptFileError(
            f"{path} has no id and project of a run of Weights & Biases: delete it to begin another"
        )
    return identity
