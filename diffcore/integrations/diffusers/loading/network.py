"""A diffusers network as a Denoiser: its process is read from the configs.

What the configs do not determine is an argument of `from_diffusers`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.core.network import class_name, network_config
from diffcore.core.process import Process
from diffcore.integrations.diffusers.families import ClassCondition, family_of
from diffcore.integrations.diffusers.loading.folder import (
    PipelineParts,
    estimate_fields,
    parts_of,
    read_folder,
)
from diffcore.integrations.diffusers.loading.prompts import PromptNetwork, Prompts
from diffcore.integrations.diffusers.loading.text_encoding import encode_prompts
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    describe_process,
    dynamic_shift,
    read_scheduler_config,
)

__all__ = ["MeanOutput", "from_diffusers", "mean_network", "read_process_fields"]

log = logging.getLogger(__name__)


def from_diffusers(
    source: str | Path | DiffusionPipeline | PipelineParts | nn.Module,
    scheduler: Any = None,
    mu: float | None = None,
    *,
    prompts: Sequence[str] | Prompts = (),
    negative: str = "",
    **fields: Any,
) -> Denoiser:
    """A network of diffusers with the process that its scheduler's and its own config describe.

    Networks of the families in `diffcore.integrations.diffusers.families.FAMILIES`, and any module
    that is called as network(x, timestep) or with `class_labels`. A text-conditioned network
    becomes a class-conditional one: label k is prompt k, the null label the negative prompt. The
    variance of a network of a table that also outputs one (2C channels: DiT, PixArt, Hunyuan-DiT)
    is a learned one, with which `DDPM()` samples.

    The configs give schedule, prediction type, time conditioning and shape, and the classes of
    DiT. Data are within [-1, 1] with a standard deviation of 0.5, as in every pipeline of
    diffusers; latents are unbounded with a standard deviation of 1, as a VAE's scaling factor
    makes them. The dropout of text-conditioned networks is taken to be 0.1, and 0 for Flux, which
    is distilled from a guided network: guidance is then an error unless `dropout` is given.

    Args:
        source: a pipeline's folder, a pipeline, its parts, or a network.
        scheduler: if `source` is a network: its scheduler, or the scheduler's config.
        mu: shift μ of a flow with `use_dynamic_shifting`; default: the μ that the pipeline computes
            from the number of tokens.
        prompts: texts that the pipeline encodes, or `Prompts` that are encoded already. Only for
            text-conditioned networks.
        negative: text of the null label, if `prompts` are texts.
        fields: fields of Process that replace those of the configs: `classes` and `dropout` of a
            class-conditional UNet2DModel, `shape` for another size or where the config has none,
            `sigma_data`, `low`, `high`, `variance` ("fixed" uses the mean only). A field that
            contradicts a config is logged as a warning.

    Returns:
        The denoiser; its `process` holds what was read.

    Raises:
        ValueError: the configs contradict each other or are incomplete; the message has the remedy.
    """
    parts = _parts(source, scheduler)
    known = parts.process_fields | fields
    described = read_process_fields(parts, known, mu)
    shape = (described | known)["shape"]
    network, condition = _conditioned(parts, prompts, negative, known, shape)
    read = described | condition | _variance_field(parts, described | known) | parts.process_fields
    for name in fields.keys() & read.keys() - {"shape"}:
        if fields[name] != read[name]:
            log.warning("%s is %s, in place of %s of the configs", name, fields[name], read[name])
    process = Process(**read | fields)
    return Denoiser(mean_network(network, process), process)


def _parts(source: Any, scheduler: Any) -> PipelineParts:
    if isinstance(source, nn.Module):
        return PipelineParts(source, scheduler)
    if scheduler is not None:
        raise ValueError(
            "scheduler was given beside a pipeline, which has its own: pass the pipeline's network "
            "and the scheduler"
        )
    if isinstance(source, DiffusionPipeline):
        return parts_of(source)
    return source if isinstance(source, PipelineParts) else read_folder(Path(source))


def read_process_fields(
    parts: PipelineParts, fields: dict[str, Any], mu: float | None
) -> dict[str, Any]:
    """The fields of a Process that the configs determine, without the condition's.

    Args:
        parts: network, scheduler and VAE.
        fields: fields that the caller gives, which the configs need not determine.
        mu: shift μ of a flow with `use_dynamic_shifting`; None: computed from the token count.

    Returns:
        Name -> value, such as `schedule`, `prediction`, `time` and `shape`.

    Raises:
        ValueError: the configs contradict each other or are incomplete.
    """
    read = {} if parts.vae is None else {"low": -torch.inf, "high": torch.inf, "sigma_data": 1.0}
    read |= _shape_field(parts.network, fields)
    if parts.scheduler is None:
        if missing := [name for name in ("schedule", "prediction", "time") if name not in fields]:
            raise ValueError(
                f"a network alone does not determine {', '.join(missing)}: pass its scheduler, or "
                f"these"
            )
        return read
    config = read_scheduler_config(parts.scheduler)
    if mu is None:
        mu = _dynamic_shift(config, parts.network, (read | fields)["shape"])
    described = describe_process(config, mu)
    read |= {name: value for name, value in described._asdict().items() if value is not None}
    family = family_of(parts.network)
    if family.prediction not in (None, described.prediction):
        raise ValueError(
            f"{class_name(parts.network)} predicts {family.prediction}, but the config of its "
            f"{config['_class_name']} has {described.prediction}: pass the scheduler that it was "
            f"trained with, such as FlowMatchEulerDiscreteScheduler"
        )
    factor = family.time_scale(parts.network)
    if described.time.variable == "index" and factor != 1 and "time" not in fields:
        # index i = T t - 1, so a multiple of it is no index of another table.
        raise ValueError(
            f"{class_name(parts.network)} takes {factor:g} times the timestep, which is only "
            f"possible for a flow, not for the table of {config['_class_name']}: pass time="
        )
    time = replace(described.time, scale=described.time.scale * factor)
    return read | {"time": time} | estimate_fields(config)


def _shape_field(network: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    shape = family_of(network).shape(network)
    if shape is None and "shape" not in fields:
        raise ValueError(
            "the network's config has no sample_size: pass shape, such as shape=(3, 32, 32)"
        )
    return {} if shape is None else {"shape": shape}


def _dynamic_shift(
    config: dict[str, Any], network: nn.Module, shape: tuple[int, ...]
) -> float | None:
    """The shift μ that a pipeline computes from the number of tokens, or None."""
    if not config.get("use_dynamic_shifting"):
        return None
    count = family_of(network).token_count(network, shape)
    return None if count is None else dynamic_shift(config, count)


def _conditioned(
    parts: PipelineParts,
    prompts: Sequence[str] | Prompts,
    negative: str,
    fields: dict[str, Any],
    shape: tuple[int, ...],
) -> tuple[nn.Module, dict[str, Any]]:
    """The network as a function of x, time and label, and the Process fields of its condition."""
    network = parts.network
    family = family_of(network)
    if not family.is_text_conditioned(network):
        if prompts or negative:
            raise ValueError(
                f"{class_name(network)} is not conditioned on text: leave prompts and negative out"
            )
        return network, _class_fields(network, fields)
    if not isinstance(prompts, Prompts):
        prompts = _encoded(parts, prompts, negative, shape)
    elif negative:
        raise ValueError(
            "negative was given beside Prompts, which contain a null condition: leave it out"
        )
    named = family.named_conditions(network_config(network))
    return PromptNetwork(family.wrap(network), prompts), {
        **({"conditions": named} if named else {}),
        "classes": len(prompts),
        "dropout": family.dropout if len(prompts) else 0.0,
    }


def _encoded(
    parts: PipelineParts, prompts: Sequence[str], negative: str, shape: tuple[int, ...]
) -> Prompts:
    if parts.pipeline is None:
        raise ValueError(
            f"{class_name(parts.network)} is conditioned on text, which a network alone cannot "
            f"encode: pass its pipeline, or prompts=encode_prompts(...) of "
            f"diffcore.integrations.diffusers"
        )
    pipeline = parts.pipeline()
    height, width = (size * pipeline.vae_scale_factor for size in shape[1:])
    return encode_prompts(pipeline, prompts, negative, (height, width))


def _class_fields(network: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    family = family_of(network)
    if not isinstance(family.condition, ClassCondition):
        return {}
    count = family.condition.class_count(network_config(network), fields)
    return {} if count is None else {"classes": count, "dropout": family.dropout}


def _variance_field(parts: PipelineParts, fields: dict[str, Any]) -> dict[str, Any]:
    """`variance: learned` for a network with 2C output channels of a process that has one.

    The second half of a flow's network (Lumina) was not trained, and variance_type "learned" is
    ln V itself.
    """
    config = {} if parts.scheduler is None else read_scheduler_config(parts.scheduler)
    has_variance = _has_variance(parts.network, fields["shape"])
    is_range = config.get("variance_type") != "learned"
    is_table = fields["prediction"] not in ("flow_prediction", "edm")
    return {"variance": "learned"} if has_variance and is_range and is_table else {}


class MeanOutput(nn.Module):
    """The first C of the 2C output channels of a network that also outputs a variance.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = network_config(network)

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        """The network's mean, of the shape of x.

        Args:
            x: noisy samples (B, C, ...).
            time: time input (B,).
            condition: the network's other arguments.
        """
        return extract_tensor(self.network(x, time, **condition))[:, : x.shape[1]]


def mean_network(network: nn.Module, process: Process) -> nn.Module:
    """The network without its variance output.

    Args:
        network: a network whose config has `out_channels`, or any other.
        process: the process; its shape gives C.

    Returns:
        `MeanOutput(network)` if the network has 2C output channels and the variance of the process
        is fixed, else the network itself.
    """
    is_dropped = process.variance == "fixed" and _has_variance(network, process.shape)
    return MeanOutput(network) if is_dropped else network


def _has_variance(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the config of a network has 2C output channels for C channels of x."""
    return network_config(network).get("out_channels") == 2 * shape[0]
