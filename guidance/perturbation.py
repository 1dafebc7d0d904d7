"""The same network, altered, as the reference: self-attention replaced by the identity, or layers skipped.

Both alter diffusers' networks in place for one call and restore them, also where the call fails. A network that is shared by
threads must not be asked elsewhere meanwhile.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from diffcore.core.denoiser import Denoise
from diffcore.core.prediction import Prediction
from diffcore.guidance.reference import Query, Reference
from diffcore.schedules import Level


@dataclass(frozen=True)
class Altered(Reference):
    """The same network with some of its layers altered, under the same condition. It needs no condition and no dropout.

    Args:
        layers: names of modules as `named_modules` has them, * and ? standing for anything.
    """

    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers is empty, expected names of modules, such as mid_block.*")

    def query(self, denoiser: Denoise, condition: Tensor | None, x: Tensor) -> Query:
        return Query(_AlteredDenoiser(denoiser, self), condition)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The network is altered within, and as it was afterwards, whatever happens.

        Raises:
            ValueError: no layer that can be altered so has one of the names.
        """
        able = {
            name: module
            for name, module in network.named_modules()
            if name and self.can_alter(module)
        }
        chosen = [
            m
            for name, m in able.items()
            if any(fnmatchcase(name, pattern) for pattern in self.layers)
        ]
        if not chosen:
            some = (
                ", ".join(list(able)[:8])
                or "none, so take another reference (Unconditional, Weaker)"
            )
            raise ValueError(
                f"{self} finds no such layer in {type(network).__name__}; it could alter {some}"
            )
        with ExitStack() as restored:
            for module in chosen:
                restored.callback(self.alter(module))
            yield

    @abstractmethod
    def can_alter(self, module: nn.Module) -> bool:
        """Whether this layer can be altered so."""

    @abstractmethod
    def alter(self, module: nn.Module) -> Callable[[], Any]:
        """Alter the layer; what is returned restores it."""


@dataclass(frozen=True)
class PerturbedAttention(Altered):
    """softmax(Q Kᵀ/√d) V becomes V in self-attention: Ahn et al. 2024 (2403.17377, eq. 14), for diffusers' attention layers.

    With CFG(1 + s, PerturbedAttention()) it is the paper's D + s (D - D_perturbed).

    Args:
        layers: names of modules, * and ? standing for anything; the paper has the middle block, transformers need theirs
            named (transformer_blocks.12.*).
    """

    layers: tuple[str, ...] = ("mid_block.*",)

    def can_alter(self, module: nn.Module) -> bool:
        ours = all(
            hasattr(module, name)
            for name in ("set_processor", "to_q", "to_v", "to_out", "residual_connection")
        )
        return (
            ours
            and not getattr(module, "is_cross_attention", False)
            and not any(
                getattr(module, name, None) is not None for name in ("add_k_proj", "spatial_norm")
            )
        )

    def alter(self, module: Any) -> Callable[[], Any]:
        before = module.processor
        module.set_processor(_identity)
        return lambda: module.set_processor(before)


@dataclass(frozen=True)
class SkippedLayers(Altered):
    """Layers answer with their input: skip-layer guidance. They must keep the shape (attention, transformer blocks).

    Args:
        layers: names of modules, * and ? standing for anything, such as transformer_blocks.7.
    """

    def can_alter(self, module: nn.Module) -> bool:
        return not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    def alter(self, module: nn.Module) -> Callable[[], Any]:
        return module.register_forward_hook(_input, with_kwargs=True).remove


class _AlteredDenoiser:
    """A denoiser whose network is altered while it is asked."""

    def __init__(self, denoiser: Denoise, alteration: Altered) -> None:
        self.denoiser, self.alteration, self.process = denoiser, alteration, denoiser.process

    def __call__(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        network = getattr(self.denoiser, "network", None)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"{self.alteration} needs a network with layers: use Unconditional, Label or Weaker"
            )
        with self.alteration.applied(network):
            return self.denoiser(x, level, condition)


def _identity(attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A diffusers attention processor whose attention map is the identity: the values, projected."""
    tokens = (
        rearrange(hidden_states, "b c h w -> b (h w) c")
        if hidden_states.ndim == 4
        else hidden_states
    )
    if attention.group_norm is not None:
        tokens = attention.group_norm(tokens.mT).mT
    out = attention.to_v(tokens)
    for layer in attention.to_out:
        out = layer(out)
    if hidden_states.ndim == 4:
        out = rearrange(out, "b (h w) c -> b c h w", h=hidden_states.shape[2])
    if attention.residual_connection:
        out = out + hidden_states
    return out / attention.rescale_output_factor


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the input in place of the output."""
    first = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, Tensor):
        if first.shape != output.shape:
            raise ValueError(
                f"a layer {type(module).__name__} makes {tuple(output.shape)} of {tuple(first.shape)}, so it cannot be "
                f"skipped: name layers that keep the shape"
            )
        return first
    return _like(output, first, kwargs.get("encoder_hidden_states"), module)


def _like(output: Any, hidden: Tensor, encoder: Any, module: nn.Module) -> tuple[Any, ...]:
    """Joint blocks answer (encoder_hidden_states, hidden_states) or, as CogVideoX's, the other way round: told by shape."""
    if isinstance(output, tuple) and len(output) == 2 and encoder is not None:
        for pair in ((encoder, hidden), (hidden, encoder)):
            if [value.shape for value in pair] == [value.shape for value in output]:
                return pair
    raise ValueError(
        f"a layer {type(module).__name__} answers {type(output).__name__}, so it cannot be skipped"
    )
