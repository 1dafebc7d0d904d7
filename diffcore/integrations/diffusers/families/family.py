"""The record of a diffusers model family: the facts and functions that differ between families."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffcore.core.conditions import ConditionRecord
from diffcore.core.network import class_name, network_config
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process

__all__ = [
    "ClassCondition",
    "Config",
    "ExportTarget",
    "GuidanceBatching",
    "ModelFamily",
    "TextCondition",
    "config_shape",
]

Config = Mapping[str, Any]
GuidanceBatching = Literal["negative first", "condition first", "separate calls"]
"""How a pipeline evaluates the network for classifier-free guidance.

"negative first", "condition first": one call on 2B samples, of which the first B are these.
"separate calls": two calls on B samples, with the condition first."""


class TextCondition(ABC):
    """How a family encodes a prompt into keyword arguments of its network.

    A dot in an argument's name leads into a dictionary: `added_cond_kwargs.time_ids`.
    """

    optional_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders of the pipeline that may be missing."""
    summary: ClassVar[str] = "text"
    """What the network is conditioned on, for messages."""
    trained_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that can be trained together with the network, by `encode_tokens`."""
    has_frozen_encoders: ClassVar[bool] = False
    """Whether a pipeline of the family has further text encoders, which are not trained."""
    unsupported_config: ClassVar[Mapping[str, str]] = {}
    """Keys that the network's config must not set -> why a network that does is refused."""

    def check_pipeline(self, pipeline: Any) -> None:
        """Raise ValueError if prompts of this pipeline cannot be encoded; by default they can."""
        return

    @abstractmethod
    def encode(self, pipeline: Any, text: str, is_null: bool) -> dict[str, Tensor]:
        """Encode one prompt.

        Args:
            pipeline: pipeline of the family, with its text encoders.
            text: the prompt.
            is_null: whether the text is the negative prompt, which a family may encode in another
                way than a prompt.

        Returns:
            Argument of the network's forward -> value (1, ...).
        """

    def frozen_states(self, pipeline: Any, encoded: Mapping[str, Tensor]) -> Tensor | None:
        """The part of an encoded prompt that comes from text encoders that are not trained.

        Args:
            pipeline: pipeline of the family, with its text encoders.
            encoded: result of `encode`.

        Returns:
            (1, L, D) states; None, the default, if every text encoder can be trained.
        """
        return None

    def encode_tokens(
        self,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tensor],
        frozen: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a batch of tokenised prompts as `encode` encodes prompts, with gradients.

        Args:
            encoders: the text encoders of `trained_encoders`.
            tokens: (B, L) token ids for each of them.
            frozen: (B, L, D) states of the other text encoders (`frozen_states`), if there are any.

        Returns:
            Argument of the network's forward -> value (B, ...).

        Raises:
            ValueError: the text encoders of the family are not trained.
        """
        raise ValueError(
            f"the text encoders of a network conditioned on {self.summary} are not trained: train "
            "a network of Stable Diffusion or Flux, or leave text_lora and word out"
        )

    def unread_layers(self, name: str, encoder: nn.Module) -> tuple[str, ...]:
        """Names of the modules of a text encoder that no argument of the network depends on.

        Args:
            name: name of the text encoder in the pipeline.
            encoder: the text encoder.

        Returns:
            The names, such as encoder.layers.11; by default none.
        """
        return ()

    def shared_arguments(
        self, network: nn.Module, size: tuple[int, int], guidance_scale: float
    ) -> dict[str, Tensor]:
        """The arguments that are equal for all prompts.

        Args:
            network: a network of the family.
            size: height and width of the images in pixels.
            guidance_scale: scale that a guidance-distilled network takes as an input.

        Returns:
            Argument of the network's forward -> value without the batch dimension. By default those
            of an image of this size that was neither scaled nor cropped.
        """
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        return {name: value[0] for name, value in self.size_arguments(network, sizes).items()}

    def size_arguments(self, network: nn.Module, sizes: Tensor) -> dict[str, Tensor]:
        """The arguments by which the network receives the sizes of each image.

        Args:
            network: a network of the family.
            sizes: (B, 6) float32, in pixels: original height and width, top and left of the crop,
                target height and width (`Crop.sizes`).

        Returns:
            Argument of the network's forward -> value (B, ...); {} if it receives no sizes.
        """
        return {}

    def check(self, network: nn.Module) -> None:
        """Check that text is all that conditions the network.

        Args:
            network: a network of the family.

        Raises:
            ValueError: the config has another condition, or image channels beside x.
        """
        config = network_config(network)
        for key, reason in self.unsupported_config.items():
            if config.get(key):
                raise _unsupported(network, f"has {key} {config[key]!r}: {reason}")
        inputs = config["in_channels"]
        outputs = config.get("out_channels") or inputs
        if outputs not in (inputs, 2 * inputs):
            raise _unsupported(
                network,
                f"has {inputs} input and {outputs} output channels: "
                f"it is conditioned on an image beside x",
            )


@dataclass(frozen=True)
class ClassCondition:
    """How a family's network is conditioned on class labels.

    Args:
        class_count: function (config, given fields of the Process) -> number of classes, or None
            if the network's config does not determine it. It raises ValueError if it is neither
            determined nor given.
        null_label: label that the family's pipeline uses for "no class"; None: it has no pipeline
            with guidance.
    """

    class_count: Callable[[Config, Config], int | None]
    null_label: int | None = None
    summary: ClassVar[str] = "class labels: the sub-folders of the images, in their order"


@dataclass(frozen=True)
class ExportTarget:
    """A pipeline of diffusers that samples the family's network without diffcore.

    Args:
        build: function (network, process, scheduler, vae) -> the pipeline. It raises ValueError
            with the reason if no pipeline of diffusers expresses the process.
        call_arguments: function (number of samples, class labels or None) -> keyword
            arguments of a call without guidance.
    """

    build: Callable[[nn.Module, Process, Any, nn.Module | None], Any]
    call_arguments: Callable[[int, list[int] | None], dict[str, Any]]


def _unwrapped(network: nn.Module) -> nn.Module:
    """A network that needs no wrapper.

    Args:
        network: the network.

    Returns:
        The network itself.
    """
    return network


def _no_conditions(config: Config) -> dict[str, ConditionRecord]:
    """No named conditions."""
    return {}


def config_shape(config: Config) -> tuple[int, ...] | None:
    """Shape (C, H, W) of one x_0 by `in_channels` and `sample_size` of a network's config.

    Args:
        config: the network's config.

    Returns:
        The shape, or None if the config does not contain both.
    """
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        return None
    return (channels, *((size, size) if isinstance(size, int) else size))


@dataclass(frozen=True)
class ModelFamily:
    """What diffcore knows about one model family of diffusers.

    Numbers that differ between the networks of one family are given as the key of the network's
    config that holds them.

    Args:
        name: name in messages and documents.
        network: name of the network's class; subclasses belong to the family too.
        pipelines: names of the pipeline classes whose guidance `attach` replaces.
        config: values of the network's config that select this record among those of one class.
        guidance_batching: how these pipelines evaluate the network for guidance.
        guidance_argument: argument of the pipeline's call that is the scale of classifier-free
            guidance.
        condition: what the network is conditioned on beside the noise level; None: nothing.
        dropout: share of training samples without condition that is assumed where the config does
            not determine it; 0 for networks that were distilled from a guided one.
        prediction: the one prediction type of the networks; None: the scheduler's config decides.
        time_factor: factor between the scheduler's timestep and the network's time input; 1 for
            networks of a table of timesteps. A config key that is absent means 1.
        patch_size: width of the patch of x that is one token, from which a pipeline computes the
            token count of dynamic shifting; a config key that is absent means no tokens.
        sample_shape: function (config) -> shape (C, H, W) of one x_0, or None if the config does
            not determine it. Default: `config_shape`.
        wrap: function (network) -> module with forward (x, timestep, **condition) -> output of
            the shape of x, or with a variance in channels C to 2C. Default: the network itself.
        named_conditions: function (config) -> the named conditions of the network.
        export_target: how a trained network is exported to a pipeline that needs no diffcore;
            None: it is not.
        recipes: names of the recipes of `diffcore train` that are made for the family; the first
            one is that of `diffcore train finetune`.

    Example:
        >>> family = ModelFamily("Toy", "ToyTransformer", ("ToyPipeline",), patch_size=2)
        >>> family.has_text
        False
    """

    name: str
    network: str
    pipelines: tuple[str, ...] = ()
    config: Config = field(default_factory=dict)
    guidance_batching: GuidanceBatching = "negative first"
    guidance_argument: str = "guidance_scale"
    condition: TextCondition | ClassCondition | None = None
    dropout: float = 0.1
    prediction: PredictionType | None = None
    time_factor: float | str = 1.0
    patch_size: int | str = "patch_size"
    sample_shape: Callable[[Config], tuple[int, ...] | None] = config_shape
    wrap: Callable[[nn.Module], nn.Module] = _unwrapped
    named_conditions: Callable[[Config], dict[str, ConditionRecord]] = _no_conditions
    export_target: ExportTarget | None = None
    recipes: tuple[str, ...] = ()

    @property
    def has_text(self) -> bool:
        """Whether the networks are conditioned on text."""
        return isinstance(self.condition, TextCondition)

    @property
    def null_label(self) -> int | None:
        """Label for "no class" in the family's pipelines, or None."""
        return self.condition.null_label if isinstance(self.condition, ClassCondition) else None

    def is_text_conditioned(self, network: nn.Module) -> bool:
        """Whether a network of the family is conditioned on text.

        Args:
            network: a network of the family.

        Returns:
            True for text, False for class labels or no condition.

        Raises:
            ValueError: text is not its only condition.
        """
        if isinstance(self.condition, TextCondition):
            self.condition.check(network)
        return self.has_text

    def shape(self, network: nn.Module) -> tuple[int, ...] | None:
        """Shape (C, H, W) of one x_0, or None if the network's config does not determine it."""
        return self.sample_shape(network_config(network))

    def token_count(self, network: nn.Module, shape: tuple[int, ...]) -> int | None:
        """Number of tokens of x, or None if the network is not a transformer.

        Args:
            network: a network of the family.
            shape: shape (C, H, W) of x.

        Returns:
            The number from which the family's pipeline computes the shift μ.
        """
        patch = self.patch(network)
        return (shape[-2] // patch) * (shape[-1] // patch) if patch else None

    def patch(self, network: nn.Module) -> int | None:
        """Width of the patch of x that is one token; None if the network is not a transformer."""
        size = self.patch_size
        return network_config(network).get(size) if isinstance(size, str) else size

    def time_scale(self, network: nn.Module) -> float:
        """The number by which a pipeline multiplies a timestep to get the network's time input."""
        factor = self.time_factor
        return float(
            network_config(network).get(factor, 1.0) if isinstance(factor, str) else factor
        )


def _unsupported(network: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{class_name(network)} {reason}. Guide it in its pipeline (attach, or a DiffcoreScheduler)"
    )
