"""The networks that an objective trains beside that of the run, each with its own optimizer.

In each step of the run, network after network is updated `updates` times on the samples of the
step; then the run's own network. Random numbers are keyed by step, network and update.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import leave_label_dropout
from diffcore.core.random import Stream, derive_seed
from diffcore.objectives.networks import Networks, RunningStatistics, TrainedNetwork
from diffcore.training.data.order import Batch
from diffcore.training.network_checks import check_dtype, check_trained
from diffcore.training.optimization.gradients import frozen, take_step
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.optimization.optimizers import (
    AveragingOptimizer,
    build_optimizer,
    set_learning_rate,
)
from diffcore.training.ranks.sharding import Sharding, place

if TYPE_CHECKING:
    from diffcore.training.state import TrainState
    from diffcore.training.trainer import Trainer

__all__ = [
    "FurtherNetwork",
    "build_further_networks",
    "build_networks",
    "discard_statistics",
    "train_further_networks",
    "update_statistics",
]

RESERVED = ("model", "ema", "training")
"""Names of other files of a checkpoint."""
SCALARS = 2
"""Numbers of each network in a step: its mean loss and its gradient norm."""


@dataclass
class FurtherNetwork:
    """A network that is trained beside that of the run, on one rank.

    Args:
        modules: the network as accelerate wrapped it, as a list of one.
        optimizer: accelerate's optimizer.
        lr: learning rate as a function of the step and of the number of steps of the run.
        updates: number of updates in a step of the run.
        networks: networks of the objective, with this one as it is wrapped.
    """

    modules: nn.ModuleList
    optimizer: Any
    lr: Callable[[int, int], float]
    updates: int
    networks: Networks


def build_networks(settings: "Trainer", denoiser: Denoiser, device: torch.device) -> Networks:
    """Build the networks of the objective beside that of the run.

    Args:
        settings: settings of the run.
        denoiser: network of the run with its initial weights.
        device: device of the run.

    Returns:
        The networks, computed as the settings of the run say.

    Raises:
        ValueError: a network has a reserved name or weights in half precision, or does not fit the
            objective.
    """
    torch.manual_seed(derive_seed(settings.seed, Stream.NETWORK, 0))
    wrapper = settings.source.label_wrapper(device)
    networks = settings.objective.networks(denoiser, device, wrapper)
    for name, trained in networks.trained.items():
        if name in RESERVED or not name.isidentifier():
            raise ValueError(
                f"a further network is named {name!r}, expected an identifier other than "
                f"{', '.join(RESERVED)}, which are other files of a checkpoint"
            )
        check_trained(trained.module, f"the further network {name}")
        leave_label_dropout(trained.module)
        check_dtype(trained.module)
        settings.compute.fitting(trained.module).apply(trained.module)
    held_out = settings.validation.source
    if held_out is not None and held_out.texts and (networks.teacher or networks.trained):
        raise ValueError(
            "validation.data has captions, and the further networks of the objective are "
            "conditioned on those of the training data: leave validation.data out"
        )
    return replace(networks, label_wrapper=wrapper)


def build_further_networks(
    settings: "Trainer", accelerator: Accelerator, networks: Networks
) -> dict[str, FurtherNetwork]:
    """Wrap the further networks of an objective for the ranks, and build their optimizers.

    Args:
        settings: settings of the run.
        accelerator: accelerator of this rank.
        networks: result of `build_networks`.

    Returns:
        The networks by name, in the order of their updates.

    Raises:
        ValueError: an optimizer averages its weights, or its state cannot be sharded; or gathered
            parameters are kept.
    """
    mesh = settings.sharding.mesh(accelerator.num_processes, "cpu") if networks.trained else None
    if mesh is not None and not settings.sharding.reshard:
        raise ValueError(
            "sharding.reshard is false, but the objective trains further networks "
            f"({', '.join(networks.trained)}), of which one is evaluated without gradients while "
            "another is updated, and its gathered parameters would keep this: leave reshard true"
        )
    found = {}
    for name, trained in networks.trained.items():
        (module,), optimizer, lr = _prepare(settings, accelerator, name, trained)
        own = {**networks.trained, name: replace(trained, module=module)}
        found[name] = FurtherNetwork(
            nn.ModuleList([module.train()]),
            optimizer,
            lr,
            trained.updates,
            replace(networks, trained=own),
        )
    return found


def _prepare(
    settings: "Trainer", accelerator: Accelerator, name: str, trained: TrainedNetwork
) -> tuple[list[nn.Module], Any, Callable[[int, int], float]]:
    """The module and the optimizer of a network as accelerate wraps them, and its learning rate."""
    lr, modules = trained.lr or settings.lr, [trained.module]
    first = lr if isinstance(lr, LearningRate) else LearningRate(lr(0, settings.steps), warmup=0)

    def build(modules: Sequence[nn.Module]) -> torch.optim.Optimizer:
        optimizer = build_optimizer(
            trained.optimizer or settings.optimizer,
            modules,
            first,
            trained.optimizer is None and settings.decay_only_matrices,
        )
        if isinstance(optimizer, AveragingOptimizer):
            raise ValueError(
                f"the optimizer of the further network {name} is {type(optimizer).__name__}, which "
                "evaluates networks with other weights than it trains: use torch.optim.AdamW"
            )
        return optimizer

    # FSDP2 frees gathered parameters in the first backward pass, and a second one reads them.
    sharding = Sharding() if trained.has_second_derivatives else settings.sharding
    wrapped, prepared = place(sharding, accelerator, modules, build)
    return wrapped, prepared, lr


def train_further_networks(state: "TrainState", batches: list[Batch]) -> list[Tensor]:
    """Update every further network in a step of the run.

    Args:
        state: state of the run; its further networks are changed in place.
        batches: micro-batches of the step on this rank.

    Returns:
        For each network, () mean loss of this rank and () gradient norm, means over its updates.
    """
    scalars: list[Tensor] = []
    for name, network in state.further.items():
        lr = network.lr(state.step, state.settings.steps)
        set_learning_rate(network.optimizer.optimizer, lr)
        with frozen([state.modules, *state.further_modules(name)]):
            measured = [_update(state, name, update, batches) for update in range(network.updates)]
        scalars += torch.stack(measured).mean(0).unbind()
    return scalars


def _update(state: "TrainState", name: str, update: int, batches: list[Batch]) -> Tensor:
    """Update a network once; its mean loss and its gradient norm, of shape (2,)."""
    network = state.further[name]
    seed = derive_seed(state.settings.seed, Stream.NETWORK, (crc32(name.encode()) << 16) + update)
    losses, norm = take_step(
        state.accelerator,
        network.modules,
        network.optimizer,
        batches,
        partial(_losses, state, name, seed),
        state.settings.clip,
    )
    return torch.stack((losses.float().mean(), norm.detach().float()))


def _losses(state: "TrainState", name: str, seed: int, part: int, batch: Batch) -> Tensor:
    """The losses (B,) of a network in a micro-batch."""
    torch.manual_seed(state.network_seed(part, seed))
    return state.network_losses(name, batch, seed)


def update_statistics(accelerator: Accelerator, further: Mapping[str, FurtherNetwork]) -> None:
    """Update the running statistics of the networks after a step. Every rank must call it.

    Args:
        accelerator: accelerator of this rank.
        further: networks of the run by name.
    """
    for statistics in _statistics(further):
        if (sums := statistics.take()) is not None:
            statistics.update(accelerator.reduce(sums, "sum"))


def discard_statistics(further: Mapping[str, FurtherNetwork]) -> None:
    """Forget what losses have recorded since the last update of the running statistics.

    Args:
        further: networks of the run by name.
    """
    for statistics in _statistics(further):
        statistics.take()


def _statistics(further: Mapping[str, FurtherNetwork]) -> list[RunningStatistics]:
    modules = [each for network in further.values() for each in network.modules.modules()]
    return [each for each in modules if isinstance(each, RunningStatistics)]
