"""The folder of a diffusers pipeline: network, scheduler config, VAE and text encoders.

Nothing in the folder is executed or unpickled: classes are those of the installed diffusers and
transformers, weights are safetensors.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
from torch import nn

from diffcore.core.network import class_name, network_config
from diffcore.core.process import Process
from diffcore.guidance import CFG
from diffcore.integrations.diffusers.families import GENERIC, family_of, family_of_class
from diffcore.integrations.diffusers.loading.parts import (
    is_present,
    read_json,
    read_part,
    read_text_pipeline,
)
from diffcore.integrations.diffusers.loading.vae import downsampling_factor
from diffcore.integrations.diffusers.scheduler.scheduler_config import DISTILLED
from diffcore.integrations.diffusers.scheduler.scheduler_grid import SchedulerGrid
from diffcore.io.files import check_links, verify_folder
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import TCD, Consistency, Sampler

__all__ = [
    "NETWORKS",
    "PipelineParts",
    "estimate_fields",
    "latent_shape",
    "network_name",
    "network_of",
    "parts_of",
    "read_folder",
    "sampling_defaults",
]

NETWORKS = ("unet", "transformer")
"""Names of a pipeline's component that is its network."""
CONSISTENCY: Mapping[str, Sampler] = {"LCMScheduler": Consistency(), "TCDScheduler": TCD()}
"""Scheduler of a consistency network -> the sampler that is its default. TCD() goes to (1-γ) t,
which TCDScheduler rounds to an entry of the table, and ends clean, TCDScheduler at the first entry.
"""


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a pipeline that a denoiser consists of.

    Args:
        network: the UNet or transformer.
        scheduler: the scheduler, or the content of its config.
        vae: the VAE of a latent diffusion pipeline.
        pipeline: function that returns the whole pipeline; its text encoders are read only then.
        process_fields: fields of the Process that the pipeline's own config holds (a
            DiffcorePipeline).
    """

    network: nn.Module
    scheduler: Any
    vae: nn.Module | None = None
    pipeline: Callable[[], Any] | None = None
    process_fields: dict[str, Any] = field(default_factory=dict)


def parts_of(pipeline: diffusers.DiffusionPipeline) -> PipelineParts:
    """The parts of a pipeline in memory.

    Args:
        pipeline: a pipeline with one network and a scheduler.

    Returns:
        Its components; nothing is copied.

    Raises:
        ValueError: it has no scheduler, or none or two networks.
    """
    components: dict[str, Any] = pipeline.components  # type: ignore[attr-defined]
    if components.get("scheduler") is None:
        raise ValueError(f"{type(pipeline).__name__} has no scheduler: set pipe.scheduler")
    return PipelineParts(
        network_of(pipeline),
        components["scheduler"],
        components.get("vae"),
        lambda: pipeline,
        _process_fields(type(pipeline).__name__, pipeline.config),  # type: ignore[attr-defined]
    )


def estimate_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The field `estimate` of the Process of a network by its scheduler, LCM or TCD.

    Args:
        config: config of the scheduler, with `_class_name`.

    Returns:
        The field by its name; empty for other schedulers.
    """
    return {"estimate": "consistency"} if config.get("_class_name") in CONSISTENCY else {}


def _process_fields(class_name: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the Process in the config of a pipeline; only a DiffcorePipeline has some."""
    if class_name != "DiffcorePipeline":
        return {}
    names = [f.name for f in fields(Process) if f.name in config]
    process = from_spec(Process, {name: config[name] for name in names})
    return {name: getattr(process, name) for name in names}


def network_of(pipeline: Any) -> nn.Module:
    """The network of a pipeline in memory, its UNet or transformer.

    Args:
        pipeline: a pipeline of diffusers.

    Returns:
        The component named "unet" or "transformer".

    Raises:
        ValueError: the pipeline has none or both.
    """
    networks = [part for name in NETWORKS if (part := pipeline.components.get(name)) is not None]
    if len(networks) != 1:
        raise ValueError(
            f"{type(pipeline).__name__} has {', '.join(pipeline.components)}, expected one of "
            f"{' or '.join(NETWORKS)}"
        )
    return networks[0]


def read_folder(
    folder: str | Path,
    network: nn.Module | None = None,
    text_parts: Mapping[str, Any] = MappingProxyType({}),
) -> PipelineParts:
    """Read the parts of a saved pipeline.

    Args:
        folder: folder that `save_pretrained` wrote.
        network: network that takes the place of the folder's, whose weights are then not read.
        text_parts: text encoders and tokenizers by name that take the place of the folder's.

    Returns:
        Network and VAE with their weights, and the scheduler's config.

    Raises:
        ValueError: a part is missing, is no class of diffusers, or has no safetensors; or a file
            differs from what a run or an export wrote.
    """
    folder = Path(folder)
    check_links(folder)
    verify_folder(folder)
    index = read_json(folder / "model_index.json")
    name = network_name(folder, index)
    vae = read_part(folder, "vae", index) if is_present(index, "vae") else None
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    network = read_part(folder, name, index) if network is None else network
    return PipelineParts(
        network,
        config,
        vae,
        lambda: read_text_pipeline(folder, index, {name: network, "vae": vae, **text_parts}),
        _process_fields(index.get("_class_name"), index),
    )


def network_name(folder: str | Path, index: dict[str, Any]) -> str:
    """Name of the network in a folder's index, "unet" or "transformer".

    Args:
        folder: the pipeline's folder, for the error message.
        index: content of its model_index.json.

    Returns:
        The name.

    Raises:
        ValueError: the index names none or both, or no scheduler.
    """
    names = [name for name in NETWORKS if is_present(index, name)]
    if len(names) != 1 or not is_present(index, "scheduler"):
        present = ", ".join(name for name in index if is_present(index, name)) or "nothing"
        raise ValueError(
            f"{folder} holds {present}, expected one of {' or '.join(NETWORKS)}, and a scheduler"
        )
    return names[0]


def latent_shape(parts: PipelineParts, height: int, width: int) -> tuple[int, ...]:
    """The shape of x for images of a size.

    Args:
        parts: the pipeline's parts.
        height: height of the images in pixels; 0: the network's own.
        width: width of the images in pixels; 0: the network's own.

    Returns:
        Shape (C, H, W): the latents' with a VAE, else the images'.

    Raises:
        ValueError: the network's config determines no shape, or the size is no multiple of the
            VAE's factor and the network's patch.
    """
    family = family_of(parts.network)
    default, patch = family.shape(parts.network), family.patch(parts.network) or 1
    if default is None or len(default) != 3:
        raise ValueError(
            f"the size of {class_name(parts.network)}'s images is not known: leave height and "
            f"width out"
        )
    factor = 1 if parts.vae is None else downsampling_factor(network_config(parts.vae))
    pixels = [
        given or size * factor for given, size in zip((height, width), default[1:], strict=True)
    ]
    if any(size % (factor * patch) or size < 0 for size in pixels):
        reason = "the factor of the VAE" + (f" times the network's patch, {patch}" * (patch > 1))
        raise ValueError(
            f"height and width are {pixels[0]} and {pixels[1]}, expected multiples of "
            f"{factor * patch}, {reason}"
        )
    return (default[0], *(size // factor for size in pixels))


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The options with which a saved pipeline is sampled by default.

    Args:
        folder: folder that `save_pretrained` wrote.

    Returns:
        Option -> spec. `guidance` is CFG at the default scale of the pipeline's call; `sampler` and
        `grid` are given by a DiffcoreScheduler; `sample_steps` by a DiffcorePipeline, which also
        has its own `guidance`. A pipeline with LCMScheduler or TCDScheduler is sampled in 4 steps
        without guidance.

    Raises:
        ValueError: the folder is no pipeline's.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    name = str(config.get("_class_name"))
    if name in CONSISTENCY:
        parts = {"sampler": CONSISTENCY[name], "grid": SchedulerGrid.of(config), "guidance": CFG()}
        return {option: to_spec(part) for option, part in parts.items()} | {"sample_steps": 4}
    if name in DISTILLED:
        raise ValueError(
            f"{folder} has a {name}, which samples a distilled network in a few steps by a rule of "
            "its own: sample the folder with its pipeline of diffusers"
        )
    family = family_of_class(str(index[network_name(folder, index)][1])) or GENERIC
    cls: Any = getattr(diffusers, str(index.get("_class_name")), None)
    parameters = inspect.signature(cls.__call__).parameters if callable(cls) else {}
    names = [*["true_cfg_scale"] * (family is GENERIC), family.guidance_argument]
    given = [parameters[name].default for name in names if name in parameters]
    scale = float(next((value for value in given if isinstance(value, int | float)), 1.0))
    defaults = {"guidance": to_spec(CFG(scale))} | {
        name: config[name] for name in ("sampler", "grid") if name in config
    }
    if _process_fields(index.get("_class_name"), index):
        defaults |= {"guidance": index["guidance"], "sample_steps": index["num_inference_steps"]}
    return defaults
