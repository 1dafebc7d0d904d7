"""A diffusers pipeline's folder, read by name: network, scheduler's config and VAE, and text encoders where text is encoded.

Nothing in the folder is run or unpickled: classes are those of the installed diffusers and transformers, weights are
safetensors.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

NETWORKS = ("unet", "transformer")
MODELS = (diffusers.ModelMixin,)
TEXT_MODELS = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
TEXT = ("text_encoder", "tokenizer")


class Parts(NamedTuple):
    """What of a pipeline makes a denoiser.

    Args:
        network: the UNet or transformer.
        scheduler: its scheduler, or the content of its config.
        vae: where it works on latents.
        pipeline: gives the pipeline, whose text encoders are read when it is called for.
    """

    network: nn.Module
    scheduler: Any
    vae: nn.Module | None = None
    pipeline: Callable[[], Any] | None = None


def parts_of(pipeline: diffusers.DiffusionPipeline) -> Parts:
    """The parts of a pipeline in memory."""
    components: dict[str, Any] = pipeline.components  # type: ignore[attr-defined]
    networks = [components[name] for name in NETWORKS if components.get(name) is not None]
    if len(networks) != 1 or components.get("scheduler") is None:
        raise ValueError(
            f"{type(pipeline).__name__} has {', '.join(components)}, expected one of {' or '.join(NETWORKS)}, and a scheduler"
        )
    return Parts(networks[0], components["scheduler"], components.get("vae"), lambda: pipeline)


def read_folder(folder: Path) -> Parts:
    """The parts of a saved pipeline.

    Raises:
        ValueError: a part is missing, is no class of diffusers, or has no safetensors.
    """
    index = read_json(folder / "model_index.json")
    named = [name for name in NETWORKS if _present(index, name)]
    if len(named) != 1 or not _present(index, "scheduler"):
        raise ValueError(
            f"{folder} holds {', '.join(k for k in index if k[0] != '_') or 'nothing'}, expected one of "
            f"{' or '.join(NETWORKS)}, and a scheduler"
        )
    vae = _part(folder, "vae", index) if _present(index, "vae") else None
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    network = _part(folder, named[0], index)
    return Parts(network, config, vae, lambda: _pipeline(folder, index, {named[0]: network, "vae": vae}))


def _present(index: dict[str, Any], name: str) -> bool:
    return isinstance(index.get(name), list) and index[name][1] is not None


def _pipeline(folder: Path, index: dict[str, Any], parts: dict[str, nn.Module | None]) -> Any:
    """The pipeline that index names, with what it needs to encode a prompt."""
    name = index.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "encode_prompt"):
        raise ValueError(
            f"{folder / 'model_index.json'} names the pipeline {name}, expected one of diffusers that encodes prompts: encode "
            f"them with another (diffcore.integrations.encode), and pass the Prompts"
        )
    taken = inspect.signature(cls.__init__).parameters
    empty = {p.name: None for p in taken.values() if p.name != "self" and p.default is p.empty}
    options = {key: value for key, value in index.items() if key in taken and isinstance(value, bool)}
    text = {key: _part(folder, key, index) for key in taken if key.startswith(TEXT) and _present(index, key)}
    unchecked = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    return cls(**empty | options | text | parts | unchecked)


def _part(folder: Path, name: str, index: dict[str, Any]) -> Any:
    library, kind = index[name][:2]
    module, bases = {"diffusers": (diffusers, MODELS), "transformers": (transformers, TEXT_MODELS)}.get(
        library, (None, ())
    )
    cls = getattr(module, str(kind), None)
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        raise ValueError(
            f"{folder / 'model_index.json'} names {library}.{kind} as {name}, which is no model of diffusers or transformers: "
            f"code that comes with weights is not run; load it yourself and pass network and scheduler"
        )
    # A text encoder would keep the type of its file, and half precision is slow or not there on a processor.
    options: dict[str, Any] = {"dtype": torch.float32} if issubclass(cls, transformers.PreTrainedModel) else {}
    options |= {"use_safetensors": True} if issubclass(cls, nn.Module) else {}
    try:
        load: Any = cls.from_pretrained
        return load(folder / name, local_files_only=True, **options)
    except OSError as error:
        raise ValueError(
            f"{folder / name} cannot be read ({' '.join(str(error).split())}): its config.json and safetensors are needed; "
            f"pickled weights are not opened, convert them first"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a pipeline's folder."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: expected the folder of a diffusers pipeline, as save_pretrained leaves it"
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected an object")
    return data
