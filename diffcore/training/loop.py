"""The training loop: optimizer steps, and when the run reports, draws previews and saves."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from diffcore.core.random import Stream, derive_seed
from diffcore.training import checkpoint, outputs
from diffcore.training.data.order import Batch, load_batches
from diffcore.training.power_ema import write_snapshot
from diffcore.training.reporting import Reporter
from diffcore.training.resume import checkpoint_of
from diffcore.training.state import TrainState
from diffcore.training.validation import validate

__all__ = ["advance", "run", "save", "training_batches"]


def run(state: TrainState, reporter: Reporter) -> None:
    """Train from the step of `state` to the last one.

    Args:
        state: state of the run; changed in place.
        reporter: receives every step, and reports every `log_every` steps.

    Raises:
        ValueError: Too many steps in a row were not finite, or an item of the data does not fit
            the process.
    """
    settings, batches = state.settings, training_batches(state, state.settings.steps)
    with reporter.progress(state):
        while state.step < settings.steps and not state.ends_early:
            advance(state, batches)
            reporter.count(settings.batch_size)
            _report_and_save(state, reporter)
        reporter.check_finite(state, state.window.gathered())
        if state.ends_early:
            patience = settings.validation.patience
            reporter.message(
                f"the held-out loss was not lower in {patience} measurements: ended at step "
                f"{state.step} of {settings.steps}"
            )


def _report_and_save(state: TrainState, reporter: Reporter) -> None:
    """Everything that is due after a step. Every rank must call it."""
    settings, step, last = state.settings, state.step, state.settings.steps
    if step % settings.log_every == 0:
        reporter.report(state)
    if settings.sample_every and step % settings.sample_every == 0:
        reporter.draw_preview(state)
    if settings.validation.is_due(step, last):
        held_out = validate(state)
        state.held_out_losses.append(held_out.averaged.loss)
        reporter.report_validation(state, held_out)
    if settings.snapshots.is_due(step, last):
        _write_snapshots(state)
    if step % settings.save_every == 0 or step == last or state.ends_early:
        save(state, reporter)


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
    return load_batches(settings.source, order, settings.process, settings.workers)


def advance(state: TrainState, batches: Iterator[Batch]) -> None:
    """Take one optimizer step: update the network, its average, and the losses to be reported.

    Args:
        state: state of the run; changed in place.
        batches: micro-batches of this rank; `accumulation` of them are read.
    """
    losses, norm = _optimize(state, islice(batches, state.settings.accumulation))
    state.step += 1
    for average in (state.average, *state.further_averages.values()):
        average.update(state.step)
    state.window.add(losses, norm)
    state.level_sampler.add(state.step, losses)


def save(state: TrainState, reporter: Reporter) -> None:
    """Write a checkpoint, the averaged weights and the pipeline. Every rank must call it."""
    settings, run_folder = state.settings, state.settings.run
    content = checkpoint_of(state)
    if state.accelerator.is_main_process:
        path = run_folder.checkpoints / checkpoint.name(state.step)
        checkpoint.write(path, content)
        checkpoint.prune(run_folder.checkpoints, settings.keep)
        outputs.write(state, reporter.message)
    state.accelerator.wait_for_everyone()


def _write_snapshots(state: TrainState) -> None:
    """Write the averages from which one of any length can be reconstructed."""
    if state.accelerator.is_main_process:
        for length, average in state.further_averages.items():
            write_snapshot(state.settings.run.snapshots, length, state.step, average.shadow)


def _optimize(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step: losses (samples,) of this rank, gradient norm () before clipping."""
    settings, accelerator = state.settings, state.accelerator
    for group in state.optimizer.param_groups:
        group["lr"] = settings.lr(state.step, settings.steps)
    losses, norm = [], torch.zeros(())
    for part, batch in enumerate(batches):
        torch.manual_seed(_network_seed(state, part))
        with accelerator.accumulate(*state.modules):
            loss = _losses(state, batch)
            accelerator.backward(loss.mean())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(state.modules.parameters(), settings.clip)
                _zero_non_finite_gradient(state)
            state.optimizer.step()
            state.optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.cat(losses), norm


def _losses(state: TrainState, batch: Batch) -> Tensor:
    """The weighted losses (B,) of a micro-batch."""
    settings, device = state.settings, state.accelerator.device
    objective, process = settings.objective, settings.process
    key = state.sample_key(state.step, batch.batch_index)
    draw = objective.draw(process, key, device, state.level_sampler.learned)
    label = batch.label.to(device) if process.classes else None
    x0 = batch.x0.to(device, non_blocking=True)
    return objective(state.denoiser, x0, label, draw, state.uncertainty)


def _zero_non_finite_gradient(state: TrainState) -> None:
    """Set a gradient whose norm is not finite to zero as a whole, without a synchronisation.

    Clipping has multiplied it by clip/norm: NaN everywhere if the norm is NaN, zero and NaN if it
    is infinite.
    """
    for parameter in state.modules.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def _network_seed(state: TrainState, part: int) -> int:
    """Seed of the random numbers inside the network, such as dropout, in a micro-batch."""
    accelerator, accumulation = state.accelerator, state.settings.accumulation
    micro_batch = state.step * accumulation + part
    position = micro_batch * accelerator.num_processes + accelerator.process_index
    # Position 0 keys the initial weights.
    return derive_seed(state.settings.seed, Stream.MODEL, 1 + position)
