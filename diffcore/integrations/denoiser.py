"""A diffusers network as a Denoiser: its process is read from the configs, and what they do not say is asked for."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from diffcore.denoiser import Denoiser
from diffcore.integrations.configs import config_of, describe
from diffcore.integrations.folder import Parts, parts_of, read_folder
from diffcore.process import Process

log = logging.getLogger(__name__)
DIT_DROPOUT = 0.1
"""DiT's own, of LabelEmbedding: its configs cannot say another."""


def from_diffusers(
    source: str | Path | DiffusionPipeline | nn.Module, scheduler: Any = None, mu: float | None = None, **fields: Any
) -> Denoiser:
    """A network of diffusers with the process that its scheduler and its own config describe.

    Unconditional and class-conditional networks (UNet2DModel, DiTTransformer2DModel, or any module that is asked as they are).
    One that outputs a variance beside the mean (2C channels) is taken at its mean. A text-conditional network is guided in
    its pipeline, by `attach`.

    From the configs: schedule, prediction, time, shape, and of DiT classes and dropout. Data are within [-1, 1], as every
    pipeline of diffusers has it, with a standard deviation of 0.5; latents are unbounded, with one of 1, which is what a VAE's
    scaling factor is for.

    Args:
        source: a pipeline's folder, a pipeline, or a network.
        scheduler: of a network alone: its scheduler, or the scheduler's config.
        mu: the shift's μ of a flow with use_dynamic_shifting, which a pipeline computes from the image's size.
        fields: of Process, in place of what the configs say: `classes` and `dropout` of a class-conditional UNet2DModel,
            `shape` where the config has no size, `sigma_data`, `low`, `high`. To contradict a config is logged.

    Raises:
        ValueError: the configs contradict themselves or do not say enough; the message has the remedy.
    """
    parts = _parts(source, scheduler)
    read = _process_fields(parts, fields, mu)
    for name in fields.keys() & read.keys():
        if fields[name] != read[name]:
            log.warning("%s is %s, in place of %s of the configs", name, fields[name], read[name])
    process = Process(**read | fields)
    return Denoiser(_mean(parts.network, process), process)


def _parts(source: Any, scheduler: Any) -> Parts:
    if isinstance(source, nn.Module):
        return Parts(source, scheduler)
    if scheduler is not None:
        raise ValueError("scheduler was given beside a pipeline, which has its own: pass its network and the scheduler")
    if isinstance(source, DiffusionPipeline):
        return parts_of(source)
    return read_folder(Path(source))


def _process_fields(parts: Parts, fields: dict[str, Any], mu: float | None) -> dict[str, Any]:
    read = {} if parts.vae is None else {"low": -torch.inf, "high": torch.inf, "sigma_data": 1.0}
    if parts.scheduler is not None:
        said = describe(config_of(parts.scheduler), mu)
        read |= {name: value for name, value in said._asdict().items() if value is not None}
    elif missing := [name for name in ("schedule", "prediction", "time") if name not in fields]:
        raise ValueError(f"a network alone does not say its {', '.join(missing)}: pass its scheduler, or these")
    config = getattr(parts.network, "config", {})
    return read | _shape(config, fields) | _labels(parts.network, config, fields)


def _shape(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        if "shape" not in fields:
            raise ValueError("the network's config has no sample_size: pass shape, such as shape=(3, 32, 32)")
        return {}
    return {"shape": (channels, *((size, size) if isinstance(size, int) else size))}


def _labels(network: nn.Module, config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    if isinstance(network, DiTTransformer2DModel):
        return {"classes": config["num_embeds_ada_norm"], "dropout": DIT_DROPOUT}
    if "encoder_hid_dim" in config or config.get("cross_attention_dim") or config.get("joint_attention_dim"):
        raise ValueError(
            f"{type(network).__name__} takes a text condition, which this denoiser has not: guide it in its pipeline (attach)"
        )
    if not isinstance(network, UNet2DModel):
        return {}
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(f"class_embed_type is {kind!r}, expected labels in a table (num_class_embeds)")
    count = config.get("num_class_embeds")
    if count is not None and not {"classes", "dropout"} <= fields.keys():
        raise ValueError(
            f"the network embeds {count} labels, and its config does not say whether the last is the null label: pass "
            f"classes={count - 1} and the dropout that it was trained with, or dropout=0.0 where it knows no null label "
            f"(label {count - 1} can then be asked for, and CFG is refused)"
        )
    return {}


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
        return self.network(x, time, **condition, return_dict=False)[0][:, : x.shape[1]]


def _mean(network: nn.Module, process: Process) -> nn.Module:
    config = getattr(network, "config", {})
    return Mean(network) if config.get("out_channels") == 2 * process.shape[0] else network
