"""Fine-tuning of the network of a diffusers pipeline: all of its weights, or a LoRA adapter.

The result is saved in the format of diffusers: a pipeline folder, or a LoRA file for
`pipe.load_lora_weights`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffcore.core.denoiser import extract_tensor
from diffcore.core.network import ExportableNetwork, keep_trained_state
from diffcore.core.process import Process
from diffcore.integrations.diffusers.adapters.files import ADAPTER
from diffcore.integrations.diffusers.adapters.lora import LoRA
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.loading.folder import PipelineParts, read_folder
from diffcore.integrations.diffusers.loading.frozen_base import BasePrecision, read_base
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.parts import read_json
from diffcore.integrations.diffusers.pipeline.export import export_scheduler
from diffcore.integrations.diffusers.pipeline.folder import write_pipeline
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    describe_process,
    dynamic_shift,
)
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.io.files import verify_folder, write_file, write_folder
from diffcore.samplers import DDIM
from diffcore.schedules import Trailing

__all__ = ["PretrainedNetwork", "build_scheduler"]


class PretrainedNetwork(ExportableNetwork):
    """The network of a diffusers pipeline, to be trained further.

    With LoRA its state_dict contains only the adapter.

    Args:
        pipeline: folder of a diffusers pipeline (`save_pretrained`) with safetensors.
        lora: adapter that is trained in place of the weights; rank 0 trains all weights.
        base: data type of the frozen weights under an adapter: float32, bf16, fp8 (stored in 8 bits
            and evaluated in bfloat16) or nf4 (4 bits of bitsandbytes). The adapter is float32.

    Raises:
        ValueError: The folder holds no complete pipeline, no layer fits the adapter, or diffusers
            loads no adapter into this pipeline; or the base of all weights is not float32.
    """

    def __init__(
        self, pipeline: str | Path, lora: LoRA = LoRA(), base: BasePrecision = "float32"
    ) -> None:
        super().__init__()
        if not Path(pipeline).is_dir():
            raise ValueError(
                f"pipeline is {pipeline}, which does not exist: name its folder; of a run whose "
                "pipeline was moved, diffcore lora base RUN --pipeline FOLDER (or write the new "
                "folder in config.yaml in place of this one)"
            )
        self.index, self.lora = PipelineIndex(Path(pipeline)), lora
        self.index.check_pretrained()
        if base != "float32" and not lora.rank:
            raise ValueError(
                f"base is {base}, but all weights are trained, which needs float32: train an "
                "adapter (--lora 16), or leave base out"
            )
        self.base = base
        self.network: Any = read_base(self.index, base)
        self.config = self.network.config
        if lora.rank:
            if not hasattr(self.index.pipeline_class, "save_lora_weights"):
                raise ValueError(
                    f"diffusers loads no LoRA into a {self.index.pipeline_class.__name__}: train "
                    "all weights"
                )
            lora.add_to(self.network)
            keep_trained_state(self)
            for parameter in self.network.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        elif missing_parts := sorted(
            name for name in self.index.parts if not (self.index.folder / name).is_dir()
        ):
            raise ValueError(
                f"{pipeline} names {', '.join(missing_parts)} in model_index.json, and holds no "
                "such folder to copy into the run's pipeline: download it, or write [null, null] "
                "in model_index.json"
            )

    def forward(self, x: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
        """Evaluate the network, and drop the variance that some networks also output.

        Args:
            x: (B, *shape) noisy samples.
            timestep: (B,) time input.
            **condition: labels or text embeddings.

        Returns:
            (B, *shape) output, of the prediction type of the process.

        Raises:
            ValueError: The network is conditioned on text, and no text embeddings are passed.
        """
        network: nn.Module = self.network
        family = family_of(network)
        if family.is_text_conditioned(network) and "encoder_hidden_states" not in condition:
            raise ValueError(
                "the network is conditioned on text, not on labels: sample its pipeline/ with "
                "--prompt, or use PromptNetwork(network, prompts)"
            )
        given, condition = self._narrowed(x), self._narrowed(condition)
        output = extract_tensor(family.wrap(network)(given, timestep=timestep, **condition))
        return output[:, : x.shape[1]].to(x.dtype)

    def _narrowed(self, value: Any) -> Any:
        """Tensors of numbers, possibly in dictionaries, in the data type of a frozen base."""
        if isinstance(value, dict):
            return {name: self._narrowed(item) for name, item in value.items()}
        is_wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if is_wide and self.base != "float32" else value

    @cached_property
    def content_hash(self) -> str:
        """Hash of the frozen weights that an adapter is trained for; "" without LoRA."""
        return self.index.network_hash if self.lora.rank else ""

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """Names of the matrices B of an adapter -> the ratio of LoRA+."""
        return self.lora.learning_rate_factors(self)

    @property
    def exported_names(self) -> tuple[str, ...]:
        """The adapter and its scheduler, or without LoRA the pipeline."""
        return (ADAPTER, "scheduler") if self.lora.rank else ("pipeline",)

    @property
    def facts(self) -> dict[str, str]:
        """The pipeline that the training started from, and the adapter if there is one."""
        facts = {"base pipeline": str(self.index.folder)}
        if self.lora.rank:
            trained = sum(value.numel() for value in self.parameters() if value.requires_grad)
            facts["adapter"] = f"{self.lora.describe()}, {trained:,} trained parameters"
        return facts

    def exported_parts(self, folder: str | Path) -> PipelineParts:
        """The parts of the pipeline with this network on a float32 base, and a run's scheduler.

        Args:
            folder: folder of the run, to which `export` wrote the scheduler.

        Returns:
            The parts.
        """
        verify_folder(Path(folder) / "scheduler")
        scheduler = read_json(Path(folder) / "scheduler" / "scheduler_config.json")
        parts = read_folder(self.index.folder, self._in_float32())
        return replace(parts, scheduler=scheduler)

    def _in_float32(self) -> nn.Module:
        """The network with the weights of the pipeline, which diffusers adds the adapter to."""
        network: nn.Module = self.network
        if self.base != "float32":
            made = PretrainedNetwork(self.index.folder, self.lora)
            made.load_state_dict(self.state_dict())
            network = made.network
        return network

    def export(self, folder: str | Path, process: Process) -> None:
        """Write the network to a run's folder in the format of diffusers.

        Without LoRA it is the folder pipeline/; with LoRA it is pytorch_lora_weights.safetensors
        and the folder scheduler/.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.
        """
        folder = Path(folder)
        scheduler = build_scheduler(self.index.scheduler, process, self.network)
        if self.lora.rank:
            self._save_adapter(folder)
            write_folder(folder / "scheduler", scheduler.save_pretrained)
        else:
            parts = {self.index.network_name: self.network, "scheduler": scheduler}
            write_folder(folder / "pipeline", lambda path: write_pipeline(path, self.index, parts))

    def _save_adapter(self, run: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        name = self.index.network_name
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(self.network)}
        # Without the metadata diffusers takes the rank for alpha.
        metadata = {f"{name}_lora_adapter_metadata": self.lora.written_config(self.network)}
        with TemporaryDirectory() as folder:
            self.index.pipeline_class.save_lora_weights(folder, **layers, **metadata)
            write_file(run / ADAPTER, Path(folder, ADAPTER).read_bytes())


def build_scheduler(
    config: Mapping[str, Any], process: Process, network: nn.Module | None = None
) -> Any:
    """Build the scheduler of a fine-tuned network.

    It is the scheduler of the pipeline if this describes the process (a flow), else the one of
    diffusers that expresses the process, else a DiffcoreScheduler. A DDIM scheduler of diffusers
    starts at the last level (trailing) and ends at the clean level, which zero terminal SNR
    requires.

    Args:
        config: config of the pipeline's scheduler.
        process: process that the network was trained on.
        network: the network, whose number of tokens determines the shift of a flow with
            `use_dynamic_shifting`, and whose time may be a multiple of the scheduler's.

    Returns:
        The scheduler.
    """
    if process.prediction == "flow_prediction" and _describes(config, process, network):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    description = (process.schedule, process.prediction, process.time, process.sigma_data)
    try:
        scheduler = export_scheduler(
            process, SchedulerSettings(DDIM(), Trailing(), *description), 1
        )
    except ValueError:
        return DiffcoreScheduler(DDIM(), Trailing(), *description)
    if "steps_offset" in scheduler.config:
        # StableDiffusionPipeline requires 1; trailing spacing ignores it.
        scheduler.register_to_config(steps_offset=1)
    return scheduler


def _describes(config: Mapping[str, Any], process: Process, network: nn.Module | None) -> bool:
    """Whether a scheduler has the process, at the time shift of its shape if it is dynamic."""
    mu, factor = None, 1.0
    if network is not None:
        family = family_of(network)
        factor, tokens = family.time_scale(network), family.token_count(network, process.shape)
        if config.get("use_dynamic_shifting") and tokens is not None:
            mu = dynamic_shift(dict(config), tokens)
    try:
        found = describe_process(dict(config), mu)
    except ValueError:  # a dynamic shift needs μ
        return False
    time = replace(found.time, scale=found.time.scale * factor)
    return (found.schedule, found.prediction, time) == (
        process.schedule,
        process.prediction,
        process.time,
    )
