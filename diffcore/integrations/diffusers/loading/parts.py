"""The parts of a saved pipeline: models, tokenizers and JSON files, read one by one.

Nothing in the folder is executed or unpickled: classes are those of the installed diffusers and
transformers, weights are safetensors.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from diffcore.integrations.diffusers.loading.part_files import (
    check_files,
    check_size,
    weight_variant,
)
from diffcore.io import plain_data

__all__ = [
    "check_part",
    "is_present",
    "read_json",
    "read_part",
    "read_text_pipeline",
    "text_pipeline_class",
]

DIFFUSERS_CLASSES = (diffusers.ModelMixin,)
TRANSFORMERS_CLASSES = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
TEXT_COMPONENTS = ("text_encoder", "tokenizer")


def is_present(index: dict[str, Any], name: str) -> bool:
    """Whether a pipeline's index names a part that is not null."""
    match index.get(name):
        case [_, str()]:
            return True
    return False


def text_pipeline_class(folder: str | Path, index: dict[str, Any]) -> Any:
    """The class of the pipeline that an index names, which encodes prompts.

    Args:
        folder: the pipeline's folder, for the error message.
        index: content of its model_index.json.

    Returns:
        The class of diffusers.

    Raises:
        ValueError: the index names no pipeline that encodes prompts.
    """
    name = index.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "encode_prompt"):
        raise ValueError(
            f"{Path(folder) / 'model_index.json'} names the pipeline {name}, expected one of "
            "diffusers that encodes prompts: encode them with another (diffcore.integrations."
            "diffusers.encode_prompts), and pass the Prompts"
        )
    return cls


def read_text_pipeline(folder: str | Path, index: dict[str, Any], parts: Mapping[str, Any]) -> Any:
    """Read the pipeline that an index names, with its text encoders and given parts alone.

    Args:
        folder: the pipeline's folder.
        index: content of its model_index.json.
        parts: network and VAE by name, and text encoders and tokenizers that are then not read.

    Returns:
        The pipeline of diffusers.

    Raises:
        ValueError: the index names no pipeline that encodes prompts.
    """
    folder, cls = Path(folder), text_pipeline_class(folder, index)
    parameters = inspect.signature(cls.__init__).parameters
    required = {
        p.name: None for p in parameters.values() if p.name != "self" and p.default is p.empty
    }
    options = {
        key: value for key, value in index.items() if key in parameters and isinstance(value, bool)
    }
    text = {
        key: read_part(folder, key, index)
        for key in parameters
        if key.startswith(TEXT_COMPONENTS) and is_present(index, key) and key not in parts
    }
    if "requires_safety_checker" in parameters:
        options["requires_safety_checker"] = False
    return cls(**required | options | text | dict(parts))


def read_part(
    folder: str | Path, name: str, index: dict[str, Any], weights: bool = True, **given: Any
) -> Any:
    """Read one part of a saved pipeline.

    Args:
        folder: the pipeline's folder.
        name: name of the part, such as "unet" or "tokenizer".
        index: content of its model_index.json.
        weights: whether to load the weights; without them a model of diffusers is built from its
            config alone.
        **given: further arguments of `from_pretrained`.

    Returns:
        The model or tokenizer.

    Raises:
        ValueError: its class is none of diffusers or transformers, or it has no safetensors.
    """
    folder = Path(folder)
    cls = _part_class(folder, name, index)
    if not weights:
        return _build_part(cls, folder / name)
    check_part(folder / name, cls)
    # transformers would keep the dtype of the file, and half precision is slow or missing on CPUs.
    is_text_model = issubclass(cls, transformers.PreTrainedModel)
    options: dict[str, Any] = {"dtype": torch.float32} if is_text_model else {}
    if issubclass(cls, nn.Module):
        options |= {"use_safetensors": True, "variant": weight_variant(folder / name)}
    if issubclass(cls, transformers.PreTrainedTokenizerBase):
        # Without any of its files transformers would silently build an empty tokenizer.
        files = list(cls.vocab_files_names.values())
        if not any((folder / name / file).is_file() for file in files):
            raise ValueError(
                f"{folder / name} holds no tokenizer, expected one of {', '.join(files)}"
            )
    try:
        return cls.from_pretrained(folder / name, local_files_only=True, **options | given)
    except OSError as error:
        raise ValueError(
            f"{folder / name} cannot be read ({' '.join(str(error).split())}): its config.json and "
            f"safetensors are needed; pickled weights are not opened, convert them first"
        ) from None


def check_part(folder: str | Path, cls: type) -> None:
    """Check the files of a part before it is loaded: what they name, and the sizes they declare.

    Args:
        folder: folder of the part.
        cls: class of the part.

    Raises:
        ValueError: they name code or files elsewhere, or the config describes a model that is
            larger than its weights.
    """
    folder = Path(folder)
    check_files(folder)
    if issubclass(cls, nn.Module) and (folder / "config.json").is_file():
        check_size(folder, lambda: _build_part(cls, folder))


def _build_part(cls: Any, folder: Path) -> Any:
    """A model of diffusers or transformers with newly initialised weights."""
    if issubclass(cls, transformers.PreTrainedModel):
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    return cls.from_config(read_json(folder / "config.json"))


def _part_class(folder: Path, name: str, index: dict[str, Any]) -> Any:
    library, class_name = index[name][:2]
    module, bases = {
        "diffusers": (diffusers, DIFFUSERS_CLASSES),
        "transformers": (transformers, TRANSFORMERS_CLASSES),
    }.get(library, (None, ()))
    cls = getattr(module, str(class_name), None)
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        raise ValueError(
            f"{folder / 'model_index.json'} names {library}.{class_name} as {name}, which is no "
            f"model of diffusers or transformers. Code that comes with weights is not executed: "
            f"load it yourself, and pass network and scheduler"
        )
    return cls


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of a pipeline's folder.

    Args:
        path: the file.

    Returns:
        The object in it.

    Raises:
        ValueError: the file is missing, or holds no JSON object.
    """
    path = Path(path)
    if path.parent.is_file():
        raise ValueError(
            f"{path.parent} is a file, expected the folder of a diffusers pipeline: convert it by "
            f"PIPELINE.from_single_file({str(path.parent)!r}).save_pretrained(FOLDER), where "
            "PIPELINE is a class of diffusers such as StableDiffusionPipeline"
        )
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: expected the folder of a diffusers pipeline, as save_pretrained "
            f"writes it"
        )
    return plain_data.read_json(path)
