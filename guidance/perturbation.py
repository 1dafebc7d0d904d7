"""References from the same network with altered layers: identity attention maps, or skipped layers.

A hook on each named layer replaces its output during the call, and is removed afterwards, also if
the call fails. It acts in the thread that makes the call alone, so that several threads can
evaluate one network. A network that is compiled (`torch.compile`) is evaluated without compilation
while its layers are altered, since compiled code does not see new hooks.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffcore.caches.integration import no_integration
from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.network import unwrap
from diffcore.core.prediction import Prediction
from diffcore.guidance.reference import Query, Reference
from diffcore.schedules import Level

__all__ = ["AlteredNetwork", "PerturbedAttention", "SkippedLayers"]

_HOOKS = threading.Lock()
"""Held while hooks are added or removed: torch numbers them by a counter without a lock."""
_EAGER = threading.RLock()
"""Held while a compiled network is evaluated without compilation, which is a global setting."""


@dataclass(frozen=True)
class AlteredNetwork(Reference):
    """The same network with altered layers, under the same condition.

    It needs neither a condition nor condition dropout.

    Args:
        layers: names of modules as `named_modules` lists them; * and ? match any characters.
    """

    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers is empty, expected names of modules, such as mid_block.*")

    def query(
        self, denoiser: DenoiserProtocol, condition: BatchCondition | None, x: Tensor
    ) -> Query:
        return Query(_AlteredDenoiser(denoiser, self), condition)

    @contextmanager
    def apply(self, network: nn.Module) -> Iterator[None]:
        """Alter the network for this thread within a `with` block, and restore it afterwards.

        It is restored after an error too.

        Args:
            network: the network, which may be wrapped by `torch.compile` or
                DistributedDataParallel; the names of layers are those of the network inside.

        Yields:
            None, while the network is altered.

        Raises:
            ValueError: no layer that can be altered has one of the names, or the network is
                evaluated by the threads of DataParallel.
        """
        if any(isinstance(module, nn.DataParallel) for module in network.modules()):
            raise ValueError(
                f"{self} does not reach the replicas of DataParallel: pass its module, or use "
                f"DistributedDataParallel"
            )
        with ExitStack() as stack:
            if _is_compiled(network):
                stack.enter_context(_EAGER)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._select(unwrap(network)):
                with _HOOKS:
                    hook = module.register_forward_hook(self._hook(), with_kwargs=True)
                stack.callback(_remove, hook)
            yield

    def _select(self, network: nn.Module) -> list[nn.Module]:
        """The layers with one of the names.

        Raises:
            ValueError: there is none that can be altered.
        """
        candidates = {
            name: module
            for name, module in network.named_modules()
            if name and self.can_alter(module)
        }
        selected = [
            module
            for name, module in candidates.items()
            if any(fnmatchcase(name, pattern) for pattern in self.layers)
        ]
        if not selected:
            examples = (
                ", ".join(list(candidates)[:8])
                or "none, so use another reference (Unconditional, WeakerNetwork)"
            )
            raise ValueError(
                f"{self} finds no such layer in {type(network).__name__}; it could alter {examples}"
            )
        return selected

    def _hook(self) -> Callable[..., Any]:
        """A forward hook that alters the output of a layer in this thread."""
        owner = threading.get_ident()

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            if threading.get_ident() != owner:
                return None  # `rest` may then lack the keyword arguments, if the hook is removed
            kwargs, output = rest
            return self.alter(module, args, kwargs, output)

        return hook

    @abstractmethod
    def can_alter(self, module: nn.Module) -> bool:
        """Whether this layer can be altered in this way."""

    @abstractmethod
    def alter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of an altered layer.

        Args:
            module: the layer.
            args: positional arguments of its forward.
            kwargs: keyword arguments of its forward.
            output: output of the layer itself.

        Returns:
            The value that replaces `output`.
        """


@dataclass(frozen=True)
class PerturbedAttention(AlteredNetwork):
    """Perturbed attention replaces the self-attention map by the identity.

        softmax(Q Kᵀ/√d) V   becomes   V

    Source: Ahn et al. 2024 (2403.17377, eq. 14), for the attention layers of diffusers.
    CFG(1 + s, PerturbedAttention()) is the paper's D + s (D - D_perturbed).

    Args:
        layers: names of modules; * and ? match any characters. The default is the paper's, the
            middle block of a U-Net; name the layers of a transformer, such as
            transformer_blocks.12.*.
    """

    layers: tuple[str, ...] = ("mid_block.*",)

    def can_alter(self, module: nn.Module) -> bool:
        is_attention = all(
            hasattr(module, name)
            for name in ("set_processor", "to_q", "to_v", "to_out", "residual_connection")
        )
        return (
            is_attention
            and not getattr(module, "is_cross_attention", False)
            and not any(
                getattr(module, name, None) is not None for name in ("add_k_proj", "spatial_norm")
            )
        )

    def alter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return _identity_attention(module, args[0] if args else kwargs["hidden_states"])


@dataclass(frozen=True)
class SkippedLayers(AlteredNetwork):
    """Skipped layers return their input: skip-layer guidance.

    The layers must keep the shape, as attention layers and transformer blocks do.

    Args:
        layers: names of modules, such as transformer_blocks.7; * and ? match any characters.
    """

    def can_alter(self, module: nn.Module) -> bool:
        return not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    def alter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, Tensor):
            return _ordered_like(output, hidden, kwargs.get("encoder_hidden_states"), module)
        if hidden.shape != output.shape:
            raise ValueError(
                f"a layer {type(module).__name__} maps {tuple(hidden.shape)} to "
                f"{tuple(output.shape)}, so it cannot be skipped: name layers that keep the shape"
            )
        return hidden


class _AlteredDenoiser(DenoiserWrapper):
    """A denoiser whose network is altered during each evaluation.

    Two of them with one denoiser and one alteration are equal, so that their evaluations can share
    a call.
    """

    def __init__(self, denoiser: DenoiserProtocol, alteration: AlteredNetwork) -> None:
        super().__init__(denoiser)
        self.alteration = alteration

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AlteredDenoiser) and (self.inner, self.alteration) == (
            other.inner,
            other.alteration,
        )

    def __hash__(self) -> int:
        return hash((self.inner, self.alteration))

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        if (network := self.network) is None:
            raise ValueError(
                f"{self.alteration} needs a network with layers: use Unconditional, Label or "
                f"WeakerNetwork"
            )
        with self.alteration.apply(network), no_integration():
            return self.inner(x, level, condition)


def _is_compiled(network: nn.Module) -> bool:
    """Whether `torch.compile`, or the method `compile`, was applied to the network or a layer."""
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in network.modules()
    )


def _remove(hook: Any) -> None:
    with _HOOKS:
        hook.remove()


def _identity_attention(attention: Any, hidden_states: Tensor) -> Tensor:
    """The output of an attention layer whose map is the identity: the values, projected."""
    is_image = hidden_states.ndim == 4
    tokens = rearrange(hidden_states, "b c h w -> b (h w) c") if is_image else hidden_states
    if attention.group_norm is not None:
        tokens = attention.group_norm(tokens.mT).mT
    out = attention.to_v(tokens)
    for layer in attention.to_out:
        out = layer(out)
    if is_image:
        out = rearrange(out, "b (h w) c -> b c h w", h=hidden_states.shape[2])
    if attention.residual_connection:
        out = out + hidden_states
    return out / attention.rescale_output_factor


def _ordered_like(output: Any, hidden: Tensor, encoder: Any, module: nn.Module) -> tuple[Any, ...]:
    """The two inputs of a joint block in the order of its outputs, which the shapes identify.

    Most blocks return (encoder_hidden_states, hidden_states), those of CogVideoX the reverse.
    """
    if isinstance(output, tuple) and len(output) == 2 and encoder is not None:
        for pair in ((encoder, hidden), (hidden, encoder)):
            if [value.shape for value in pair] == [value.shape for value in output]:
                return pair
    raise ValueError(
        f"a layer {type(module).__name__} returns {type(output).__name__}, so it cannot be "
        "skipped: name layers that return a tensor"
    )
