"""The state of a training run: everything that its steps change, built once and then complete."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffcore.core.conditions import BatchCondition, batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import LabelWrapper
from diffcore.core.process import Process
from diffcore.core.random import Stream, derive_seed
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.networks import Networks
from diffcore.training.averages.ema import EMA
from diffcore.training.data.order import Batch, DataOrder
from diffcore.training.data.source import NOISE, WEIGHT
from diffcore.training.further_networks import FurtherNetwork
from diffcore.training.optimization.level_sampler import LevelSampler
from diffcore.training.optimization.optimizers import evaluation_weights
from diffcore.training.ranks.sharding import gather_tensors
from diffcore.training.reports.noise_scale import MicroBatchNorms
from diffcore.training.reports.validation import stops_early
from diffcore.training.reports.window import LossWindow

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["TrainState"]


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
        networks: networks of the objective beside that of the run, without what accelerate wrapped
            around them.
        further: those of them that are trained, by name.
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
    networks: Networks = field(default_factory=Networks)
    further: dict[str, FurtherNetwork] = field(default_factory=dict)

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

    def further_modules(self, without: str = "") -> list[nn.Module]:
        """The further networks as accelerate wrapped them.

        Args:
            without: name of a network that is left out.

        Returns:
            One list of modules for each network.
        """
        return [each.modules for name, each in self.further.items() if name != without]

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
        weight = batch.extras.get(WEIGHT)
        return self.settings.objective(
            self.denoiser,
            batch.x0.to(device, non_blocking=True),
            self._condition(batch, draw),
            draw.paired(batch.extras.get(NOISE)),
            self.uncertainty,
            None if weight is None else weight.to(device, non_blocking=True),
            self.networks,
        )

    def network_losses(self, name: str, batch: Batch, seed: int) -> Tensor:
        """The losses (B,) of a further network in a micro-batch of the present step.

        Args:
            name: name of the network.
            batch: samples, on any device.
            seed: seed of their random numbers.

        Returns:
            The losses, on the device of this rank.
        """
        device, networks = self.accelerator.device, self.further[name].networks
        key = SampleKey(seed, self.step, batch.batch_index, self.settings.batch_size)
        draw = self.draw(batch, key)
        x0 = batch.x0.to(device, non_blocking=True)
        denoiser = Denoiser(self.label_wrapper(self.network), self.settings.process)
        return self.settings.objective.network_losses(
            name, denoiser, x0, self._condition(batch, draw), draw, networks
        )

    def draw(self, batch: Batch, key: SampleKey) -> Draw:
        """The random numbers of the objective for a micro-batch.

        Args:
            batch: samples of one bucket.
            key: key of the samples.

        Returns:
            The draw, on the device of this rank.
        """
        learned = self.level_sampler.learned
        process, device = self.process_of(batch), self.accelerator.device
        return self.settings.objective.draw(process, key, device, learned)

    def _condition(self, batch: Batch, draw: Draw) -> BatchCondition | None:
        process, inputs = self.settings.process, self.settings.source.inputs
        device, values = self.accelerator.device, {**batch.extras, **draw.conditions}
        return batch_condition(process, batch.label, values, device, inputs)

    def network_seed(self, part: int, seed: int) -> int:
        """Seed of the random numbers inside a network, such as dropout, in a micro-batch.

        Args:
            part: index of the micro-batch in the present step.
            seed: seed of the run, or of the update of a further network.

        Returns:
            The seed, which depends on the rank too.
        """
        accelerator, accumulation = self.accelerator, self.settings.accumulation
        micro_batch = self.step * accumulation + part
        position = micro_batch * accelerator.num_processes + accelerator.process_index
        # Position 0 keys the initial weights.
        return derive_seed(seed, Stream.MODEL, 1 + position)

    def sample_key(self, step: int, batch_index: Tensor) -> SampleKey:
        """Key of the random numbers of samples.

        Args:
            step: optimizer step.
            batch_index: (B,) index of each sample in the global batch of the step.

        Returns:
            The key.
        """
        return SampleKey(self.settings.seed, step, batch_index, self.settings.batch_size)
