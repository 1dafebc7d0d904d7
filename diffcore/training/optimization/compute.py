"""How the network is computed in training: compiled, with less memory, in another memory format.

These settings change the speed, the memory and the rounding of a run, and nothing else: a run may
change them when it resumes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffcore.core.network import class_name, find_blocks

__all__ = ["Compilation", "Compute"]

Compilation = Literal["no", "network", "blocks"]


@dataclass(frozen=True)
class Compute:
    """Compilation, activation checkpointing and memory format of the network in training.

    Previews and the held-out loss evaluate the network without its compilation, because they use
    other batch sizes, each of which would be compiled anew.

    Args:
        compile: what torch.compile compiles: no (nothing), network (the whole network), or blocks
            (each block of it, which takes less time to compile). Parameters keep their names.
        backend: backend of torch.compile; inductor generates code for the device.
        fullgraph: true ends the run with an error if the network cannot be compiled into one graph;
            false interrupts the compiled code where Python is needed.
        checkpointing: true stores only the input of each block for the backward pass, which
            evaluates the blocks a second time: less memory, about a third more time. A network of
            diffusers uses its own implementation.
        channels_last: true stores the weights of two-dimensional convolutions channel by channel,
            in which format GPUs with tensor cores evaluate them faster.

    Raises:
        ValueError: `compile` is not one of the three values.
    """

    compile: Compilation = "no"
    backend: str = "inductor"
    fullgraph: bool = True
    checkpointing: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.compile not in get_args(Compilation):
            raise ValueError(
                f"compute.compile is {self.compile!r}, expected one of "
                f"{', '.join(get_args(Compilation))}"
            )

    def apply(self, network: nn.Module) -> None:
        """Change the network in place. It must not be wrapped or sharded yet.

        Args:
            network: network in training; its parameters stay the same objects with the same names.

        Raises:
            ValueError: The network has no blocks or no convolution, its blocks cannot be evaluated
                twice, or the backend is unknown.
        """
        if self.channels_last:
            _store_channels_last(network)
        if self.checkpointing:
            _checkpoint_activations(network)
        if self.compile != "no":
            self._compile(network)

    def fitting(self, network: nn.Module) -> "Compute":
        """The settings for a further network, without those that it has no blocks or weights for.

        Args:
            network: network that is trained beside that of the run.

        Returns:
            The settings, which `apply` accepts for the network.
        """
        has_blocks = bool(find_blocks(network))
        has_images = any(value.ndim == 4 for value in network.parameters())
        return replace(
            self,
            compile="no" if self.compile == "blocks" and not has_blocks else self.compile,
            checkpointing=self.checkpointing and has_blocks,
            channels_last=self.channels_last and has_images,
        )

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Context in which a compiled network is evaluated as if it were not compiled."""
        if self.compile == "no":
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Context in which an error of the compiler names the settings that avoid it.

        Yields:
            Nothing.

        Raises:
            ValueError: The network cannot be compiled.
        """
        try:
            yield
        except RuntimeError as error:
            is_of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if self.compile == "no" or not is_of_compiler:  # an optimizer may compile its step
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"compute.compile is {self.compile} with the backend {self.backend}, and the "
                f"network cannot be compiled ({type(error).__name__}: {reason}): set "
                "compute.fullgraph: false, which allows several graphs, or compute.compile: no"
            ) from error

    def _compile(self, network: nn.Module) -> None:
        if self.backend not in (known := torch.compiler.list_backends(())):
            raise ValueError(
                f"compute.backend is {self.backend!r}, expected one of {', '.join(known)}"
            )
        modules = [network] if self.compile == "network" else _blocks(network, "compile")
        for module in modules:
            if type(module).__module__.startswith("torch."):  # whose frames dynamo does not compile
                module.forward = partial(_evaluate, module.forward)
            module.compile(backend=self.backend, fullgraph=self.fullgraph)


def _blocks(network: nn.Module, setting: str) -> list[nn.Module]:
    """The blocks of a network, of which a setting needs at least one."""
    blocks = list(find_blocks(network).values())
    if not blocks:
        alternative = "network" if setting == "compile" else "false"
        raise ValueError(
            f"compute.{setting} needs the blocks of the network, and {class_name(network)} has no "
            f"nn.ModuleList or nn.Sequential: hold its blocks in one, or set compute.{setting}: "
            f"{alternative}"
        )
    return blocks


def _store_channels_last(network: nn.Module) -> None:
    if not any(value.ndim == 4 for value in network.parameters()):
        raise ValueError(
            f"compute.channels_last concerns two-dimensional convolutions, and "
            f"{class_name(network)} has none: set compute.channels_last: false"
        )
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _checkpoint_activations(network: nn.Module) -> None:
    """Let the blocks be evaluated again in the backward pass, with the same random numbers."""
    models = [
        module
        for module in network.modules()
        if getattr(module, "_supports_gradient_checkpointing", False)
    ]
    blocks = [] if models else _blocks(network, "checkpointing")
    _check_statistics(models or blocks)
    for model in models:
        model.enable_gradient_checkpointing()  # type: ignore[operator]  # a ModelMixin
    for block in blocks:
        block.forward = partial(_recompute, block.forward)


def _check_statistics(modules: list[nn.Module]) -> None:
    """Refuse running statistics, which a second evaluation would update a second time."""
    for module in modules:
        for name, layer in module.named_modules():
            if getattr(layer, "running_mean", None) is not None:
                raise ValueError(
                    f"compute.checkpointing evaluates blocks twice, but {type(layer).__name__} "
                    f"({name}) would update its running statistics twice: use nn.GroupNorm, or "
                    "set compute.checkpointing: false"
                )


def _evaluate(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluate a block of torch in a frame of its own, which dynamo compiles."""
    return forward(*args, **kwargs)


def _recompute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluate a block, and keep only its inputs for the backward pass if there will be one."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
