"""The cost of diffcore beside bare PyTorch and diffusers: training, random draws, and sampling."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.comparison import (
    WARMUP_PAIRS,
    Comparison,
    check_pairs,
    processor_clock,
    repeat,
    synchronize,
    time_pairs,
)
from benchmarks.sides.bare_loop import RECIPE, BareLoop
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.guidance import CFG, Guidance, Interval
from diffcore.io.parser import ComponentParser
from diffcore.objectives.draw import SampleKey
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Trailing, UniformLogSNR
from diffcore.training.construction import build_state
from diffcore.training.loop import advance, training_batches
from diffcore.training.state import TrainState
from diffcore.training.trainer import Trainer

__all__ = [
    "compare_draws",
    "compare_sampling",
    "compare_training",
    "digits_state",
    "measure_intervals",
    "measure_loops",
    "measure_memory",
    "measure_overhead",
    "measure_training",
    "print_peak_memory",
    "step_function",
]


def measure_overhead(pairs: int = 40, steps: int = 1, samples: int = 64) -> list[Comparison]:
    """Compare training and sampling of the digits with bare PyTorch, on the trainer's device.

    Args:
        pairs: measured pairs of each comparison, at least 30.
        steps: training steps of one measurement.
        samples: samples of one measurement; guidance doubles them in the network.

    Returns:
        The comparisons.

    Raises:
        ValueError: a number is too small.
    """
    check_pairs(pairs)
    if steps < 1 or samples < 1:
        raise ValueError(f"steps and samples are {steps} and {samples}, expected at least 1")
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        return [
            compare_training(state, pairs, steps),
            compare_draws(state, pairs),
            compare_sampling(state, pairs, samples),
        ]


def measure_training(pairs: int = 60, steps: int = 1) -> list[Comparison]:
    """Compare training steps with bare PyTorch loops and with the example of diffusers.

    The recipe has the fused AdamW of torch. The example of diffusers and the first bare loop have
    torch's default, and the second bare loop has the fused one too.

    Args:
        pairs: measured pairs of each comparison, at least 30.
        steps: training steps of one measurement.

    Returns:
        Seconds of one step, in which a throughput of 0.98 is a ratio of 1 / 0.98. Without an
        accelerator they are processor seconds, which other programs of the machine hardly change.

    Raises:
        ValueError: a number is too small.
    """
    from benchmarks.sides.diffusers_loop import DiffusersLoop

    _check_steps(pairs, steps)
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        device, ours, found = state.accelerator.device, step_function(state), []
        loops: dict[str, tuple[float, Callable[[], BareLoop | DiffusersLoop]]] = {
            "bare PyTorch": (round(1 / 0.98, 3), partial(BareLoop, device)),
            "bare PyTorch with fused AdamW": (round(1 / 0.98, 3), partial(BareLoop, device, True)),
            "diffusers' train_unconditional": (1.0, DiffusersLoop),
        }
        for name, (bound, build) in loops.items():
            seconds = _time_steps(ours, build().step, pairs, steps, processor_clock())
            found.append(Comparison(f"training step beside {name}", bound, *seconds))
            state.window.restore(None)
        return found


def measure_loops(
    loops: Mapping[str, Callable[[], BareLoop]], pairs: int = 40, steps: int = 1
) -> tuple[list[Comparison], list[str]]:
    """Compare training steps with loops of other libraries.

    Args:
        loops: functions that build a loop, by the name of the other side.
        pairs: measured pairs of each comparison, at least 30.
        steps: training steps of one measurement.

    Returns:
        Seconds of one step beside each, see `measure_training`; and why others are left out.

    Raises:
        ValueError: a number is too small.
    """
    _check_steps(pairs, steps)
    found, absent = [], []
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        ours = step_function(state)
        for name, build in loops.items():
            try:
                loop = build()
            except ImportError as error:
                absent.append(f"{name} ({error})")
                continue
            seconds = _time_steps(ours, loop.step, pairs, steps, processor_clock())
            found.append(Comparison(f"training step beside {name}", 1.0, *seconds))
            state.window.restore(None)
    return found, absent


def _check_steps(pairs: int, steps: int) -> None:
    check_pairs(pairs)
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")


def _time_steps(
    ours: Callable[[], object],
    other: Callable[[], object],
    pairs: int,
    steps: int,
    clock: Callable[[], float] = perf_counter,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of one step of both sides in each pair of `steps` steps."""
    seconds = time_pairs(repeat(ours, steps), repeat(other, steps), pairs, clock=clock)
    each, others = (tuple(value / steps for value in side) for side in seconds)
    return each, others


def measure_memory(steps: int = 10) -> dict[str, float]:
    """The peak memory of training, each side in a process of its own.

    Args:
        steps: training steps of each side.

    Returns:
        Largest resident memory in MiB by the name of the side.
    """
    folder = str(Path(__file__).parents[1])
    script = "import sys; sys.path.insert(0, {!r}); from benchmarks import training_speed; "
    found = {}
    for side in ("diffcore", "bare PyTorch", "diffusers"):
        code = script.format(folder) + f"training_speed.print_peak_memory({side!r}, {steps})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = float(ended.stdout.split()[-1])
    return found


def print_peak_memory(side: str, steps: int) -> None:
    """Train in this process, and print its largest resident memory in MiB.

    Args:
        side: diffcore, bare PyTorch or diffusers.
        steps: training steps.
    """
    import resource

    from benchmarks.sides.diffusers_loop import DiffusersLoop  # imported by each side

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        if side == "diffcore":
            step = step_function(digits_state(Path(folder)))
        elif side == "diffusers":
            step = DiffusersLoop().step
        else:
            step = BareLoop(torch.device("cpu")).step
        repeat(step, steps)()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def compare_training(state: TrainState, pairs: int, steps: int) -> Comparison:
    """Compare optimizer steps: batch, draws, loss, gradient, clipping, AdamW, averaged weights.

    Args:
        state: run of diffcore.
        pairs: measured pairs.
        steps: steps of one measurement.

    Returns:
        Seconds of one step.
    """
    bare = BareLoop(state.accelerator.device)
    seconds = _time_steps(step_function(state), bare.step, pairs, steps)
    return Comparison(f"training step, batch {state.settings.batch_size}", 1.03, *seconds)


def compare_draws(state: TrainState, pairs: int, warmup: int = WARMUP_PAIRS) -> Comparison:
    """Compare the draws of a step (levels, noise, dropout) and their weights with the whole step.

    Args:
        state: run of diffcore.
        pairs: measured pairs.
        warmup: pairs before them, which are dropped.

    Returns:
        Seconds of the draws, and of the step that contains them.
    """
    settings = state.settings
    objective, process = settings.objective, settings.process
    index, steps = torch.arange(settings.batch_size), count()

    def draw() -> None:
        key = SampleKey(settings.seed, next(steps), index, settings.batch_size)
        draws = objective.draw(process, key, state.accelerator.device, state.level_sampler.learned)
        assert isinstance(draws.level.logsnr, Tensor)
        objective.weight.target_weight(process.prediction, draws.level.logsnr, process.sigma_data)
        synchronize()

    seconds = time_pairs(draw, repeat(step_function(state), 1), pairs, warmup)
    return Comparison(f"draws of a step over the step, batch {settings.batch_size}", 0.01, *seconds)


def compare_sampling(state: TrainState, pairs: int, samples: int) -> Comparison:
    """Compare guided DDIM, from seeds to samples, with as many forward passes of the network.

    Args:
        state: run of diffcore.
        pairs: measured pairs.
        samples: samples of one measurement.

    Returns:
        Processor seconds of all samples.
    """
    settings, device, network = state.settings, state.accelerator.device, state.network.eval()
    process, steps = settings.process, settings.sample_steps
    denoiser = Denoiser(network, process).eval()
    labels = torch.arange(samples) % process.classes
    x = torch.randn(2 * samples, *process.shape, device=device)
    classes = torch.cat((labels, torch.full_like(labels, process.classes))).to(device)
    times = [
        torch.full((2 * samples,), 1000 * (steps - i) / steps - 1, device=device)
        for i in range(steps)
    ]

    def ours() -> None:
        sample(
            denoiser,
            DDIM(),
            Trailing(),
            steps,
            seeds=range(samples),
            condition=labels,
            guidance=CFG(1.5),
            batch_size=samples,
        )

    @torch.no_grad()
    def bare() -> None:
        for time in times:
            network(x, time, class_labels=classes)
        synchronize()

    name = f"sampling, {samples} samples, {steps} steps of {2 * samples} rows"
    return Comparison(name, 1.02, *time_pairs(ours, bare, pairs, clock=processor_clock()))


def measure_intervals(pairs: int = 30, samples: int = 64) -> list[Comparison]:
    """Compare Interval(CFG) with CFG over the same knots.

    The time should fall as the evaluations fall; their ratio is the bound.

    Args:
        pairs: measured pairs of each comparison, at least 30.
        samples: samples of one measurement; guidance doubles them in the network.

    Returns:
        The comparison of each interval.

    Raises:
        ValueError: a number is too small.
    """
    check_pairs(pairs)
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        denoiser = Denoiser(state.network, state.settings.process).eval()
        return [
            _compare_interval(denoiser, bounds, pairs, samples)
            for bounds in ((0.285, 2.415), (0.5, 1.0))
        ]


def _compare_interval(
    denoiser: Denoiser, bounds: tuple[float, float], pairs: int, samples: int
) -> Comparison:
    rule = Interval(CFG(3.0), sigma=bounds)
    knots = insert_levels(
        UniformLogSNR(-9.0, 7.0).knots(denoiser.process.schedule, 20), rule.levels(denoiser.process)
    )
    labels = (torch.arange(samples) % denoiser.process.classes).to(denoiser.device)
    evaluations = {}

    def draw(guidance: Guidance) -> None:
        noise = Noise(torch.arange(samples), denoiser.process.shape, denoiser.device)
        with torch.no_grad():
            x = noise.first_sample(knots[0], denoiser.process.sigma_data)
            _, evaluations[guidance] = integrate(
                denoiser, DDIM(), x, knots, noise, guidance, labels
            )
        synchronize()

    seconds = time_pairs(partial(draw, rule), partial(draw, CFG(3.0)), pairs)
    used, full = evaluations[rule], evaluations[CFG(3.0)]
    name = f"Interval {bounds} over CFG, {used} evaluations of {full}"
    return Comparison(name, round(used / full, 3), *seconds)


def digits_state(folder: Path) -> TrainState:
    """Build the state of the digits recipe at step 0.

    Args:
        folder: folder of the run.

    Returns:
        The state.
    """
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, skip={"config"})
    settings = parser.parse_args(
        ["--config", str(RECIPE), "--folder", str(folder), "--trackers", "[]"]
    )
    fields = parser.instantiate(settings).as_dict()
    return build_state(Trainer(**{k: v for k, v in fields.items() if k != "config"}))


def step_function(state: TrainState) -> Callable[[], None]:
    """Create a function that takes one step of a run at each call.

    Args:
        state: run of diffcore.

    Returns:
        The function, which may be called more often than the recipe has steps.
    """
    batches = training_batches(state, 2**31)
    return partial(advance, state, batches)
