"""The trainer: a run from its first step to its last, whatever interrupts it and however it is split."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Stream, derived
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance
from diffcore.io.files import write_file
from diffcore.io.safetensors import write_weights
from diffcore.objectives.objective import Objective, SampleKey
from diffcore.run import Network, Optimizer, Run
from diffcore.samplers import Sampler
from diffcore.sampling import generation as sampling
from diffcore.sampling import images
from diffcore.sampling.generation import GRID, SAMPLER, sample
from diffcore.schedules import Grid, Level
from diffcore.training import checkpoint, pipeline, resume
from diffcore.training import state_dict as state
from diffcore.training.checkpoint import Checkpoint
from diffcore.training.data.source import (
    Batch,
    Order,
    asked,
    batches,
    check,
    check_labels,
    conditioned,
    hashes,
    make,
    size_of,
)
from diffcore.training.distributed import accelerator
from diffcore.training.ema import EMA, Decay
from diffcore.training.level_sampler import Adaptation
from diffcore.training.lr import LearningRate
from diffcore.training.previews import drawable, picture
from diffcore.training.reporting import Metrics, NonFinite, Window, non_finite

COUNTS = (
    "steps",
    "batch_size",
    "accumulation",
    "patience",
    "log_every",
    "save_every",
    "keep",
    "sample_steps",
)
LEAST = {**dict.fromkeys(COUNTS, 1), "workers": 0, "sample_every": 0}


@dataclass
class Trainer:
    """Trains a network on data; the folder holds the run, and `resume` continues it as if it had not stopped.

    Data order, noise levels, noise, condition dropout and augmentation are functions of (seed, position), the learning
    rate of the step: ranks, accumulation, workers and restarts change nothing but rounding.

    Args:
        network: the network's class and options; built with weights that are a function of the seed.
        data: items x_0 or (x_0, label).
        process: what the network is trained on.
        optimizer: its class and options, without the learning rate, which `lr` gives.
        folder: of the run.
        steps: optimizer steps.
        objective: the loss.
        lr: the learning rate's curve.
        ema: decay of the averaged weights.
        batch_size: samples of an optimizer step, over all ranks and accumulation.
        accumulation: parts of the batch that a rank takes one after the other.
        clip: largest norm of the gradient.
        precision: no (float32), bf16 or fp16, by autocast.
        seed: of the run, 64 bits.
        workers: processes that read data; 0 reads in this one.
        patience: non-finite steps in a row after which the run stops; each counts as a step of zero gradient.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between pictures, 0 for none.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
        trackers: accelerate's trackers, such as tensorboard or wandb.
        sampler: of the pictures, and of `diffcore sample` unless told otherwise.
        grid: likewise.
        sample_steps: likewise.
        guidance: likewise.
        resume: continue the run in the folder.
        config: plain data written to config.yaml.
    """

    network: Network
    data: Dataset  # type: ignore[type-arg]  # jsonargparse reads the bare class
    process: Process
    optimizer: Optimizer
    folder: Path
    steps: int
    objective: Objective = field(default_factory=Objective)
    lr: LearningRate = field(default_factory=LearningRate)
    ema: Decay = field(default_factory=Decay)
    batch_size: int = 128
    accumulation: int = 1
    clip: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    workers: int = 0
    patience: int = 10
    log_every: int = 20
    sample_every: int = 0
    save_every: int = 1000
    keep: int = 2
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    sampler: Sampler = field(default_factory=lambda: SAMPLER)
    grid: Grid = field(default_factory=lambda: GRID)
    sample_steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    resume: bool = False
    config: str = ""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a positive norm (.inf does not clip)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected within [0, 2^63)")
        self.process = conditioned(self.process, self.data)
        self.objective.check(self.process)
        check(self.data, self.process)
        if self.sample_every:
            sampling.check(
                self.process,
                self._knots,
                [0],
                [0] if self.process.classes else None,
                self.guidance,
                1,
                self.sampler,
            )
        self.run = Run(Path(self.folder))
        self.step, self.skipped = 0, 0  # steps taken; of the last ones, how many were not finite

    @property
    def _knots(self) -> tuple[Level, ...]:
        return self.grid.knots(self.process.schedule, self.sample_steps)

    def train(self) -> None:
        """Train to `steps`, from the start or from the newest checkpoint."""
        self.prepare()
        self._begin()
        stream = batches(self.data, self.order.steps(self.step, self.steps), self.workers)
        with self._bar() as bar:
            while self.step < self.steps:
                self.advance(stream)
                bar.update(self.batch_size)
                if self.step % self.log_every == 0:
                    self._report(bar)
                if self.sample_every and self.step % self.sample_every == 0:
                    self._picture()
                if self.step % self.save_every == 0 or self.step == self.steps:
                    self._save()
            self._check_finite(self.window.gathered())
        self.accelerator.end_training()

    def advance(self, stream: Iterator[Batch]) -> None:
        """One step: the network, its average, and what the next report is made of."""
        losses, norm = self._optimize(islice(stream, self.accumulation))
        self.step += 1
        self.average.update(self.step)
        self.window.add(losses, norm)
        self.adaptation.add(self.step, losses)

    def _optimize(self, parts: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step: the losses of this rank's samples, and the gradient's norm before clipping."""
        for group in self.optim.param_groups:
            group["lr"] = self.lr(self.step, self.steps)
        losses, norm = [], torch.zeros(())
        for part, batch in enumerate(parts):
            torch.manual_seed(self._model_seed(part))  # a network's own dropout
            with self.accelerator.accumulate(*self.trained):
                loss = self._losses(batch)
                self.accelerator.backward(loss.mean())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), self.clip)
                    self._drop_non_finite()
                self.optim.step()
                self.optim.zero_grad()
            losses.append(loss.detach())
        return torch.cat(losses), norm

    def _losses(self, batch: Batch) -> Tensor:
        device = self.accelerator.device
        draw = self.objective.draw(
            self.process, self._place(batch.place), device, self.adaptation.learned
        )
        check_labels(batch, self.process)
        label = batch.label.to(device) if self.process.classes else None
        x0 = batch.x0.to(device, non_blocking=True)
        return self.objective(self.denoiser, x0, label, draw, self.uncertainty)

    def _drop_non_finite(self) -> None:
        """A gradient whose norm is not finite becomes zero as a whole, without asking the device.

        Clipping has multiplied it by clip/norm, which left NaN (norm NaN), or zeros and NaN (norm inf).
        """
        for parameter in self.trained.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    def _place(self, place: Tensor) -> SampleKey:
        return SampleKey(self.seed, self.step, place, self.batch_size)

    def _model_seed(self, part: int) -> int:
        place = (
            self.step * self.accumulation + part
        ) * self.accelerator.num_processes + self.accelerator.process_index
        return derived(self.seed, Stream.MODEL, 1 + place)  # 0 is the initial weights'

    # Beginning ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Build what trains, on this rank's device."""
        self.accelerator = accelerator(
            self.precision, self.accumulation, self.trackers, self.run.folder
        )
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        group = self.objective.coupling.group
        if self.batch_size % (world * self.accumulation * group):
            groups = f" x groups of {group}, of {self.objective.coupling}" if group > 1 else ""
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of {world} processes x {self.accumulation} parts{groups}"
            )
        make(self.data, self.process, self.accelerator.device, self.accelerator.is_main_process)
        self.asked = asked(self.data, self.accelerator.device)
        torch.manual_seed(derived(self.seed, Stream.MODEL, 0))
        network = self.network()
        self._probe(network)
        modules = (
            [network, self.objective.uncertainty.module()]
            if self.objective.uncertainty
            else [network]
        )
        parameters = [value for value in nn.ModuleList(modules).parameters() if value.requires_grad]
        optim = self.optimizer(parameters, self.lr.peak)
        *trained, self.optim = self.accelerator.prepare(*modules, optim)
        self.trained = nn.ModuleList(trained)
        self.model, self.uncertainty = (
            trained[0],
            trained[1] if self.objective.uncertainty else None,
        )
        self.denoiser = self._denoiser(self.model).train()
        self.average = EMA(self.bare, self.ema)
        self.order = Order(
            size_of(self.data), self.seed, self.batch_size, self.accumulation, rank, world
        )
        split = (self.accumulation, self.accelerator.gather)
        self.window = Window(*split)
        self.adaptation = Adaptation(
            self.objective, self.process, self.seed, self.batch_size, *split
        )
        self.metrics = Metrics(self.run.metrics)

    @torch.no_grad()
    def _probe(self, network: nn.Module) -> None:
        """Ask the network once, before anything is written: what does not fit the process fails here."""
        x = torch.zeros(2, *self.process.shape)
        self._denoiser(network.eval()).output(x, self.process.schedule.level(0.5))
        network.train()

    def _denoiser(self, network: nn.Module) -> Denoiser:
        """A network with its process, asked as the data has it; what is trained and saved is the network alone."""
        return Denoiser(self.asked(network), self.process)

    @property
    def bare(self) -> nn.Module:
        """The network itself, without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def _whole(self) -> nn.Module:
        """All that the optimizer trains: the network, and the objective's own parameters if it has any."""
        if self.uncertainty is None:
            return self.bare
        return nn.ModuleDict(
            {"network": self.bare, "uncertainty": self.accelerator.unwrap_model(self.uncertainty)}
        )

    @cached_property
    def threads(self) -> dict[str, int]:
        """What the last bits of a run depend on."""
        return {"processes": self.accelerator.num_processes, "threads": torch.get_num_threads()}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of what a run is made of beside its config."""
        return hashes(data=self.data, network=self.bare)

    def _begin(self) -> None:
        """Start the folder, or load its newest whole checkpoint."""
        if self.resume:
            self._load()
        elif self.run.config.exists():
            raise ValueError(
                f"{self.run.folder} holds a run already: continue it with --resume true, or name another folder"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.set_aside(self.run.checkpoints, self.step)
            self.process.save(self.run.process)
            if self.config or not self.run.config.exists():
                write_file(self.run.config, self.config.encode())
            self.metrics.rewind(self.step)
        self.accelerator.wait_for_everyone()
        if self.trackers:
            self.accelerator.init_trackers("tensorboard")

    def _say(self, text: str) -> None:
        self.accelerator.print(f"diffcore: {text}", file=sys.stderr)

    # Checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint and the averaged weights; every rank gathers, the first writes."""
        window = self.window.gathered()
        adapted = self.adaptation.tensors()
        model, optimizer, groups = state.capture(self._whole, self.optim.optimizer)
        if self.accelerator.is_main_process:
            files = {
                "model.safetensors": model,
                "ema.safetensors": self.average.shadow,
                "training.safetensors": {**optimizer, **adapted, "window": window},
            }
            facts = {
                "step": self.step,
                "skipped": self.skipped,
                "groups": groups,
                **self.threads,
                **self.hashes,
            }
            checkpoint.write(
                self.run.checkpoints / checkpoint.name(self.step), Checkpoint(files, facts)
            )
            checkpoint.prune(self.run.checkpoints, self.keep)
            write_weights(self.run.weights, self.average.shadow, step=self.step)
            pipeline.save(self, self._say)
        self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        """Continue from the newest whole checkpoint; a run that was stopped before its first begins again."""
        resume.check(self.run, self.config, self.process)
        loaded = checkpoint.newest(self.run.checkpoints, self._say)
        if loaded is None and any(self.run.checkpoints.glob("step-*")):
            raise ValueError(
                f"{self.run.checkpoints} has no whole checkpoint left: start anew in another folder"
            )
        if loaded is None:
            self._say("no checkpoint yet: starting at step 0")
            return
        tensors, facts = loaded
        self._check_facts(facts)
        training = tensors["training.safetensors"]
        self.window.restore(training.pop("window"))
        self.adaptation.restore(training)
        state.restore(
            self._whole,
            self.optim.optimizer,
            tensors["model.safetensors"],
            training,
            facts["groups"],
        )
        self.average.load(tensors["ema.safetensors"])
        self.step, self.skipped = facts["step"], facts["skipped"]
        self._say(f"resumed at step {self.step}")

    def _check_facts(self, facts: dict[str, Any]) -> None:
        if facts["step"] > self.steps:
            raise ValueError(
                f"steps is {self.steps}, but the run has taken {facts['step']}: ask for at least as many"
            )
        if changed := [name for name, now in self.hashes.items() if facts.get(name, now) != now]:
            raise ValueError(
                f"the {' and '.join(changed)} are not those that the run in {self.run.folder} was started with: images, "
                f"captions, what encodes them, or the weights beside an adapter changed since; put them back, or start a new "
                f"run in another folder"
            )
        if other := {
            name: (facts[name], now) for name, now in self.threads.items() if facts[name] != now
        }:
            self._say(
                f"(then, now) differ in {other}: the run continues equal to rounding, not bit for bit"
            )

    # Reports -----------------------------------------------------------------------------------------------------

    def _bar(self) -> Any:
        total, done = self.steps * self.batch_size, self.step * self.batch_size
        hidden = not self.accelerator.is_main_process
        return tqdm(
            total=total, initial=done, unit="img", unit_scale=True, disable=hidden, mininterval=0.5
        )

    def _report(self, bar: Any) -> None:
        """Write the window's metrics, and stop a run that is not finite any more."""
        table = self.window.gathered()
        self.window.restore(None)
        losses = table[:, 1:].double()
        values = {
            "step": self.step,
            "loss": float(losses.mean()),
            "grad_norm": float(table[:, 0].double().mean()),
        }
        values.update(lr=self.lr(self.step - 1, self.steps), skipped=len(non_finite(table, 0)))
        rate = bar.format_dict["rate"] or 0.0
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.accelerator.log({**values, "images_per_second": rate}, step=self.step)
        if self.accelerator.is_main_process:
            self.metrics.write(values)
        self._check_finite(table)

    def _check_finite(self, table: Tensor) -> None:
        """Say which of the window's steps were not finite, and stop after `patience` in a row."""
        first = self.step - len(table)
        bad = non_finite(table, first)
        if not bad:
            self.skipped = 0
            return
        self._say(
            f"{len(bad)} of the last {len(table)} steps were not finite, and had no gradient: {self._describe(bad[0])}"
        )
        longest = self.skipped
        for step in range(first, self.step):
            self.skipped = self.skipped + 1 if step in {found.step for found in bad} else 0
            longest = max(longest, self.skipped)
        if longest >= self.patience:
            raise ValueError(
                f"{longest} steps in a row were not finite (patience is {self.patience}): {self._describe(bad[0])}; "
                f"check the data, lower lr.peak, or use precision no"
            )

    def _describe(self, found: NonFinite) -> str:
        place = SampleKey(self.seed, found.step, torch.tensor([found.place]), self.batch_size)
        level = self.adaptation.describe(place, self.step)
        index = self.order.index(int(place.position))
        return f"step {found.step}, sample {index} of the data at λ = {level}, loss {found.loss}"

    def _picture(self) -> None:
        """Samples of the averaged network, drawn by the first rank alone."""
        if self.accelerator.is_main_process and drawable(self.data, self.process):
            integrate = partial(
                sample,
                sampler=self.sampler,
                grid=self.grid,
                steps=self.sample_steps,
                guidance=self.guidance,
            )
            with self.average.applied():
                made = picture(self._denoiser(self.bare), self.data, integrate)
            images.save(made, self.run.samples / f"{checkpoint.name(self.step)}.png")
