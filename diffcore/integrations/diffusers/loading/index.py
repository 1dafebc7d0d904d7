"""What a pipeline's folder says it holds, each part read when it is asked for: training takes some of them, and only once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.loading.folder import (
    Parts,
    is_present,
    network_in,
    read_folder,
    read_json,
    read_part,
)
from diffcore.integrations.diffusers.loading.network import process_fields
from diffcore.integrations.diffusers.loading.vae import factor_of
from diffcore.integrations.diffusers.scheduler.scheduler_config import Config


@dataclass(frozen=True)
class Index:
    """The model_index.json of a folder.

    Args:
        folder: as save_pretrained leaves it.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.network  # refuses what is no pipeline's folder

    @cached_property
    def content(self) -> dict[str, Any]:
        """The file's."""
        return read_json(self.folder / "model_index.json")

    @property
    def parts(self) -> set[str]:
        """Names of all parts."""
        return {name for name in self.content if is_present(self.content, name)}

    @property
    def network(self) -> str:
        """Name of the network, unet or transformer."""
        return network_in(self.folder, self.content)

    @property
    def pipeline(self) -> Any:
        """The class of diffusers that the folder is of."""
        name = str(self.content.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ValueError(f"{self.folder} is of a {name}, expected a pipeline of diffusers")
        return kind

    @property
    def scheduler(self) -> Config:
        """Its config."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    def read(self, name: str) -> Any:
        """A part with its weights."""
        self._check(name)
        return read_part(self.folder, name, self.content)

    def encoding(self) -> Any:
        """The pipeline, with what it takes to encode prompts."""
        pipeline = read_folder(self.folder).pipeline
        assert pipeline is not None
        return pipeline()

    def config(self, name: str) -> Config:
        """Of a part."""
        self._check(name)
        return read_json(self.folder / name / "config.json")

    def bare(self, name: str) -> nn.Module:
        """A model of diffusers as its config describes it, without weights."""
        self._check(name)
        with torch.device("meta"):
            return read_part(self.folder, name, self.content, weights=False)

    def paths(self, *starts: str) -> list[Path]:
        """The folders of the parts whose name begins so, at least one for each beginning.

        Raises:
            ValueError: there is none.
        """
        for start in starts:
            if not any(name.startswith(start) for name in self.parts):
                raise self._missing(start)
        return [self.folder / name for name in sorted(self.parts) if name.startswith(starts)]

    @property
    def size(self) -> int:
        """Height and width in pixels that the network was made for."""
        network = self.bare(self.network)
        shape = family_of(network).shape(network)
        if shape is None or shape[1] != shape[2]:
            raise ValueError(
                f"the network of {self.folder} does not say what size it was made for: give the size in pixels"
            )
        return shape[1] * factor_of(self.config("vae"))

    @property
    def process(self) -> dict[str, Any]:
        """The fields of a Process that the configs say; what a network is told beside its level is the data's to say."""
        vae = self.bare("vae") if "vae" in self.parts else None
        return process_fields(Parts(self.bare(self.network), self.scheduler, vae), {}, None)

    def _check(self, name: str) -> None:
        if name not in self.parts:
            raise self._missing(name)

    def _missing(self, name: str) -> ValueError:
        return ValueError(
            f"{self.folder} has no {name}, only {', '.join(sorted(self.parts))}: name a pipeline that has one"
        )
