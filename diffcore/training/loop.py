"""The training loop: optimizer steps, and when the run reports, draws previews and saves."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from signal import Signals

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffcore.core.random import Stream, derive_seed
from diffcore.io.signals import Interruption
from diffcore.io.trust import trusted_modules
from diffcore.training.averages.power_ema import write_snapshot
from diffcore.training.checkpoints import checkpoint, outputs
from diffcore.training.checkpoints.writer import CheckpointWriter
from diffcore.training.data.order import Batch, load_batches
from diffcore.training.optimization.optimizers import set_learning_rate
from diffcore.training.ranks.coordination import DelayedMaximum
from diffcore.training.ranks.sharding import gather_tensors, local, set_gradient_reduction
from diffcore.training.reports.noise_scale import estimate_noise
from diffcore.training.reports.reporting import Reporter
from diffcore.training.reports.validation import validate
from diffcore.training.state import TrainState

__all__ = ["advance", "clip_gradient", "run", "save", "training_batches"]


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
    buffers = _copy_buffers(state)
    index = torch.arange(state.order.micro)
    x0 = torch.zeros(len(index), *state.settings.process.shape)
    records = state.settings.process.conditions.items()
    shapes = {name: record.shape for name, record in records} | dict(state.settings.source.inputs)
    extras = {name: torch.zeros(len(index), *shape) for name, shape in shapes.items()}
    batch = Batch(x0, torch.zeros_like(index), index, index, extras)
    state.accelerator.backward(_losses(state, batch).mean())
    state.modules.zero_grad()
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
    variance () and square () of the gradient noise, NaN if they cannot be estimated.
    """
    settings, accelerator = state.settings, state.accelerator
    set_learning_rate(state.optimizer.optimizer, settings.lr(state.step, settings.steps))
    losses, norm, recorder = [], torch.zeros(()), state.micro_batch_norms
    noise: tuple[Tensor, ...] = ()
    buffers = _copy_buffers(state)
    with recorder.recording() if recorder else nullcontext():
        for part, batch in enumerate(batches):
            torch.manual_seed(_network_seed(state, part))
            with accelerator.accumulate(*state.modules):
                set_gradient_reduction(state.modules, accelerator.sync_gradients)
                loss = _losses(state, batch)
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    norm = clip_gradient(state)
                    noise = _gradient_noise(state, norm)  # the step may change the scale of fp16
                    _zero_non_finite_gradient(state)
                state.optimizer.step()
                state.optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.cat(losses), _keep_finite_buffers(buffers, norm), *noise


def _gradient_noise(state: TrainState, norm: Tensor) -> tuple[Tensor, ...]:
    """Variance () and square () of the gradient noise of a step, from this rank's micro-batches."""
    if state.micro_batch_norms is None:
        return (torch.full_like(norm, torch.nan),) * 2
    micro_square = state.micro_batch_norms.mean_square(state.accelerator.scaler)
    return estimate_noise(norm, micro_square, state.order.batch, state.order.micro)


def clip_gradient(state: TrainState) -> Tensor:
    """Scale the gradient of a step down to the largest norm of the settings.

    Args:
        state: state of the run; its gradients are changed in place.

    Returns:
        () norm before, over all ranks.
    """
    parameters, clip = state.modules.parameters(), state.settings.clip
    norm: Tensor = state.accelerator.clip_grad_norm_(parameters, clip)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _copy_buffers(state: TrainState) -> list[tuple[Tensor, Tensor]]:
    """Every buffer, such as a running mean, and a copy of its present value."""
    return [(value, value.clone()) for value in state.modules.buffers()]


@torch.no_grad()
def _keep_finite_buffers(buffers: list[tuple[Tensor, Tensor]], norm: Tensor) -> Tensor:
    """Set the buffers back after a step that was not finite, without a synchronisation.

    Args:
        buffers: buffers and their values before the step.
        norm: () gradient norm of the step.

    Returns:
        The norm; NaN if a buffer was not finite.
    """
    if not buffers:
        return norm
    is_finite = torch.stack([norm.isfinite(), *(value.isfinite().all() for value, _ in buffers)])
    for value, before in buffers:
        value.copy_(torch.where(is_finite.all(), value, before))
    return torch.where(is_finite.all(), norm, torch.nan)


def _losses(state: TrainState, batch: Batch) -> Tensor:
    """The weighted losses (B,) of a micro-batch."""
    key = state.sample_key(state.step, batch.batch_index)
    draw = state.settings.objective.draw(
        state.process_of(batch), key, state.accelerator.device, state.level_sampler.learned
    )
    return state.losses(batch, draw)


def _zero_non_finite_gradient(state: TrainState) -> None:
    """Set a gradient whose norm is not finite to zero as a whole, without a synchronisation.

    Clipping has multiplied it by clip/norm: NaN everywhere if the norm is NaN, zero and NaN if it
    is infinite.
    """
    for parameter in state.modules.parameters():
        if parameter.grad is not None:
            local(parameter.grad).nan_to_num_(0.0, 0.0, 0.0)


def _network_seed(state: TrainState, part: int) -> int:
    """Seed of the random numbers inside the network, such as dropout, in a micro-batch."""
    accelerator, accumulation = state.accelerator, state.settings.accumulation
    micro_batch = state.step * accumulation + part
    position = micro_batch * accelerator.num_processes + accelerator.process_index
    # Position 0 keys the initial weights.
    return derive_seed(state.settings.seed, Stream.MODEL, 1 + position)
