"""The training loop: optimizer steps, and when the run reports, draws previews and saves."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from signal import Signals

import torch
from torch import Tensor, nn

from diffcore.io.signals import Interruption
from diffcore.io.trust import trusted_modules
from diffcore.training.averages.power_ema import write_snapshot
from diffcore.training.checkpoints import checkpoint, outputs
from diffcore.training.checkpoints.writer import CheckpointWriter
from diffcore.training.data.order import Batch, load_batches
from diffcore.training.further_networks import (
    discard_statistics,
    train_further_networks,
    update_statistics,
)
from diffcore.training.optimization.gradients import copy_buffers, frozen, take_step
from diffcore.training.optimization.optimizers import set_learning_rate
from diffcore.training.ranks.coordination import DelayedMaximum
from diffcore.training.ranks.sharding import gather_tensors
from diffcore.training.reports.noise_scale import estimate_noise
from diffcore.training.reports.reporting import Reporter
from diffcore.training.reports.validation import validate
from diffcore.training.state import TrainState

__all__ = ["advance", "run", "save", "training_batches"]


def run(state: TrainState, reporter: Reporter) -> int:
    """Train from the step of `state` to the last one, or until a signal ends the run.

    Args:
        state: state of the run; changed in place.
        reporter: receives every step, and reports every `log_every` steps.

    Returns:
        Number of the signal that ended the run after a checkpoint; 0 at its proper end.

    Raises:
        ValueError: Too many steps in a row were not finite, or an item of the data does not fit
            the process.
    """
    settings = state.settings
    explained = settings.compute.explain_errors()
    with (
        reporter.progress(state),
        explained,
        Interruption() as interruption,
        CheckpointWriter(state) as writer,
    ):
        signal = _train(state, reporter, writer, interruption)
    path = settings.run.checkpoints / checkpoint.name(state.step)
    if signal:
        trusted = "".join(f" --trust {module}" for module in trusted_modules())
        reporter.message(
            f"stopped by {Signals(signal).name}: step {state.step} of {settings.steps} is saved in "
            f"{path}; continue with --config {settings.run.config} --resume true{trusted}"
        )
    elif state.ends_early:
        patience = settings.validation.patience
        reporter.message(
            f"the held-out loss was not lower in {patience} measurements: ended at step "
            f"{state.step} of {settings.steps}"
        )
    return signal


def _train(
    state: TrainState, reporter: Reporter, writer: CheckpointWriter, interruption: Interruption
) -> int:
    """Take the steps of the run; the number of the signal that ended them, or 0."""
    settings, signal = state.settings, 0
    batches = training_batches(state, settings.steps)
    signals = DelayedMaximum(state.accelerator, settings.rank_timeout)
    _fix_gradient_buckets(state)
    while state.step < settings.steps and not state.ends_early and not signal:
        advance(state, batches)
        reporter.count(settings.batch_size)
        signal = signals.update(interruption.signal)
        writer.check()
        _report_and_save(state, reporter, writer, bool(signal))
    signals.finish()
    return 0 if state.is_finished else signal


def _report_and_save(
    state: TrainState, reporter: Reporter, writer: CheckpointWriter, is_interrupted: bool
) -> None:
    """Everything that is due after a step. Every rank must call it."""
    settings, step, last = state.settings, state.step, state.settings.steps
    if step % settings.log_every == 0:
        reporter.report(state)
    if state.must_be_checked:
        reporter.check_finite(state)
    if settings.sample_every and step % settings.sample_every == 0:
        with settings.compute.uncompiled():
            reporter.draw_preview(state)
    if settings.validation.is_due(step, last):
        with settings.compute.uncompiled():
            held_out = validate(state)
        state.held_out_losses.append(held_out.averaged.loss)
        reporter.report_validation(state, held_out)
    if settings.snapshots.is_due(step, last):
        _write_snapshots(state)
    if step % settings.save_every == 0 or state.is_finished or is_interrupted:
        reporter.check_finite(state)
        save(state, reporter, writer)


def _fix_gradient_buckets(state: TrainState) -> None:
    """Let DDP choose the buckets of its reductions before the first step.

    It chooses them anew after its first backward pass, and they determine the order of the sums
    over ranks. The first step of a resumed run would otherwise be rounded in another order.
    """
    if state.accelerator.num_processes == 1 or state.is_sharded:
        return
    index = torch.arange(state.order.micro)
    x0 = torch.zeros(len(index), *state.settings.process.shape)
    records = state.settings.process.conditions.items()
    shapes = {name: record.shape for name, record in records} | dict(state.settings.source.inputs)
    extras = {name: torch.zeros(len(index), *shape) for name, shape in shapes.items()}
    batch = Batch(x0, torch.zeros_like(index), index, index, extras)
    with frozen(state.further_modules()):
        _run_backward(state, state.modules, partial(_losses, state, 0, batch))
    for name, network in state.further.items():
        with frozen([state.modules, *state.further_modules(name)]):
            losses = partial(state.network_losses, name, batch, 0)
            _run_backward(state, network.modules, losses)
    discard_statistics(state.further)


def _run_backward(state: TrainState, modules: nn.ModuleList, losses: Callable[[], Tensor]) -> None:
    """Run a backward pass and forget its gradient and its buffers."""
    buffers = copy_buffers(modules)
    state.accelerator.backward(losses().mean())
    modules.zero_grad()
    for value, before in buffers:
        value.copy_(before)


def training_batches(state: TrainState, stop: int) -> Iterator[Batch]:
    """The micro-batches of this rank.

    Args:
        state: state of the run; the micro-batches begin at its step.
        stop: step at which they end, exclusive.

    Returns:
        An iterator over `accumulation` micro-batches for each step.
    """
    settings = state.settings
    order = state.order.steps(state.step, stop)
    loading = (settings.workers, settings.prefetch, settings.pin_memory)
    return load_batches(settings.source, order, settings.process, *loading)


def advance(state: TrainState, batches: Iterator[Batch]) -> None:
    """Take one optimizer step: update the network, its average, and the losses to be reported.

    Args:
        state: state of the run; changed in place.
        batches: micro-batches of this rank; `accumulation` of them are read.
    """
    losses, *scalars = _optimize(state, islice(batches, state.settings.accumulation))
    state.step += 1
    update_statistics(state.accelerator, state.further)
    with state.evaluation_weights():
        for average in (state.average, *state.further_averages.values()):
            average.update(state.step)
    state.window.add(losses, *scalars)
    state.level_sampler.add(state.step, losses)


def save(state: TrainState, reporter: Reporter, writer: CheckpointWriter) -> None:
    """Write a checkpoint, and the averaged weights and the pipeline if they are due.

    Args:
        state: state of the run. Every rank must call the function.
        reporter: prints what cannot be written.
        writer: writer of the run's checkpoints.

    Raises:
        WriteError: A file cannot be written; the older ones are kept.
    """
    writer.save(state)
    if state.has_outputs:
        writer.wait()  # the outputs name the checkpoint that they belong to
        averaged = state.gathered_average()
        if state.accelerator.is_main_process:
            outputs.write(state, averaged, reporter.message)
    if state.has_outputs or not state.settings.checkpoints.asynchronous:
        state.accelerator.wait_for_everyone()


def _write_snapshots(state: TrainState) -> None:
    """Write the averages from which any length is reconstructed. Every rank must call it."""
    is_first, folder = state.accelerator.is_main_process, state.settings.run.snapshots
    for length, average in state.further_averages.items():
        whole = gather_tensors(average.shadow, is_first)
        if is_first:
            write_snapshot(folder, length, state.step, whole)


def _optimize(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, ...]:
    """One optimizer step: losses (samples,) of this rank, gradient norm () before clipping, and
    variance () and square () of the gradient noise, NaN if they cannot be estimated; then the
    loss () and the gradient norm () of each further network, which are updated first.
    """
    settings = state.settings
    parts = list(batches) if state.further else batches
    further = train_further_networks(state, parts) if isinstance(parts, list) else []
    set_learning_rate(state.optimizer.optimizer, settings.lr(state.step, settings.steps))
    recorder = state.micro_batch_norms
    noise: list[Tensor] = []

    def measure(norm: Tensor) -> None:  # the step may change the scale of fp16
        noise.extend(_gradient_noise(state, norm))

    with recorder.recording() if recorder else nullcontext(), frozen(state.further_modules()):
        losses, norm = take_step(
            state.accelerator,
            state.modules,
            state.optimizer,
            parts,
            partial(_losses, state),
            settings.clip,
            measure,
        )
    return losses, norm, *noise, *further


def _gradient_noise(state: TrainState, norm: Tensor) -> tuple[Tensor, ...]:
    """Variance () and square () of the gradient noise of a step, from this rank's micro-batches."""
    if state.micro_batch_norms is None:
        return (torch.full_like(norm, torch.nan),) * 2
    micro_square = state.micro_batch_norms.mean_square(state.accelerator.scaler)
    return estimate_noise(norm, micro_square, state.order.batch, state.order.micro)


def _losses(state: TrainState, part: int, batch: Batch) -> Tensor:
    """The weighted losses (B,) of a micro-batch."""
    torch.manual_seed(state.network_seed(part, state.settings.seed))
    key = state.sample_key(state.step, batch.batch_index)
    return state.losses(batch, state.draw(batch, key))
