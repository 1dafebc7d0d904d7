"""The state of a training run: everything that its steps change, built once and then complete."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffcore.core.conditions import batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import (
    ExportableNetwork,
    LabelWrapper,
    frozen_hash,
    leave_label_dropout,
)
from diffcore.core.process import Process
from diffcore.core.random import Stream, derive_seed
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.training.averages.ema import EMA
from diffcore.training.averages.power_ema import PowerFunction
from diffcore.training.data.checks import prepare_data
from diffcore.training.data.order import Batch, DataOrder
from diffcore.training.data.source import NOISE, WEIGHT, DataSource
from diffcore.training.network_checks import check_dtype, check_network
from diffcore.training.optimization.level_sampler import LevelSampler
from diffcore.training.optimization.optimizers import build_optimizer, evaluation_weights
from diffcore.training.optimization.quantised_state import is_quantised
from diffcore.training.ranks.accelerator import make_accelerator, wrap
from diffcore.training.ranks.coordination import run_on_first_rank
from diffcore.training.ranks.sharding import gather_tensors, shard
from diffcore.training.reports.noise_scale import MicroBatchNorms
from diffcore.training.reports.reporting import SCALARS
from diffcore.training.reports.validation import stops_early
from diffcore.training.reports.window import LossWindow

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["TrainState", "build_accelerator", "build_state"]


@dataclass
class TrainState:
    """The state of a run on one rank.

    Args:
        settings: settings of the run.
        accelerator: accelerator of this rank.
        modules: what the optimizer trains, as accelerate wrapped it: the network, and the
            uncertainty of the objective if it has one.
        optimizer: accelerate's optimizer.
        label_wrapper: wraps a network so that it accepts the labels of the data.
        denoiser: training network as a denoiser, in training mode.
        average: averaged weights of the network.
        further_averages: averages with power-function profiles, by their length.
        order: order in which the run reads its data.
        level_sampler: distribution of the training levels, which may adapt to the losses.
        window: losses, gradient norms and gradient noise since the last report.
        content_hashes: hashes of the data and of frozen weights at the start, if known.
        micro_batch_norms: gradient norms of the micro-batches of a step; None if there is only one,
            or the weights are sharded, whose gradients exist only for the whole batch.
        step: number of optimizer steps taken.
        non_finite_steps: number of last checked steps in a row that were not finite.
        checked: number of steps of which is known whether they were finite.
        held_out_losses: losses of the averaged weights on the held-out data so far.
    """

    settings: "Trainer"
    accelerator: Accelerator
    modules: nn.ModuleList
    optimizer: Any
    label_wrapper: LabelWrapper
    denoiser: Denoiser
    average: EMA
    further_averages: dict[float, EMA]
    order: DataOrder
    level_sampler: LevelSampler
    window: LossWindow
    content_hashes: dict[str, str]
    micro_batch_norms: MicroBatchNorms | None = None
    step: int = 0
    non_finite_steps: int = 0
    checked: int = 0
    held_out_losses: list[float] = field(default_factory=list)

    @property
    def network(self) -> nn.Module:
        """The network itself, without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.modules[0])

    @property
    def uncertainty(self) -> nn.Module | None:
        """The uncertainty of the objective as accelerate wrapped it, or None."""
        return self.modules[1] if len(self.modules) > 1 else None

    @property
    def must_be_checked(self) -> bool:
        """Whether the steps that are not checked yet may complete `patience` non-finite steps."""
        possible = self.non_finite_steps + self.step - self.checked
        return possible >= self.settings.patience

    @property
    def is_searching_scale(self) -> bool:
        """Whether fp16 may still skip steps to find the scale of its gradients.

        The scaler halves its scale after a step whose gradient overflows, with finite losses. A
        scale below 1 has nothing left to find.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and bool(scaler.get_scale() >= 1)

    @property
    def ends_early(self) -> bool:
        """Whether the held-out loss has not become lower for the patience of the validation."""
        return stops_early(self.held_out_losses, self.settings.validation.patience)

    @property
    def is_finished(self) -> bool:
        """Whether the run has taken its last step, or ends early."""
        return self.step == self.settings.steps or self.ends_early

    @property
    def has_outputs(self) -> bool:
        """Whether averaged weights and a pipeline belong to a checkpoint of this step."""
        return self.settings.checkpoints.has_outputs or self.is_finished

    @property
    def trained(self) -> nn.Module:
        """Everything that the optimizer trains as one module, with the names of the checkpoint."""
        if self.uncertainty is None:
            return self.network
        uncertainty = self.accelerator.unwrap_model(self.uncertainty)
        return nn.ModuleDict({"network": self.network, "uncertainty": uncertainty})

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only a part of the weights."""
        return any(isinstance(module, FSDPModule) for module in self.modules)

    def gathered_average(self) -> dict[str, Tensor]:
        """The whole averaged weights. Every rank must call it.

        Returns:
            The tensors by name, whole on the first rank only.
        """
        return gather_tensors(self.average.shadow, self.accelerator.is_main_process)

    @contextmanager
    def averaged_network(self, averaged: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Context with the whole network with the averaged weights.

        Args:
            averaged: result of `gathered_average`.

        Yields:
            The network of the run, which has its own weights again on exit; a copy of a sharded
            one, which needs no other rank.
        """
        if not self.is_sharded:
            with self.average.applied():
                yield self.network
            return
        with torch.random.fork_rng():
            network = self.settings.network()
        network.load_state_dict(averaged)
        yield network.to(self.accelerator.device)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Context in which the network has the weights with which the optimizer evaluates it."""
        return evaluation_weights(self.optimizer.optimizer)

    def process_of(self, batch: Batch) -> Process:
        """The process of the run for the samples of a batch.

        Args:
            batch: samples of one bucket.

        Returns:
            The process, with the shape of the samples.
        """
        return self.settings.process.resized(tuple(batch.x0.shape[1:]))

    def losses(self, batch: Batch, draw: Draw) -> Tensor:
        """The weighted losses (B,) of a micro-batch.

        Args:
            batch: samples, on any device.
            draw: their random numbers.

        Returns:
            The losses, on the device of this rank.
        """
        device = self.accelerator.device
        process, inputs = self.settings.process, self.settings.source.inputs
        condition = batch_condition(process, batch.label, batch.extras, device, inputs)
        weight = batch.extras.get(WEIGHT)
        return self.settings.objective(
            self.denoiser,
            batch.x0.to(device, non_blocking=True),
            condition,
            draw.paired(batch.extras.get(NOISE)),
            self.uncertainty,
            None if weight is None else weight.to(device, non_blocking=True),
        )

    def sample_key(self, step: int, batch_index: Tensor) -> SampleKey:
        """Key of the random numbers of samples.

        Args:
            step: optimizer step.
            batch_index: (B,) index of each sample in the global batch of the step.

        Returns:
            The key.
        """
        return SampleKey(self.settings.seed, step, batch_index, self.settings.batch_size)


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
    built = _build_modules(settings, label_wrapper)
    hashes = _content_hashes(settings, built[0])
    modules, optimizer = _prepare(settings, accelerator, built)
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
        EMA(network, settings.ema),
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
        LossWindow(*split, SCALARS),
        hashes,
        _micro_batch_norms(settings, accelerator, modules),
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


def _content_hashes(settings: "Trainer", network: nn.Module) -> dict[str, str]:
    hashes = {
        "data": settings.source.content_hash,
        "network": frozen_hash(network),
        "teacher": settings.objective.content_hash,
    }
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


def _build_modules(settings: "Trainer", label_wrapper: LabelWrapper) -> list[nn.Module]:
    """The network with its initial weights, and the uncertainty if there is one."""
    torch.manual_seed(derive_seed(settings.seed, Stream.MODEL, 0))
    modules = [settings.network()]
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
    settings.compute.apply(modules[0])
    if settings.objective.uncertainty:
        modules.append(settings.objective.uncertainty.module())
    return modules


def _prepare(
    settings: "Trainer", accelerator: Accelerator, modules: list[nn.Module]
) -> tuple[list[nn.Module], Any]:
    """Modules and optimizer as the ranks train them. An optimizer of shards holds shards."""
    mesh = settings.sharding.mesh(accelerator.num_processes, accelerator.device.type)
    build = partial(
        build_optimizer,
        settings.optimizer,
        lr=settings.lr,
        decay_only_matrices=settings.decay_only_matrices,
    )
    if mesh is None:
        return wrap(accelerator, modules, build(modules))
    modules = shard(accelerator, modules, mesh, settings.sharding.reshard)
    optimizer = build(modules)
    if is_quantised(optimizer):
        raise ValueError(
            f"sharding.strategy is {settings.sharding.strategy}, but the quantised state of "
            f"{type(optimizer).__name__} cannot be sharded: use torch.optim.AdamW, or strategy none"
        )
    return modules, accelerator.prepare_optimizer(optimizer)
