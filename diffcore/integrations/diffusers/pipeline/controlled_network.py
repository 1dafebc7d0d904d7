"""A ControlNet of diffusers that is trained beside a frozen UNet."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from diffcore.core.denoiser import extract_tensor
from diffcore.core.network import ExportableNetwork, class_name, keep_trained_state, unwrap
from diffcore.core.process import Process
from diffcore.integrations.diffusers.loading.folder import PipelineParts, read_folder
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork
from diffcore.io.files import write_folder
from diffcore.io.safetensors import hash_tensors
from diffcore.run import Run

__all__ = ["ControlledNetwork"]

FOLDER = "controlnet"


class ControlledNetwork(ExportableNetwork):
    """A frozen UNet2DConditionModel, and a ControlNet that is trained on an image beside x.

        F = unet(x, time, ..., residuals = controlnet(x, time, ..., c))

    The ControlNet begins as a copy of the encoder of the UNet whose outputs pass through
    convolutions of weight 0, so that F begins as the output of the UNet, exactly. With a condition
    whose absent value is learned, samples without it have no residuals, and are those of the UNet.
    The state of the network is that of the ControlNet. A run also writes it to controlnet/, for the
    ControlNet pipelines of diffusers. Source: Zhang et al. 2023 (2302.05543).

    Args:
        base: folder of a diffusers pipeline, or of a run, whose network is a UNet2DConditionModel;
            in Python also such a network.
        channels: number of channels of the condition.
        condition: name of the condition in the process.
        embedding: channels of the layers that embed the condition; each layer after the first
            halves its height and width, so that (16, 32, 96, 256) expects 8 times the size of x,
            the images of latents, and (16,) the size of x.

    Raises:
        ValueError: the base is no UNet2DConditionModel, or its folder cannot be read.
    """

    def __init__(
        self,
        base: str | Path | nn.Module,
        channels: int = 3,
        condition: str = "control",
        embedding: Sequence[int] = (16, 32, 96, 256),
    ) -> None:
        super().__init__()
        self.base = None if isinstance(base, nn.Module) else Path(base)
        network: Any = _inner(base if isinstance(base, nn.Module) else _read_network(Path(base)))
        if not isinstance(network, UNet2DConditionModel):
            raise ValueError(
                f"the network of {base if isinstance(base, (str, Path)) else 'base'} is a "
                f"{class_name(network)}, expected a UNet2DConditionModel, whose blocks accept the "
                "residuals of a ControlNet"
            )
        frozen: Any = network
        self.network = frozen.requires_grad_(False).eval()
        self.config = frozen.config
        self.condition, self.factor = condition, 2 ** (len(embedding) - 1)
        self.controlnet: Any = ControlNetModel.from_unet(
            network,
            conditioning_channels=channels,
            conditioning_embedding_out_channels=tuple(embedding),
        ).requires_grad_(True)
        keep_trained_state(self)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The output of the UNet with the residuals of the ControlNet.

        Args:
            x: (B, C, H, W) noisy samples.
            timestep: (B,) time input.
            encoder_hidden_states: (B, tokens, d) text embeddings, if the UNet has cross-attention.
            **arguments: the condition (B, channels, H', W') under its name, and other arguments of
                both networks.

        Returns:
            (B, C, H, W) output.

        Raises:
            ValueError: the condition is missing or has another size than the embedding expects.
        """
        control, absent = self._take_control(x, arguments)
        down, middle = self.controlnet(
            x,
            timestep,
            encoder_hidden_states,
            controlnet_cond=control,
            return_dict=False,
            **arguments,
        )
        if absent is not None:
            present = (~absent).view(-1, 1, 1, 1)
            down, middle = [residual * present for residual in down], middle * present
        output = self.network(
            x,
            timestep,
            encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            **arguments,
        )
        return extract_tensor(output)[:, : x.shape[1]]

    def _take_control(self, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Remove the condition and its flags from the arguments of a call."""
        name, expected = self.condition, tuple(self.factor * size for size in x.shape[2:])
        if name not in arguments:
            raise ValueError(
                f"the condition {name} is missing: add it to the conditions of the process"
            )
        control: Tensor = arguments.pop(name)
        if control.shape[2:] != expected:
            raise ValueError(
                f"condition {name} has the size {tuple(control.shape[2:])}, expected {expected}, "
                f"{self.factor} times that of x: set its shape, or the number of layers of "
                "`embedding`, each of which after the first halves the size"
            )
        return control, arguments.pop(f"{name}_absent", None)

    def train(self, mode: bool = True) -> "ControlledNetwork":
        """Set the mode of the ControlNet; the frozen UNet stays in evaluation mode.

        Args:
            mode: true for training.

        Returns:
            This module.
        """
        super().train(mode)
        self.network.eval()
        return self

    @cached_property
    def content_hash(self) -> str:
        """Hash of the frozen weights."""
        return hash_tensors(self.network.state_dict())

    @property
    def described_network(self) -> nn.Module:
        """The UNet."""
        return self.network

    @property
    def exported_names(self) -> tuple[str, ...]:
        """The folder of the ControlNet."""
        return (FOLDER,)

    @property
    def facts(self) -> dict[str, str]:
        """The number of weights that are trained."""
        trained = sum(value.numel() for value in self.controlnet.parameters())
        return {"controlnet": f"{trained:,} trained parameters, condition {self.condition}"}

    def export(self, folder: str | Path, process: Process) -> None:
        """Write the ControlNet to controlnet/ in the format of diffusers.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.
        """
        write_folder(Path(folder) / FOLDER, self.controlnet.save_pretrained)

    def exported_parts(self, folder: str | Path) -> PipelineParts:
        """The parts of the base's pipeline with this network, on the process of a run.

        Args:
            folder: folder of the run.

        Returns:
            The parts.

        Raises:
            ValueError: the base was a network in memory, or a run without a pipeline.
        """
        pipeline = None if self.base is None else _pipeline_folder(self.base)
        if pipeline is None:
            raise ValueError(
                f"the base of {folder} is no pipeline, which would encode prompts and decode "
                f"latents: load {FOLDER}/ by ControlNetModel.from_pretrained into a "
                "StableDiffusionControlNetPipeline"
            )
        process = Process.load(Run(Path(folder)).process)
        known = {each.name: getattr(process, each.name) for each in fields(process)}
        of_prompts = ("classes", "dropout")  # here labels are the prompts of the samples
        known = {name: value for name, value in known.items() if name not in of_prompts}
        return replace(read_folder(pipeline, self.network), network=self, process_fields=known)


def _inner(network: nn.Module) -> nn.Module:
    """The network of diffusers inside of `unwrap` and `PretrainedNetwork`."""
    network = unwrap(network)
    return network.network if isinstance(network, PretrainedNetwork) else network


def _pipeline_folder(folder: Path) -> Path | None:
    """The folder of a pipeline itself, or of the pipeline that a run has written."""
    candidates = (folder, Run(folder).pipeline)
    return next((each for each in candidates if (each / "model_index.json").is_file()), None)


def _read_network(folder: Path) -> nn.Module:
    """The network of a run with its averaged weights, or of a pipeline."""
    if (folder / "model_index.json").is_file():
        index = PipelineIndex(folder)
        index.check_pretrained()
        network: nn.Module = index.read(index.network_name)
        return network
    return Run(folder).denoiser().network
