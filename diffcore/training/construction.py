"""The construction of a run's state: accelerator, data, networks and optimizers."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import (
    ExportableNetwork,
    LabelWrapper,
    frozen_hash,
    leave_label_dropout,
)
from diffcore.core.process import Process
from diffcore.core.random import Stream, derive_seed
from diffcore.objectives.networks import Networks
from diffcore.training.averages.averaged_network import copy_network, place_copy
from diffcore.training.averages.ema import EMA
from diffcore.training.averages.power_ema import PowerFunction
from diffcore.training.data.checks import prepare_data
from diffcore.training.data.source import DataSource
from diffcore.training.further_networks import (
    SCALARS as FURTHER_SCALARS,
)
from diffcore.training.further_networks import (
    build_further_networks,
    build_networks,
)
from diffcore.training.network_checks import check_dtype, check_network, check_trained
from diffcore.training.optimization.level_sampler import LevelSampler
from diffcore.training.optimization.optimizers import build_optimizer
from diffcore.training.ranks.accelerator import make_accelerator
from diffcore.training.ranks.coordination import run_on_first_rank
from diffcore.training.ranks.sharding import place
from diffcore.training.reports.noise_scale import MicroBatchNorms
from diffcore.training.reports.reporting import SCALARS
from diffcore.training.reports.window import LossWindow
from diffcore.training.state import TrainState

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["build_accelerator", "build_state"]


def build_accelerator(settings: "Trainer") -> Accelerator:
    """The accelerator of this rank, checked against the settings of a run.

    Args:
        settings: settings of the run.

    Returns:
        The accelerator.

    Raises:
        ValueError: The batch cannot be split, or the launcher contradicts the settings.
    """
    accelerator = make_accelerator(
        settings.precision,
        settings.accumulation,
        settings.trackers,
        settings.run.folder,
        settings.rank_timeout,
    )
    _check_batch(settings, accelerator.num_processes)
    return accelerator


def build_state(settings: "Trainer", accelerator: Accelerator | None = None) -> TrainState:
    """Build everything that trains, on the device of this rank, at step 0.

    Args:
        settings: settings of the run.
        accelerator: result of `build_accelerator(settings)`; by default it is built.

    Returns:
        The state. The initial weights are a function of the seed.

    Raises:
        ValueError: The batch cannot be split, the data cannot be prepared, the network does not
            fit the process, or the launcher contradicts the settings.
    """
    accelerator = accelerator or build_accelerator(settings)
    _prepare_data(accelerator, settings.source, settings.process)
    if held_out := settings.validation.source:
        _prepare_data(accelerator, held_out, settings.validation.process(settings.process))
    label_wrapper = settings.source.label_wrapper(accelerator.device)
    built, networks, copy = _build_modules(settings, label_wrapper, accelerator.device)
    hashes = _content_hashes(settings, built[0], networks)
    modules, optimizer = _prepare(settings, accelerator, built)
    if copy is not None:
        copy = place_copy(settings, accelerator, copy)
        averaged = Denoiser(label_wrapper(copy), settings.process).eval()
        networks = replace(networks, averaged=averaged)
    further = build_further_networks(settings, accelerator, networks)
    network = accelerator.unwrap_model(modules[0])
    group = settings.objective.coupling.group
    split = (settings.accumulation, accelerator.gather, group)
    return TrainState(
        settings,
        accelerator,
        nn.ModuleList(modules),
        optimizer,
        label_wrapper,
        Denoiser(label_wrapper(modules[0]), settings.process).train(),
        EMA(network, settings.ema, copy),
        {length: EMA(network, PowerFunction(length)) for length in settings.snapshots.lengths},
        settings.source.order(
            settings.seed,
            settings.batch_size,
            settings.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        ).keep_together(group),
        LevelSampler(
            settings.objective, settings.process, settings.seed, settings.batch_size, *split
        ),
        LossWindow(*split, SCALARS + FURTHER_SCALARS * len(further)),
        hashes,
        _micro_batch_norms(settings, accelerator, modules),
        networks=networks,
        further=further,
    )


def _micro_batch_norms(
    settings: "Trainer", accelerator: Accelerator, modules: list[nn.Module]
) -> MicroBatchNorms | None:
    ranks, parts = accelerator.num_processes, settings.accumulation
    is_sharded = any(isinstance(module, FSDPModule) for module in modules)
    if ranks * parts == 1 or is_sharded:
        return None
    return MicroBatchNorms(nn.ModuleList(modules).parameters(), parts)


def _prepare_data(accelerator: Accelerator, data: DataSource, process: Process) -> None:
    """Make the data readable on the first rank, then on the others."""
    prepare = partial(prepare_data, data, process, accelerator.device)
    run_on_first_rank(accelerator, partial(prepare, True))
    if not accelerator.is_main_process:
        prepare(False)


def _content_hashes(settings: "Trainer", network: nn.Module, networks: Networks) -> dict[str, str]:
    """Hashes of the data and of all weights that a checkpoint does not hold."""
    hashes = {
        "data": settings.source.content_hash,
        "network": frozen_hash(network),
        "teacher": settings.objective.content_hash,
    }
    hashes |= {name: frozen_hash(each.module) for name, each in networks.trained.items()}
    return {name: value for name, value in hashes.items() if value}


def _check_batch(settings: "Trainer", ranks: int) -> None:
    group = settings.objective.coupling.group
    if settings.batch_size % (ranks * settings.accumulation * group):
        coupling = settings.objective.coupling
        groups = f" x groups of {group}, of {coupling}" if group > 1 else ""
        raise ValueError(
            f"batch_size is {settings.batch_size}, expected a multiple of {ranks} ranks x "
            f"{settings.accumulation} micro-batches{groups}"
        )


def _build_modules(
    settings: "Trainer", label_wrapper: LabelWrapper, device: torch.device
) -> tuple[list[nn.Module], Networks, nn.Module | None]:
    """The network with its initial weights, the uncertainty if there is one, the networks of the
    objective, and the copy for the averaged weights if it needs one.
    """
    torch.manual_seed(derive_seed(settings.seed, Stream.MODEL, 0))
    modules = [settings.network()]
    check_trained(modules[0], "the network")
    leave_label_dropout(modules[0])
    check_dtype(modules[0])
    if isinstance(modules[0], ExportableNetwork):
        modules[0].check_captions(settings.source.texts)
    check_network(modules[0], label_wrapper, settings.process)
    held_out = settings.validation.source
    # Without captions the network is evaluated with the arguments that were just checked.
    if held_out is not None and (held_out.texts or settings.source.texts):
        wrapper = held_out.label_wrapper(torch.device("cpu"))
        check_network(modules[0], wrapper, settings.validation.process(settings.process))
    if settings.objective.uncertainty:
        modules.append(settings.objective.uncertainty.module())
    networks = build_networks(settings, Denoiser(modules[0], settings.process), device)
    copy = copy_network(settings, modules[0])
    settings.compute.apply(modules[0])
    return modules, networks, copy


def _prepare(
    settings: "Trainer", accelerator: Accelerator, modules: list[nn.Module]
) -> tuple[list[nn.Module], Any]:
    """Modules and optimizer as the ranks train them. An optimizer of shards holds shards."""
    build = partial(
        build_optimizer,
        settings.optimizer,
        lr=settings.lr,
        decay_only_matrices=settings.decay_only_matrices,
    )
    return place(settings.sharding, accelerator, modules, build)
