"""The network of a diffusers pipeline as the start of training: all weights, or a LoRA adapter.

The result is saved in the format of diffusers: a pipeline folder, or a LoRA file for
`pipe.load_lora_weights`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
from torch import Tensor, nn

from diffcore.core.denoiser import extract_tensor
from diffcore.core.network import ExportableNetwork
from diffcore.core.process import Process
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.loading.folder import PipelineParts, read_folder, read_json
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.export import export_scheduler
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import describe_process
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.io.extras import has_extra, missing
from diffcore.io.files import hash_file, write_folder
from diffcore.samplers import DDIM
from diffcore.schedules import Trailing

__all__ = ["ADAPTER", "LoRA", "Pretrained", "run_scheduler"]

ADAPTER = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNREAD = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx*", "*.py")
"""Pickles and code, which are not copied."""


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter: W + (alpha / rank) B A with trained A and B, and B = 0 at the start. By
    peft.

    Hu et al. 2021 (2106.09685).

    Args:
        rank: rank of B A; 0 trains all weights of the network instead.
        alpha: alpha of the factor (alpha / rank); 0 for alpha = rank.
        targets: suffixes of the names of the adapted layers.
    """

    rank: int = 0
    alpha: int = 0
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, expected 1 or more, or 0 to train all weights")
        if self.alpha < 0 or not self.targets:
            raise ValueError(
                f"alpha is {self.alpha} and targets are {self.targets}, expected alpha of at least "
                "0 (0: the rank) and at least one suffix"
            )

    def add(self, network: Any) -> None:
        """Freeze the weights of a network, and add the adapter to its layers.

        Raises:
            ValueError: No layer has one of the suffixes, or peft is not installed.
        """
        if not has_extra("peft"):
            raise missing("peft", "LoRA (leave lora out to train all weights)")
        from peft import LoraConfig

        names = [name for name, _ in network.named_modules()]
        if lost := [
            target for target in self.targets if not any(name.endswith(target) for name in names)
        ]:
            raise ValueError(
                f"no layer of {type(network).__name__} ends in {', '.join(lost)}: see targets of "
                "LoRA"
            )
        network.requires_grad_(False)
        alpha = self.alpha or self.rank
        network.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=alpha,
                init_lora_weights="gaussian",
                target_modules=list(self.targets),
            )
        )


class Pretrained(ExportableNetwork):
    """The network of a diffusers pipeline. With LoRA its state is the adapter alone.

    Args:
        pipeline: folder that `save_pretrained` wrote, with safetensors and without code.
        lora: adapter that is trained in place of the weights; rank 0 trains all weights.

    Raises:
        ValueError: The folder holds no whole pipeline, or no layer fits the adapter.
    """

    def __init__(self, pipeline: str, lora: LoRA = LoRA()) -> None:
        super().__init__()
        self.index, self.lora = PipelineIndex(Path(pipeline)), lora
        self.network: Any = self.index.read(self.index.network_name)
        self.config = self.network.config
        if lora.rank:
            if not hasattr(self.index.pipeline_class, "save_lora_weights"):
                raise ValueError(
                    f"diffusers loads no LoRA into a {self.index.pipeline_class.__name__}: train "
                    "all weights"
                )
            lora.add(self.network)
            self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
            load_hook = self.register_load_state_dict_post_hook
            load_hook(_forgive_frozen)  # type: ignore[no-untyped-call]
        elif lost := sorted(
            name for name in self.index.parts if not (self.index.folder / name).is_dir()
        ):
            raise ValueError(
                f"{pipeline} names {', '.join(lost)} in model_index.json, and holds no such folder "
                "to copy into the run's "
                f"pipeline: download it, or write [null, null] there"
            )

    def forward(self, x: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
        """The output (B, *shape) of the network, without the variance that some networks also
        return.

        Args:
            x: (B, *shape) noisy samples.
            timestep: (B,) time input.
            **condition: labels or text embeddings.

        Returns:
            (B, *shape) output.

        Raises:
            ValueError: The network is conditioned on text, and no text embeddings are passed.
        """
        network: nn.Module = self.network
        family = family_of(network)
        if family.is_text_conditioned(network) and "encoder_hidden_states" not in condition:
            raise ValueError(
                "the network is conditioned on text, not on labels: sample its pipeline/ with "
                "--prompt, "
                "or use PromptNetwork(network, prompts)"
            )
        return extract_tensor(family.wrap(network)(x, timestep=timestep, **condition))[
            :, : x.shape[1]
        ]

    @cached_property
    def content_hash(self) -> str:
        """Hash of the frozen weights under an adapter; "" without LoRA."""
        files = (
            sorted((self.index.folder / self.index.network_name).glob("*.safetensors"))
            if self.lora.rank
            else []
        )
        return " ".join(map(hash_file, files))

    def exported_parts(self, folder: Path) -> PipelineParts:
        """The parts of the pipeline with this network and the scheduler of a run.

        Args:
            folder: folder of the run, to which `export` wrote the scheduler.

        Returns:
            The parts.
        """
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return replace(read_folder(self.index.folder), network=self.network, scheduler=scheduler)

    def export(self, folder: Path, process: Process) -> None:
        """Write pipeline/ to a run's folder, or with LoRA pytorch_lora_weights.safetensors and
        scheduler/.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.
        """
        scheduler = run_scheduler(self.index.scheduler, process)
        if self.lora.rank:
            self._save_adapter(folder)
            write_folder(folder / "scheduler", scheduler.save_pretrained)
        else:
            write_folder(folder / "pipeline", lambda path: self._save_pipeline(path, scheduler))

    def _save_adapter(self, run: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        own, name = self.network, self.index.network_name
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(own)}
        metadata = {
            f"{name}_lora_adapter_metadata": own.peft_config["default"].to_dict()
        }  # without it alpha is the rank
        with TemporaryDirectory(dir=run) as folder:
            self.index.pipeline_class.save_lora_weights(folder, **layers, **metadata)
            Path(folder, ADAPTER).rename(run / ADAPTER)

    def _save_pipeline(self, folder: Path, scheduler: Any) -> None:
        """Write the pipeline's folder with this network and scheduler; the other parts
        are copied.
        """
        self.network.save_pretrained(folder / self.index.network_name)
        scheduler.save_pretrained(folder / "scheduler")
        for name in self.index.parts - {self.index.network_name, "scheduler"}:
            shutil.copytree(
                self.index.folder / name, folder / name, ignore=shutil.ignore_patterns(*UNREAD)
            )
        kind = type(scheduler)
        library = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
        index = self.index.content | {"scheduler": [library, kind.__name__]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def run_scheduler(config: Mapping[str, Any], process: Process) -> Any:
    """A scheduler for a process: the given one of a flow if it is still right, else one of
    diffusers, else a DiffcoreScheduler.

    A DDIM scheduler of diffusers starts at the last level (trailing) and ends clean, as zero
    terminal SNR requires.

    Args:
        config: config of the pipeline's scheduler.
        process: process that the network was trained on.

    Returns:
        The scheduler.
    """
    if process.prediction == "flow_prediction" and _describes(config, process):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    description = (process.schedule, process.prediction, process.time, process.sigma_data)
    try:
        made = export_scheduler(process, SchedulerSettings(DDIM(), Trailing(), *description), 1)
    except ValueError:
        return DiffcoreScheduler(DDIM(), Trailing(), *description)
    if hasattr(
        made.config, "steps_offset"
    ):  # StableDiffusionPipeline requires 1, which trailing spacing does not read
        made.register_to_config(steps_offset=1)
    return made


def _describes(config: Mapping[str, Any], process: Process) -> bool:
    try:
        return describe_process(config)[:3] == (process.schedule, process.prediction, process.time)
    except ValueError:  # a dynamic shift needs μ
        return False


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    for name in _frozen(module):
        state.pop(prefix + name, None)


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    """Do not report frozen weights as missing from the state of an adapter."""
    frozen = tuple(_frozen(module))
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(frozen)]


def _frozen(module: nn.Module) -> list[str]:
    """Names of the parameters that are not trained, and of all buffers."""
    parameters = [name for name, value in module.named_parameters() if not value.requires_grad]
    return parameters + [name for name, _ in module.named_buffers()]
