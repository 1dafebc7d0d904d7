"""A diffusers network as a Denoiser: its process is read from the configs, and what they do not say is asked for."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser, tensor_of
from diffcore.core.process import Process
from diffcore.integrations.diffusers.families import ClassCondition, family_of, network_config
from diffcore.integrations.diffusers.loading.folder import Parts, parts_of, read_folder
from diffcore.integrations.diffusers.loading.prompts import Prompted, Prompts
from diffcore.integrations.diffusers.loading.text_encoding import encode
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    config_of as config_of,
)
from diffcore.integrations.diffusers.scheduler.scheduler_config import describe, shift_of

log = logging.getLogger(__name__)


def from_diffusers(
    source: str | Path | DiffusionPipeline | Parts | nn.Module,
    scheduler: Any = None,
    mu: float | None = None,
    *,
    prompts: Sequence[str] | Prompts = (),
    negative: str = "",
    **fields: Any,
) -> Denoiser:
    """A network of diffusers with the process that its scheduler and its own config describe.

    Unconditional and class-conditional networks (UNet2DModel, DiTTransformer2DModel, or any module that is asked as they are),
    and networks that are told text (of StableDiffusion 1, 2, XL and 3, Flux, PixArt and Sana): label k is prompt k, and the
    null label the negative prompt. One that outputs a variance beside the mean (2C channels) is taken at its mean.

    From the configs: schedule, prediction, time, shape, and of DiT classes and dropout. Data are within [-1, 1], as every
    pipeline of diffusers has it, with a standard deviation of 0.5; latents are unbounded, with one of 1, which is what a VAE's
    scaling factor is for. Networks that are told text were trained with the empty prompt for a tenth of the samples or more;
    Flux's were distilled from a guided one, so that guidance is refused unless dropout is given.

    Args:
        source: a pipeline's folder, a pipeline, its parts, or a network.
        scheduler: of a network alone: its scheduler, or the scheduler's config.
        mu: the shift's μ of a flow with use_dynamic_shifting; of a transformer by default what its pipeline computes from the
            size.
        prompts: what a network that is told text may be asked for, to be encoded by its pipeline; or Prompts, encoded before.
        negative: the text of the null label, where prompts are to be encoded.
        fields: of Process, in place of what the configs say: `classes` and `dropout` of a class-conditional UNet2DModel,
            `shape` for another size or where the config has none, `sigma_data`, `low`, `high`. To contradict a config is
            logged.

    Raises:
        ValueError: the configs contradict themselves or do not say enough; the message has the remedy.
    """
    parts = _parts(source, scheduler)
    read = process_fields(parts, parts.said | fields, mu) | parts.said
    network, told = _told(parts, prompts, negative, parts.said | fields, (read | fields)["shape"])
    read = read | told | parts.said
    for name in fields.keys() & read.keys() - {"shape"}:
        if fields[name] != read[name]:
            log.warning("%s is %s, in place of %s of the configs", name, fields[name], read[name])
    process = Process(**read | fields)
    return Denoiser(mean_of(network, process), process)


def _parts(source: Any, scheduler: Any) -> Parts:
    if isinstance(source, nn.Module):
        return Parts(source, scheduler)
    if scheduler is not None:
        raise ValueError(
            "scheduler was given beside a pipeline, which has its own: pass its network and the scheduler"
        )
    if isinstance(source, DiffusionPipeline):
        return parts_of(source)
    return source if isinstance(source, Parts) else read_folder(Path(source))


def process_fields(parts: Parts, fields: dict[str, Any], mu: float | None) -> dict[str, Any]:
    """The fields of a Process that the configs say, but for its condition; `fields` are given in place of some."""
    read = {} if parts.vae is None else {"low": -torch.inf, "high": torch.inf, "sigma_data": 1.0}
    read |= _shape(parts.network, fields)
    if parts.scheduler is None:
        if missing := [name for name in ("schedule", "prediction", "time") if name not in fields]:
            raise ValueError(
                f"a network alone does not say its {', '.join(missing)}: pass its scheduler, or these"
            )
        return read
    config = config_of(parts.scheduler)
    said = describe(
        config, _mu(config, parts.network, (read | fields)["shape"]) if mu is None else mu
    )
    read |= {name: value for name, value in said._asdict().items() if value is not None}
    family = family_of(parts.network)
    if family.prediction not in (None, said.prediction):
        raise ValueError(
            f"{type(parts.network).__name__} is a flow's, but its {config['_class_name']} says {said.prediction}: give it the "
            f"scheduler that it was trained with, such as FlowMatchEulerDiscreteScheduler"
        )
    return read | {
        "time": replace(said.time, scale=said.time.scale * family.time_scale(parts.network))
    }


def _shape(network: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    shape = family_of(network).shape(network)
    if shape is None and "shape" not in fields:
        raise ValueError(
            "the network's config has no sample_size: pass shape, such as shape=(3, 32, 32)"
        )
    return {} if shape is None else {"shape": shape}


def _mu(config: dict[str, Any], network: nn.Module, shape: tuple[int, ...]) -> float | None:
    dynamic = config.get("use_dynamic_shifting")
    count = family_of(network).token_count(network, shape) if dynamic else None
    return None if count is None else shift_of(config, count)


def _told(
    parts: Parts,
    prompts: Sequence[str] | Prompts,
    negative: str,
    fields: dict[str, Any],
    shape: tuple[int, ...],
) -> tuple[nn.Module, dict[str, Any]]:
    """The network as it is asked by label, and what is known of the labels."""
    network = parts.network
    family = family_of(network)
    if not family.is_text_conditioned(network):
        if prompts or negative:
            raise ValueError(
                f"{type(network).__name__} is told no text: leave prompts and negative out"
            )
        return network, _labels(network, fields)
    if not isinstance(prompts, Prompts):
        prompts = _encoded(parts, prompts, negative, shape)
    elif negative:
        raise ValueError(
            "negative was given beside Prompts, which have their own null condition: leave it out"
        )
    return Prompted(family.wrap(network), prompts), {
        "classes": len(prompts),
        "dropout": family.dropout if len(prompts) else 0.0,
    }


def _encoded(
    parts: Parts, prompts: Sequence[str], negative: str, shape: tuple[int, ...]
) -> Prompts:
    if parts.pipeline is None:
        raise ValueError(
            f"{type(parts.network).__name__} is told text, which a network alone cannot encode: pass prompts=Prompts(...) of "
            f"diffcore.integrations.diffusers.encode, or its pipeline"
        )
    pipeline = parts.pipeline()
    height, width = (size * pipeline.vae_scale_factor for size in shape[1:])
    return encode(pipeline, prompts, negative, (height, width))


def _labels(network: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    family = family_of(network)
    if not isinstance(family.condition, ClassCondition):
        return {}
    count = family.condition.class_count(network_config(network), fields)
    return {} if count is None else {"classes": count, "dropout": family.dropout}


class Mean(nn.Module):
    """The first C of the 2C channels of a network that also outputs a variance.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = getattr(network, "config", None)

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        return tensor_of(self.network(x, time, **condition))[:, : x.shape[1]]


def mean_of(network: nn.Module, process: Process) -> nn.Module:
    """The network, or where it outputs a variance too, the mean of what it outputs."""
    config = getattr(network, "config", {})
    return Mean(network) if config.get("out_channels") == 2 * process.shape[0] else network
