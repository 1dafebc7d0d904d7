"""A diffusers pipeline's folder, read without its pipeline: network, scheduler's config and VAE, by name, from safetensors.

Nothing in the folder is run or unpickled: classes are those of the installed diffusers, weights are safetensors.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from torch import nn

NETWORKS = ("unet", "transformer")


class Parts(NamedTuple):
    """What of a pipeline makes a denoiser.

    Args:
        network: the UNet or transformer.
        scheduler: its scheduler, or the content of its config.
        vae: where it works on latents.
    """

    network: nn.Module
    scheduler: Any
    vae: nn.Module | None = None


def parts_of(pipeline: diffusers.DiffusionPipeline) -> Parts:
    """The parts of a pipeline in memory."""
    components: dict[str, Any] = pipeline.components  # type: ignore[attr-defined]
    networks = [components[name] for name in NETWORKS if components.get(name) is not None]
    if len(networks) != 1 or components.get("scheduler") is None:
        raise ValueError(
            f"{type(pipeline).__name__} has {', '.join(components)}, expected one of {' or '.join(NETWORKS)}, and a scheduler"
        )
    return Parts(networks[0], components["scheduler"], components.get("vae"))


def read_folder(folder: Path) -> Parts:
    """The parts of a saved pipeline.

    Raises:
        ValueError: a part is missing, is no class of diffusers, or has no safetensors.
    """
    index = _json(folder / "model_index.json")
    named = [name for name in NETWORKS if _present(index, name)]
    if len(named) != 1 or not _present(index, "scheduler"):
        raise ValueError(
            f"{folder} holds {', '.join(k for k in index if k[0] != '_') or 'nothing'}, expected one of "
            f"{' or '.join(NETWORKS)}, and a scheduler"
        )
    vae = _model(folder, "vae", index) if _present(index, "vae") else None
    config = _json(folder / "scheduler" / "scheduler_config.json")
    return Parts(_model(folder, named[0], index), config, vae)


def _present(index: dict[str, Any], name: str) -> bool:
    return bool(index.get(name)) and index[name][1] is not None


def _model(folder: Path, name: str, index: dict[str, Any]) -> nn.Module:
    library, kind = index[name][:2]
    cls = getattr(diffusers, str(kind), None) if library == "diffusers" else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{folder / 'model_index.json'} names {library}.{kind} as {name}, which is no model of diffusers: code that comes "
            f"with weights is not run; load it yourself and pass network and scheduler"
        )
    try:
        load: Any = cls.from_pretrained
        return load(folder / name, use_safetensors=True, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{folder / name} cannot be read ({' '.join(str(error).split())}): its config.json and safetensors are needed; "
            f"pickled weights are not opened, convert them first"
        ) from None


def _json(path: Path) -> dict[str, Any]:
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
