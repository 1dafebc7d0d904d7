"""Fine-tuning of the network of a diffusers pipeline: all of its weights, or an adapter of it, of
its text encoders, and the embeddings of a new word.

The result is saved in the format of diffusers: a pipeline folder, or files for
`pipe.load_lora_weights` and `pipe.load_textual_inversion`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import extract_tensor
from diffcore.core.network import ExportableNetwork, keep_trained_state, leave_label_dropout
from diffcore.core.process import Process, VarianceType
from diffcore.integrations.diffusers.adapters.files import ADAPTER
from diffcore.integrations.diffusers.adapters.lora import LoRA, TextLoRA
from diffcore.integrations.diffusers.adapters.textual_inversion import (
    LEARNED_EMBEDDINGS,
    NewWord,
    write_word,
)
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.families.guidance_input import add_guidance_input
from diffcore.integrations.diffusers.loading.folder import (
    PipelineParts,
    read_folder,
)
from diffcore.integrations.diffusers.loading.frozen_base import BasePrecision, read_base
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.parts import read_json
from diffcore.integrations.diffusers.loading.prompts import TOKENS, Prompts, set_argument
from diffcore.integrations.diffusers.loading.text_encoding import EMBEDDED_GUIDANCE_SCALE
from diffcore.integrations.diffusers.pipeline.folder import write_pipeline
from diffcore.integrations.diffusers.pipeline.trained_scheduler import build_scheduler
from diffcore.io.extras import has_extra, missing
from diffcore.io.files import verify_folder, write_file, write_folder

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.adapters.text_encoders import TextEncoders

__all__ = ["PretrainedNetwork"]


class PretrainedNetwork(ExportableNetwork):
    """The network of a diffusers pipeline, to be trained further.

    With LoRA its state_dict contains only the adapter. With `text_lora` or `word` it contains the
    text encoders, and takes tokens in place of text embeddings (`LatentDataset(text="tokens")`).

    Args:
        pipeline: folder of a diffusers pipeline (`save_pretrained`) with safetensors.
        lora: adapter that is trained in place of the weights; rank 0 trains all weights, or none
            with `text_lora` or `word`.
        base: data type of the frozen weights under an adapter: float32, bf16, fp8 (stored in 8 bits
            and evaluated in bfloat16) or nf4 (4 bits of bitsandbytes). The adapter is float32.
        text_lora: adapter of the text encoders (Stable Diffusion 1, 2 and XL), which are encoded in
            every training step; rank 0 leaves them as they are.
        word: new word whose embeddings are trained (textual inversion).
        variance: learned to output the network's variance too, as `process.variance` requires.
        guidance_embedding: number of features of the scale of guidance w, the condition
            `guidance_scale`, that a UNet2DConditionModel receives as a new input: 256 as in latent
            consistency models. 0: the network has the inputs of the pipeline.

    Raises:
        ValueError: The folder holds no complete pipeline, no layer fits the adapter, or diffusers
            loads no adapter into this pipeline; or the base of all weights is not float32, or the
            network outputs no variance.
    """

    text_encoders: "TextEncoders | None"

    def __init__(
        self,
        pipeline: str | Path,
        lora: LoRA = LoRA(),
        base: BasePrecision = "float32",
        text_lora: TextLoRA = TextLoRA(),
        word: NewWord = NewWord(),
        variance: VarianceType = "fixed",
        guidance_embedding: int = 0,
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
        self.text_lora, self.word = text_lora, word
        trains_text = bool(text_lora.rank or word.word)
        self.is_adapter = bool(lora.rank or trains_text)
        if base != "float32" and not self.is_adapter:
            raise ValueError(
                f"base is {base}, but all weights are trained, which needs float32: train an "
                "adapter (--lora 16), or leave base out"
            )
        self.base = base
        self.network: Any = read_base(self.index, base)
        if guidance_embedding:
            if self.is_adapter:
                raise ValueError(
                    f"guidance_embedding is {guidance_embedding}, but an adapter is trained, whose "
                    "file does not hold it: train all weights, or distil one scale"
                )
            add_guidance_input(self.network, guidance_embedding)
        leave_label_dropout(self.network)
        self.config, self.variance = self.network.config, variance
        _check_variance(variance, self.config, pipeline)
        self.text_encoders = self._read_text_encoders() if trains_text else None
        if self.is_adapter:
            if not hasattr(self.index.pipeline_class, "save_lora_weights"):
                raise ValueError(
                    f"diffusers loads no LoRA into a {self.index.pipeline_class.__name__}: train "
                    "all weights"
                )
            self.network.requires_grad_(False)
            if lora.rank:
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

    def _read_text_encoders(self) -> "TextEncoders":
        if not has_extra("peft"):
            raise missing("peft", "Training text encoders (leave text_lora and word out)")
        from diffcore.integrations.diffusers.adapters.text_encoders import TextEncoders

        return TextEncoders(self.index, self.text_lora, self.word)

    def forward(self, x: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
        """Evaluate the network, and drop its variance unless that is learned.

        Args:
            x: (B, *shape) noisy samples.
            timestep: (B,) time input.
            **condition: labels or text embeddings; of a network that trains its text encoders,
                `tokens`.

        Returns:
            (B, *shape) output of the prediction type; (B, 2C, ...) with a learned variance.

        Raises:
            ValueError: The network is conditioned on text, and no text embeddings or tokens are
                passed.
        """
        network: nn.Module = self.network
        if self.text_encoders is not None:
            condition = self._encoded(condition)
        family = family_of(network)
        if family.is_text_conditioned(network) and "encoder_hidden_states" not in condition:
            raise ValueError(
                "the network is conditioned on text, not on labels: sample its pipeline/ with "
                "--prompt, or use PromptNetwork(network, prompts)"
            )
        given, condition = self._narrowed(x), self._narrowed(condition)
        output = extract_tensor(family.wrap(network)(given, timestep=timestep, **condition))
        channels = x.shape[1] * (2 if self.variance == "learned" else 1)
        return output[:, :channels].to(x.dtype)

    def _encoded(self, condition: dict[str, Any]) -> dict[str, Any]:
        """The condition with text embeddings in place of tokens."""
        assert self.text_encoders is not None
        if TOKENS not in condition:
            raise ValueError(
                "the network trains its text encoders, and takes tokens in place of text "
                "embeddings: set text: tokens of the data (--data.text tokens)"
            )
        encoded = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in condition.items()
            if name != TOKENS
        }
        for name, value in self.text_encoders(condition[TOKENS]).items():
            set_argument(encoded, name, value)
        return encoded

    def _narrowed(self, value: Any) -> Any:
        """Tensors of numbers, possibly in dictionaries, in the data type of a frozen base."""
        if isinstance(value, dict):
            return {name: self._narrowed(item) for name, item in value.items()}
        is_wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if is_wide and self.base != "float32" else value

    @cached_property
    def content_hash(self) -> str:
        """Hash of the frozen weights that an adapter is trained for; "" if all are trained."""
        encoders = self.index.text_encoders if self.text_encoders is not None else []
        names = (self.index.network_name, *encoders)
        return self.index.weights_hash(*names) if self.is_adapter else ""

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """Names of the matrices B of adapters -> the ratio of LoRA+."""
        parts: dict[str, tuple[LoRA, Any]] = {"network": (self.lora, self.network)}
        if self.text_encoders is not None:
            parts["text_encoders"] = (self.text_lora, self.text_encoders)
        return {
            f"{part}.{name}": factor
            for part, (lora, module) in parts.items()
            for name, factor in lora.learning_rate_factors(module).items()
        }

    @property
    def exported_names(self) -> tuple[str, ...]:
        """The adapter, the new word and the scheduler; the pipeline if all weights are trained."""
        if not self.is_adapter:
            return ("pipeline",)
        adapter = [ADAPTER] if self.lora.rank or self.text_lora.rank else []
        return (*adapter, *[LEARNED_EMBEDDINGS] * bool(self.word.word), "scheduler")

    @property
    def facts(self) -> dict[str, str]:
        """The pipeline that the training started from, and the adapter if there is one."""
        facts = {"base pipeline": str(self.index.folder)}
        if self.lora.rank:
            count = _count_trained(self.network)
            facts["adapter"] = f"{self.lora.describe()}, {count:,} trained parameters"
        if self.text_encoders is not None:
            what = [self.text_lora.describe()] if self.text_lora.rank else []
            what += [f"{self.word.vectors} embeddings of {self.word.word}"] * bool(self.word.word)
            count = _count_trained(self.text_encoders)
            facts["text encoders"] = f"{', '.join(what)}, {count:,} trained parameters"
        return facts

    def tokenize(self, texts: Sequence[str], negative: str, size: int) -> Prompts | None:
        """Tokenise prompts for the text encoders that this network trains.

        Args:
            texts: K prompts.
            negative: text of the null condition; "": the empty prompt.
            size: height and width of the images in pixels.

        Returns:
            The bank of tokens that labels index; None if no text encoder is trained.
        """
        if self.text_encoders is None:
            return None
        condition, scale = self.text_encoders.condition, EMBEDDED_GUIDANCE_SCALE
        shared = condition.shared_arguments(self.network, (size, size), scale)
        count = len(texts) + 1
        sizes = {name: value.expand(count, *value.shape) for name, value in shared.items()}
        tokens = self.text_encoders.tokenize(texts, negative)
        return Prompts(tokens | sizes, tuple(texts), self.index.size_arguments)

    def check_captions(self, texts: Sequence[str]) -> None:
        """Raise ValueError if no caption contains the new word, whose embeddings are trained.

        Args:
            texts: captions of the training data.
        """
        if self.word.word and not any(self.word.word in text for text in texts):
            raise ValueError(
                f"the new word is {self.word.word}, which none of the {len(texts)} captions "
                "contains, so that it would not be trained: write it into the captions of its "
                "images"
            )

    def exported_parts(self, folder: str | Path) -> PipelineParts:
        """The parts of the pipeline with this network on a float32 base, and a run's scheduler.

        Args:
            folder: folder of the run, to which `export` wrote the scheduler.

        Returns:
            The parts.
        """
        verify_folder(Path(folder) / "scheduler")
        scheduler = read_json(Path(folder) / "scheduler" / "scheduler_config.json")
        text = {} if self.text_encoders is None else self.text_encoders.components()
        parts = read_folder(self.index.folder, self._in_float32(), text)
        return replace(parts, scheduler=scheduler)

    def _in_float32(self) -> nn.Module:
        """The network with the weights of the pipeline, which diffusers adds the adapter to."""
        network: nn.Module = self.network
        if self.base != "float32" and not self.lora.rank:
            network = read_base(self.index, "float32")
        elif self.base != "float32":
            made = PretrainedNetwork(self.index.folder, self.lora)
            state = self.state_dict()
            made.load_state_dict({name: state[name] for name in made.state_dict()})
            network = made.network
        return network

    def export(self, folder: str | Path, process: Process) -> None:
        """Write the network to a run's folder in the format of diffusers.

        Of all weights it is the folder pipeline/; of an adapter it is
        pytorch_lora_weights.safetensors, of a new word learned_embeds.safetensors, both with the
        folder scheduler/.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.
        """
        folder = Path(folder)
        scheduler = build_scheduler(self.index.scheduler, process, self.network)
        if self.is_adapter:
            if ADAPTER in self.exported_names:
                self._save_adapter(folder)
            if self.word.word and self.text_encoders is not None:
                learned = self.text_encoders.learned_embeddings()
                write_word(folder / LEARNED_EMBEDDINGS, self.word.word, learned)
            write_folder(folder / "scheduler", scheduler.save_pretrained)
        else:
            parts = {self.index.network_name: self.network, "scheduler": scheduler}
            write_folder(folder / "pipeline", lambda path: write_pipeline(path, self.index, parts))

    def _save_adapter(self, run: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        name, arguments = self.index.network_name, {}
        if self.lora.rank:
            arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(self.network)
            # Without the metadata diffusers takes the rank for alpha.
            config = self.lora.written_config(self.network)
            arguments[f"{name}_lora_adapter_metadata"] = config
        if self.text_encoders is not None:
            arguments |= self.text_encoders.adapter_arguments()
        with TemporaryDirectory() as folder:
            self.index.pipeline_class.save_lora_weights(folder, **arguments)
            write_file(run / ADAPTER, Path(folder, ADAPTER).read_bytes())


def _count_trained(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def _check_variance(variance: VarianceType, config: Any, pipeline: str | Path) -> None:
    """Raise ValueError if a variance is learned that the network does not output."""
    if variance == "learned" and config.out_channels != 2 * config.in_channels:
        channels = f"{config.in_channels} input and {config.out_channels} output channels"
        raise ValueError(
            f"variance is learned, but the network in {pipeline} has {channels}, and so outputs no "
            "variance: leave process.variance out"
        )
