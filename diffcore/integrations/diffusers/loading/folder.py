"""A diffusers pipeline's folder, read by name: network, scheduler's config and VAE, and text encoders where text is encoded.

Nothing in the folder is run or unpickled: classes are those of the installed diffusers and transformers, weights are
safetensors.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

from diffcore.core.process import Process
from diffcore.guidance import CFG
from diffcore.integrations.diffusers.families import GENERIC, family_of, family_of_class
from diffcore.integrations.diffusers.loading.vae import factor_of
from diffcore.io.specs import from_spec, to_spec

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
        said: fields of the Process that the pipeline says itself, if it is a DiffcorePipeline.
    """

    network: nn.Module
    scheduler: Any
    vae: nn.Module | None = None
    pipeline: Callable[[], Any] | None = None
    said: dict[str, Any] = {}  # noqa: RUF012  # of a tuple, and not changed


def parts_of(pipeline: diffusers.DiffusionPipeline) -> Parts:
    """The parts of a pipeline in memory."""
    components: dict[str, Any] = pipeline.components  # type: ignore[attr-defined]
    if components.get("scheduler") is None:
        raise ValueError(f"{type(pipeline).__name__} has no scheduler: set pipe.scheduler")
    said = _said(type(pipeline).__name__, pipeline.config)  # type: ignore[attr-defined]
    return Parts(
        network_of(pipeline), components["scheduler"], components.get("vae"), lambda: pipeline, said
    )


def _said(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a pipeline of this class says of the process."""
    given = (
        [f.name for f in fields(Process) if f.name in config] if kind == "DiffcorePipeline" else []
    )
    own = from_spec(Process, {name: config[name] for name in given})
    return {name: getattr(own, name) for name in given}


def network_of(pipeline: Any) -> nn.Module:
    """The UNet or transformer of a pipeline in memory."""
    networks = [part for name in NETWORKS if (part := pipeline.components.get(name)) is not None]
    if len(networks) != 1:
        raise ValueError(
            f"{type(pipeline).__name__} has {', '.join(pipeline.components)}, expected one of {' or '.join(NETWORKS)}"
        )
    return networks[0]


def read_folder(folder: Path) -> Parts:
    """The parts of a saved pipeline.

    Raises:
        ValueError: a part is missing, is no class of diffusers, or has no safetensors.
    """
    index = read_json(folder / "model_index.json")
    name = network_in(folder, index)
    vae = read_part(folder, "vae", index) if is_present(index, "vae") else None
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    network = read_part(folder, name, index)
    said = _said(index.get("_class_name"), index)
    return Parts(
        network, config, vae, lambda: _pipeline(folder, index, {name: network, "vae": vae}), said
    )


def network_in(folder: Path, index: dict[str, Any]) -> str:
    """The name of the network that a folder's index names, unet or transformer.

    Raises:
        ValueError: it names none or two, or no scheduler.
    """
    named = [name for name in NETWORKS if is_present(index, name)]
    if len(named) != 1 or not is_present(index, "scheduler"):
        raise ValueError(
            f"{folder} holds {', '.join(k for k in index if is_present(index, k)) or 'nothing'}, expected one of "
            f"{' or '.join(NETWORKS)}, and a scheduler"
        )
    return named[0]


def sized(parts: Parts, height: int, width: int) -> tuple[int, ...]:
    """The shape of x for images of height and width in pixels; 0 is the network's own."""
    own = family_of(parts.network).shape(parts.network)
    if own is None or len(own) != 3:
        raise ValueError(
            f"the size of {type(parts.network).__name__}'s images is not known: leave height and width out"
        )
    factor = 1 if parts.vae is None else factor_of(parts.vae.config)
    pixels = [asked or size * factor for asked, size in zip((height, width), own[1:], strict=True)]
    if any(size % factor or size < 0 for size in pixels):
        raise ValueError(
            f"height and width are {pixels[0]} and {pixels[1]}, expected multiples of {factor}, as the VAE has it"
        )
    return (own[0], *(size // factor for size in pixels))


def defaults_of(folder: Path) -> dict[str, Any]:
    """How a pipeline is sampled unless told otherwise: its guidance_scale; of one of ours sampler, grid, steps and guidance."""
    index = read_json(folder / "model_index.json")
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    cls: Any = getattr(diffusers, str(index.get("_class_name")), None)
    taken = inspect.signature(cls.__call__).parameters if callable(cls) else {}
    family = family_of_class(str(index[network_in(folder, index)][1])) or GENERIC
    scale = taken[name].default if (name := family.guidance_argument) in taken else 1.0
    own = {"guidance": to_spec(CFG(float(scale)))} | {
        name: config[name] for name in ("sampler", "grid") if name in config
    }
    if _said(index.get("_class_name"), index):
        own |= {"guidance": index["guidance"], "sample_steps": index["num_inference_steps"]}
    return own


def is_present(index: dict[str, Any], name: str) -> bool:
    """Whether a pipeline's index names a part, and not its absence."""
    return isinstance(index.get(name), list) and index[name][1] is not None


def _pipeline(folder: Path, index: dict[str, Any], parts: dict[str, nn.Module | None]) -> Any:
    """The pipeline that index names, with what it needs to encode a prompt."""
    name = index.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "encode_prompt"):
        raise ValueError(
            f"{folder / 'model_index.json'} names the pipeline {name}, expected one of diffusers that encodes prompts: encode "
            f"them with another (diffcore.integrations.diffusers.encode), and pass the Prompts"
        )
    taken = inspect.signature(cls.__init__).parameters
    empty = {p.name: None for p in taken.values() if p.name != "self" and p.default is p.empty}
    options = {
        key: value for key, value in index.items() if key in taken and isinstance(value, bool)
    }
    text = {
        key: read_part(folder, key, index)
        for key in taken
        if key.startswith(TEXT) and is_present(index, key)
    }
    unchecked = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    return cls(**empty | options | text | parts | unchecked)


def read_part(folder: Path, name: str, index: dict[str, Any], weights: bool = True) -> Any:
    """A model or tokenizer that the index names; or a model of diffusers as its config describes it, without its weights.

    Raises:
        ValueError: it is of no class of diffusers or transformers, or has no safetensors.
    """
    library, kind = index[name][:2]
    module, bases = {
        "diffusers": (diffusers, MODELS),
        "transformers": (transformers, TEXT_MODELS),
    }.get(library, (None, ()))
    cls = getattr(module, str(kind), None)
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        raise ValueError(
            f"{folder / 'model_index.json'} names {library}.{kind} as {name}, which is no model of diffusers or transformers: "
            f"code that comes with weights is not run; load it yourself and pass network and scheduler"
        )
    if not weights:
        describe: Any = cls.from_config  # type: ignore[union-attr]
        return describe(read_json(folder / name / "config.json"))
    # A text encoder would keep the type of its file, and half precision is slow or not there on a processor.
    options: dict[str, Any] = (
        {"dtype": torch.float32} if issubclass(cls, transformers.PreTrainedModel) else {}
    )
    options |= {"use_safetensors": True} if issubclass(cls, nn.Module) else {}
    if issubclass(
        cls, transformers.PreTrainedTokenizerBase
    ):  # without any of its files it would be a new one
        files = list(cls.vocab_files_names.values())
        if not any((folder / name / file).is_file() for file in files):
            raise ValueError(
                f"{folder / name} holds no tokenizer, expected one of {', '.join(files)}"
            )
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
