"""Pipelines of diffusers that sample a trained network without diffcore.

diffusers' own pipelines of a UNet2DModel:

    DDIMPipeline, DDPMPipeline    no class labels
    ConsistencyModelPipeline      class labels, and a network input that the scheduler scales (EDM);
                                  it accepts any scheduler with `scale_model_input`

DiTPipeline samples a DiTTransformer2DModel of 1000 classes on the latents of a VAE.
"""

from typing import Any

import diffusers
from torch import nn

from diffcore.core.network import network_config
from diffcore.core.process import Process
from diffcore.integrations.diffusers.families.class_labels import DIT_NULL_LABEL
from diffcore.integrations.diffusers.families.family import config_shape

__all__ = ["ALTERNATIVE", "batch_call", "dit_call", "dit_pipeline", "unet_pipeline"]

ALTERNATIVE = "export a DiffcorePipeline (--format diffcore)"
"""The remedy where no pipeline of diffusers expresses a process."""


def unet_pipeline(
    network: nn.Module, process: Process, scheduler: Any, vae: nn.Module | None
) -> Any:
    """The pipeline of diffusers for a UNet2DModel.

    Args:
        network: a UNet2DModel.
        process: the process that the network was trained on.
        scheduler: scheduler of diffusers that expresses the process.
        vae: None; no pipeline of diffusers decodes the samples of a UNet2DModel.

    Returns:
        A DDIMPipeline, DDPMPipeline or ConsistencyModelPipeline.

    Raises:
        ValueError: none of them expresses the process; the message has the reason.
    """
    if vae is not None:
        raise ValueError(
            f"no pipeline of diffusers decodes the samples of a UNet2DModel: {ALTERNATIVE}"
        )
    if (process.low, process.high) != (-1, 1):
        raise ValueError(
            f"pipelines of diffusers expect images in [-1, 1], and the range of these is "
            f"[{process.low:g}, {process.high:g}]: {ALTERNATIVE}"
        )
    if process.variance == "learned" and not _reads_variance(scheduler):
        raise ValueError(
            f"the network also outputs a variance, which no {type(scheduler).__name__} with these "
            f"options of a UNet2DModel's pipeline accepts: export the sampler DDPM(), or "
            f"{ALTERNATIVE}"
        )
    is_scaled = isinstance(scheduler, diffusers.EDMEulerScheduler)
    _check_shape(network, process, is_square=is_scaled or process.classes > 0)
    if process.classes and isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"only ConsistencyModelPipeline passes labels to a UNet2DModel, and it accepts no "
            f"flow scheduler: {ALTERNATIVE}"
        )
    if process.classes or is_scaled:
        cls: Any = diffusers.ConsistencyModelPipeline
    else:
        is_deterministic = isinstance(scheduler, diffusers.DDIMScheduler)
        cls = diffusers.DDIMPipeline if is_deterministic else diffusers.DDPMPipeline
    return cls(network, scheduler)


def dit_pipeline(
    network: nn.Module, process: Process, scheduler: Any, vae: nn.Module | None
) -> Any:
    """DiTPipeline for a DiTTransformer2DModel.

    Args:
        network: a DiTTransformer2DModel of 1000 classes.
        process: the process that the network was trained on.
        scheduler: DDIMScheduler or DDPMScheduler that expresses the process.
        vae: the VAE whose latents the network denoises.

    Returns:
        The DiTPipeline.

    Raises:
        ValueError: it does not express the process; the message has the reason.
    """
    if vae is None:
        raise ValueError(
            f"DiTPipeline decodes latents by a VAE, and this network has none: {ALTERNATIVE}"
        )
    if process.classes != DIT_NULL_LABEL:
        raise ValueError(
            f"the null label of DiTPipeline is {DIT_NULL_LABEL}, and this network has "
            f"{process.classes} classes: {ALTERNATIVE}"
        )
    if not isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler)):
        raise ValueError(
            f"DiTPipeline accepts no {type(scheduler).__name__}, which this process needs: "
            f"{ALTERNATIVE}"
        )
    if _reads_variance(scheduler):
        raise ValueError(
            f"DiTPipeline leaves out the variance of its network, with which DDPM() samples: "
            f"export the sampler DDIM(), or {ALTERNATIVE}"
        )
    _check_shape(network, process, is_square=True)
    return diffusers.DiTPipeline(network, vae, scheduler)  # type: ignore[no-untyped-call]


def batch_call(count: int, labels: list[int] | None) -> dict[str, Any]:
    """Arguments of a call of a UNet2DModel's pipeline.

    Args:
        count: number of samples.
        labels: class label of each sample, or None.

    Returns:
        Name -> value.
    """
    return {"batch_size": count} | ({} if labels is None else {"class_labels": labels})


def dit_call(count: int, labels: list[int] | None) -> dict[str, Any]:
    """Arguments of a call of DiTPipeline without guidance.

    Args:
        count: number of samples; DiTPipeline takes it from the labels.
        labels: class label of each sample.

    Returns:
        Name -> value.
    """
    return {"class_labels": labels or [], "guidance_scale": 1.0}


def _reads_variance(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers expects the variance beside the mean."""
    return scheduler.config.get("variance_type") == "learned_range"


def _check_shape(network: Any, process: Process, is_square: bool) -> None:
    config = network_config(network)
    size = config.get("sample_size")
    if process.shape != config_shape(config) or (is_square and not isinstance(size, int)):
        raise ValueError(
            f"a pipeline of diffusers draws samples of the network's sample_size, {size}, and the "
            f"shape of these is {process.shape}: {ALTERNATIVE}"
        )
