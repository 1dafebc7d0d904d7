"""`Trainer`: the settings of a training run, and the run itself."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

from diffcore.core.conditions import batch_condition
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance
from diffcore.io.lock import lock_folder
from diffcore.io.signals import end_by_signal
from diffcore.objectives.objective import Objective
from diffcore.run import NetworkFactory, OptimizerFactory, Run
from diffcore.samplers import Sampler
from diffcore.sampling import generation
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.sampling.pictures import Picture
from diffcore.schedules import Grid
from diffcore.training import loop
from diffcore.training.averages.ema import Decay
from diffcore.training.averages.power_ema import Snapshots
from diffcore.training.checkpoints.checkpoint import Checkpoints
from diffcore.training.checkpoints.initial_weights import check_estimate, check_source
from diffcore.training.checkpoints.resume import start_or_resume
from diffcore.training.construction import build_accelerator, build_state
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.checks import check_data, check_held_out, process_with_captions
from diffcore.training.data.source import DataSource
from diffcore.training.optimization.compute import Compute
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.ranks.coordination import explain_lost_ranks, run_on_first_rank
from diffcore.training.ranks.sharding import Sharding
from diffcore.training.reports.previews import Previews, check_drawable
from diffcore.training.reports.reporting import Reporter
from diffcore.training.reports.tracking import Tracking
from diffcore.training.reports.validation import Validation
from diffcore.training.state import TrainState

__all__ = ["Trainer"]

MINIMUM = {
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "workers": 0,
    "prefetch": 1,
    "patience": 1,
    "log_every": 1,
    "sample_every": 0,
    "save_every": 1,
    "keep": 1,
    "sample_steps": 1,
    "rank_timeout": 1,
}


MAXIMUM_STEPS = 10**8 - 1
"""The names of checkpoints have eight digits."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """Settings of a training run; `train` starts the run, or resumes it from its last checkpoint.

    Data order, noise levels, noise, condition dropout and augmentation are functions of (seed,
    position); the learning rate is a function of the step. Ranks, accumulation, workers and
    restarts therefore change only the rounding.

    Args:
        network: class and options of the network; its initial weights are a function of the seed.
        data: class and options of the data set; its items are x_0, (x_0, label) or (x_0, label,
            conditions).
        process: diffusion process that the network is trained on: schedule, prediction type, time
            conditioning, shape and range of the data, classes.
        optimizer: class and options of the optimizer, without the learning rate, which `lr`
            defines.
        folder: directory that the run is written to; a string becomes a Path.
        steps: number of optimizer steps of the whole run.
        objective: training loss: its weight, distribution of noise levels, coupling.
        lr: learning rate as a function of the step.
        decay_only_matrices: true applies the weight decay of the optimizer only to matrices and
            convolutions, and not to norms, biases and embeddings (`group_parameters`).
        ema: decay of the averaged weights.
        validation: held-out data and how often its loss is measured.
        snapshots: further averages, from which `diffcore ema` reconstructs one of any length.
        batch_size: number of samples of an optimizer step, over all ranks and micro-batches.
        accumulation: number of micro-batches into which a rank splits its part of the batch.
        sharding: how the ranks share weights, gradients, optimizer state and averages.
        clip: largest norm of the gradient; a larger gradient is scaled down. `.inf` does not clip.
        precision: data type of the network's evaluation by autocast: no (float32), bf16 or fp16.
        compute: compilation, activation checkpointing and memory format of the network.
        seed: 64-bit seed of everything random in the run.
        workers: number of processes that load data on each rank; 0 loads in the training process.
        prefetch: number of micro-batches that each worker reads ahead; a larger number evens out
            items that are slow to read, and takes more memory.
        pin_memory: whether batches are read into page-locked memory, from which they are copied to
            a GPU while it computes; without a GPU there is none.
        patience: number of steps in a row that are not finite after which the run stops; each of
            them counts as a step with zero gradient, and leaves the buffers of the network as they
            were. Losses are read from the device at least every `patience` steps. Steps with which
            fp16 searches for the scale of its gradients are not counted.
        rank_timeout: number of seconds that a rank waits for another one before it ends with an
            error; more than a preview or a checkpoint takes.
        log_every: number of steps between two lines of metrics.jsonl.
        sample_every: number of steps between two preview images; 0 for none.
        previews: labels or prompts of preview images, and the seeds of their samples.
        save_every: number of steps between two checkpoints.
        keep: number of checkpoints that are kept.
        checkpoints: format of the checkpoints, and whether training waits for the disk.
        trackers: names of trackers of accelerate, such as tensorboard or wandb; [] for none.
        tracking: names under which trackers show the run.
        picture: kind of preview pictures and, by default, of `diffcore sample`: images, points,
            lines (signals), frames (volumes, video), or auto, which the shape decides.
        sampler: sampler of preview images and, by default, of `diffcore sample`.
        grid: knots of preview images and, by default, of `diffcore sample`.
        sample_steps: number of steps of preview images and, by default, of `diffcore sample`.
        guidance: guidance rule of preview images and, by default, of `diffcore sample`.
        init: weights that the network starts with: the folder of another run or of one of its
            checkpoints, the folder of a diffusers pipeline, or a safetensors file; "" starts with
            new weights.
        init_weights: weights of that run or checkpoint: averaged or raw.
        init_partial: whether tensors that `init` lacks, or has in another shape, stay at their
            initial values; false refuses such weights.
        resume: true continues the run in the folder; false starts a new run, and refuses a folder
            that holds one; auto continues the run if the folder holds one, else starts it.
        config: YAML of these settings, which is written to config.yaml.

    Raises:
        ValueError: A setting is out of range, or the data does not fit the process.

    Example:
        Trainer(
            network=lambda: MyNetwork(),
            data=my_dataset,
            process=Process(shape=(3, 32, 32)),
            optimizer=torch.optim.AdamW,
            folder=Path("runs/mine"),
            steps=10_000,
        ).train()
    """

    network: NetworkFactory
    data: Dataset  # type: ignore[type-arg]  # jsonargparse reads the bare class
    process: Process
    optimizer: OptimizerFactory
    folder: Path
    steps: int
    objective: Objective = field(default_factory=Objective)
    lr: LearningRate = field(default_factory=LearningRate)
    decay_only_matrices: bool = False
    ema: Decay = field(default_factory=Decay)
    validation: Validation = field(default_factory=Validation)
    snapshots: Snapshots = field(default_factory=Snapshots)
    batch_size: int = 128
    accumulation: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    clip: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    compute: Compute = field(default_factory=Compute)
    seed: int = 0
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = True
    patience: int = 10
    rank_timeout: int = 1800
    log_every: int = 20
    sample_every: int = 0
    previews: Previews = field(default_factory=Previews)
    save_every: int = 1000
    keep: int = 2
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    tracking: Tracking = field(default_factory=Tracking)
    picture: Picture = "auto"
    sampler: Sampler = field(default_factory=lambda: DEFAULT_SAMPLER)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    sample_steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    init: str = ""
    init_weights: Literal["averaged", "raw"] = "averaged"
    init_partial: bool = False
    resume: bool | Literal["auto"] = False
    config: str = ""

    def __post_init__(self) -> None:
        for name, minimum in MINIMUM.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {minimum}")
        if self.steps > MAXIMUM_STEPS:
            raise ValueError(f"steps is {self.steps}, expected at most {MAXIMUM_STEPS}")
        if self.resume not in (True, False, "auto"):
            raise ValueError(f"resume is {self.resume!r}, expected true, false or auto")
        if self.init and not (self.resume and self.run.config.exists()):
            check_source(self.init, self.init_weights)
            check_estimate(self.init, self.process)
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a positive norm (.inf does not clip)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected within [0, 2^63)")
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "process", process_with_captions(self.process, self.source))
        self.objective.check(self.process, self.source.inputs)
        if self.source.has_noise:
            self.objective.check_paired_noise()
        is_learned = self.process.levels == "learned" or self.process.estimate == "encoded_mean"
        if is_learned and self.sharding.strategy != "none":
            raise ValueError(
                f"sharding.strategy is {self.sharding.strategy}, but learned levels and encoders "
                "are computed outside of the network's forward, from whole weights: set it to none"
            )
        check_data(self.source, self.process)
        check_held_out(self.validation.source, self.source)
        self.validation.check(self.process)
        if self.validation.data is not None and self.objective.is_surrogate:
            raise ValueError(
                f"validation.data is set, but only the gradient of the loss of "
                f"{type(self.objective).__name__} has a meaning, which is not measured on held-out "
                "data: leave validation.data out, and compare samples (diffcore evaluate)"
            )
        if self.sample_every:
            self._check_previews()

    @cached_property
    def run(self) -> Run:
        """Paths of the files in the run's folder."""
        return Run(self.folder)

    @cached_property
    def source(self) -> DataSource:
        """The data with the defaults of every optional member."""
        return as_data_source(self.data)

    def train(self) -> TrainState:
        """Train to `steps`, from the start or from the newest checkpoint.

        SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint after the current step and end the
        program, if this is the main thread; a second Ctrl-C ends it at once.

        Returns:
            The state after the last step.

        Raises:
            ValueError: The run cannot start or resume, another process trains in the folder, too
                many steps were not finite, or another rank ended or did not answer in
                `rank_timeout` seconds.
            SystemExit: A signal ended the run; the status is 128 plus the number of the signal.
            KeyboardInterrupt: Ctrl-C ended the run.
        """
        accelerator = build_accelerator(self)
        reporter = Reporter(self, accelerator)
        with explain_lost_ranks(accelerator, self.rank_timeout), ExitStack() as stack:
            lock = lock_folder(self.run.folder, reporter.message)
            run_on_first_rank(accelerator, lambda: stack.enter_context(lock))
            # Text encoders are released before the network is built.
            run_on_first_rank(accelerator, lambda: reporter.prompt_wrapper)
            state = build_state(self, accelerator)
            start_or_resume(state, reporter.message)
            reporter.describe_devices()
            reporter.trackers.start(state.step)
            signal = loop.run(state, reporter)
            accelerator.end_training()
        if signal:
            end_by_signal(signal)
        return state

    def _check_previews(self) -> None:
        try:
            check_drawable(self.source, self.process, self.picture)
        except ValueError as error:
            raise ValueError(
                f"sample_every is {self.sample_every}, but {error}; or set sample_every: 0"
            ) from None
        shown = self.previews.samples(self.source, self.process, self.picture)
        labels = torch.tensor(shown.condition or [0] * len(shown.seeds))
        records = self.process.conditions.items()
        zeros = {name: torch.zeros(()).expand(len(labels), *each.shape) for name, each in records}
        process = self.previews.process(self.process)
        generation.check_sampling(
            process,
            self.grid.knots(self.process.schedule, self.sample_steps),
            shown.seeds,
            batch_condition(process, labels, zeros),
            self.guidance,
            1,
            self.sampler,
        )
