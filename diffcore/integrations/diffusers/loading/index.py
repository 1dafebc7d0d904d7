"""The index of a pipeline's folder, by which single parts are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffcore.integrations.diffusers.families import ModelFamily, TextCondition, family_of
from diffcore.integrations.diffusers.loading.folder import PipelineParts, latent_shape, network_name
from diffcore.integrations.diffusers.loading.network import read_process_fields
from diffcore.integrations.diffusers.loading.parts import (
    is_present,
    read_json,
    read_part,
    read_text_pipeline,
    text_pipeline_class,
)
from diffcore.integrations.diffusers.loading.vae import downsampling_factor
from diffcore.integrations.diffusers.scheduler.scheduler_config import Config
from diffcore.io.files import check_links, hash_file
from diffcore.io.network_size import build_without_memory

__all__ = ["PipelineIndex"]


@dataclass(frozen=True)
class PipelineIndex:
    """The model_index.json of a pipeline's folder.

    Args:
        folder: folder that `save_pretrained` wrote; a string becomes a Path.

    Raises:
        ValueError: the folder holds no pipeline with one network and a scheduler.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        check_links(self.folder)
        self.network_name  # refuses a folder that holds no pipeline

    @cached_property
    def content(self) -> dict[str, Any]:
        """The JSON object in the file."""
        return read_json(self.folder / "model_index.json")

    def check_pretrained(self) -> None:
        """Raise ValueError if this is the pipeline of a run, whose scheduler diffusers lacks."""
        if self.content.get("_class_name") == "DiffcorePipeline":
            raise ValueError(
                f"{self.folder} is a DiffcorePipeline, as a run writes it: start from the weights "
                "of this run with its own settings and --init, the folder of the run"
            )

    def check_encodes_text(self) -> None:
        """Raise ValueError if this is no pipeline of diffusers that encodes prompts."""
        text_pipeline_class(self.folder, self.content)

    @property
    def parts(self) -> set[str]:
        """Names of all parts."""
        return {name for name in self.content if is_present(self.content, name)}

    @property
    def network_name(self) -> str:
        """Name of the network, "unet" or "transformer"."""
        return network_name(self.folder, self.content)

    @property
    def text_encoders(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return sorted(name for name in self.parts if name.startswith("text_encoder"))

    def weights_hash(self, *names: str) -> str:
        """Hashes of the files of the weights of parts.

        Args:
            *names: names of the parts.

        Returns:
            The hashes, part after part, in the order of the names of their files.
        """
        files = [file for n in names for file in sorted((self.folder / n).glob("*.safetensors"))]
        return " ".join(map(hash_file, files))

    @property
    def pipeline_class(self) -> Any:
        """The pipeline's class in diffusers.

        Raises:
            ValueError: diffusers has no pipeline of this name.
        """
        name = str(self.content.get("_class_name"))
        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            raise ValueError(f"{self.folder} holds a {name}, expected a pipeline of diffusers")
        return cls

    @property
    def scheduler(self) -> Config:
        """The scheduler's config."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    def read(self, name: str, **options: Any) -> Any:
        """Read a part with its weights.

        Args:
            name: name of the part.
            **options: arguments of `from_pretrained`, such as `torch_dtype`.

        Returns:
            The model or tokenizer.

        Raises:
            ValueError: there is no such part, or it cannot be read.
        """
        self._check(name)
        return read_part(self.folder, name, self.content, **options)

    def read_text_pipeline(self, device: torch.device | None = None) -> Any:
        """Read the pipeline with its text encoders; its network and its VAE have no weights.

        Args:
            device: device of the text encoders; None: the CPU.

        Returns:
            A pipeline of the class that the index names, to encode prompts.
        """
        names = {self.network_name, *(self.parts & {"vae"})}
        parts = dict.fromkeys(("vae",)) | {name: self.read_architecture(name) for name in names}
        pipeline = read_text_pipeline(self.folder, self.content, parts)
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device or "cpu")
        return pipeline

    def config(self, name: str) -> Config:
        """The config of a part.

        Args:
            name: name of the part.

        Returns:
            The object in its config.json.
        """
        self._check(name)
        return read_json(self.folder / name / "config.json")

    def read_architecture(self, name: str) -> nn.Module:
        """A model of diffusers without weights, on the meta device.

        Args:
            name: name of the part.

        Returns:
            The module that its config describes: the same one in every call, not to be changed.
        """
        self._check(name)
        if name not in self._architectures:
            self._architectures[name] = build_without_memory(
                lambda: read_part(self.folder, name, self.content, weights=False)
            )
        return self._architectures[name]

    @cached_property
    def _architectures(self) -> dict[str, nn.Module]:
        """The modules that `read_architecture` has built, by name."""
        return {}

    def paths(self, *prefixes: str) -> list[Path]:
        """Folders of the parts whose name begins with one of the prefixes.

        Args:
            prefixes: beginnings of names, such as "text_encoder".

        Returns:
            The folders, sorted; at least one for each prefix.

        Raises:
            ValueError: no part's name begins with a prefix.
        """
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in self.parts):
                raise self._missing(prefix)
        return [self.folder / name for name in sorted(self.parts) if name.startswith(prefixes)]

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images of the network's default size.

        Raises:
            ValueError: the config determines none, or they differ.
        """
        network = self.read_architecture(self.network_name)
        shape = family_of(network).shape(network)
        if shape is None or shape[1] != shape[2]:
            raise ValueError(
                f"the config of the network in {self.folder} has no square sample_size: give the "
                f"size in pixels"
            )
        return shape[1] * downsampling_factor(self.config("vae"))

    @cached_property
    def family(self) -> ModelFamily:
        """The record of the network's family."""
        return family_of(self.read_architecture(self.network_name))

    @cached_property
    def size_arguments(self) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """Function (sizes (B, 6)) -> the network's arguments that contain them, or None.

        See `TextCondition.size_arguments`. None: the network receives no sizes.
        """
        condition = self.family.condition
        if not isinstance(condition, TextCondition):
            return None
        network = self.read_architecture(self.network_name)
        function = partial(condition.size_arguments, network)
        return function if function(torch.ones(1, 6)) else None

    @property
    def process_fields(self) -> dict[str, Any]:
        """The fields of a Process that the configs determine, without those of the condition."""
        return self.process_fields_of()

    def process_fields_of(
        self, size: int = 0, shape: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The fields of a Process for images of a size, on which a flow's shift may depend.

        Args:
            size: height and width of the images in pixels; 0: the network's own.
            shape: shape (C, H, W) of x_0, which takes precedence over the size.

        Returns:
            Name -> value, without the fields of the condition.

        Raises:
            ValueError: the configs contradict each other, or the network cannot have the size.
        """
        vae = self.read_architecture("vae") if "vae" in self.parts else None
        network = self.read_architecture(self.network_name)
        parts = PipelineParts(network, self.scheduler, vae)
        if size and shape is None:
            shape = latent_shape(parts, size, size)
        given = {} if shape is None else {"shape": tuple(shape)}
        return read_process_fields(parts, given, None) | given

    def _check(self, name: str) -> None:
        if name not in self.parts:
            raise self._missing(name)

    def _missing(self, name: str) -> ValueError:
        return ValueError(
            f"{self.folder} has no {name}, only {', '.join(sorted(self.parts))}: name a pipeline "
            f"that has one"
        )
