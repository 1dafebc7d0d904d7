"""What the library costs beside bare PyTorch: the same work by both, in alternation, in one process.

    r_i = (seconds of ours in pair i) / (seconds of the bare code in pair i),   reported: the median of r and its interval

The interval is [r_(k), r_(n+1-k)] of the sorted ratios with the largest k that covers the median with probability
1 - 2 P(Bin(n, ½) < k) ≥ 95 %, whatever the distribution of the scatter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.guidance import CFG, Guidance, Interval
from diffcore.io.parser import ComponentParser
from diffcore.objectives.objective import SampleKey
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample, with_levels
from diffcore.sampling.loop import integrate
from diffcore.schedules import Trailing, UniformLogSNR
from diffcore.training.data import Digits
from diffcore.training.loop import advance, training_batches
from diffcore.training.state import TrainState, build_state
from diffcore.training.trainer import Trainer

RECIPE = files("diffcore.recipes") / "digits.yaml"
FEWEST_PAIRS = 30
WARMUP_PAIRS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Seconds of each pair's two sides.

    Args:
        name: of the work.
        bound: the ratio that ours should not exceed.
        ours: seconds of one unit of work by the library.
        bare: seconds of the same by bare PyTorch.
    """

    name: str
    bound: float
    ours: tuple[float, ...]
    bare: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Ours over bare, pair by pair."""
        return [ours / bare for ours, bare in zip(self.ours, self.bare, strict=True)]

    @property
    def ratio(self) -> float:
        """The median over pairs."""
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median of all such pairs lies, with at least the confidence of `CONFIDENCE`."""
        return median_interval(self.ratios)

    def row(self) -> str:
        """A row of the table."""
        ours, bare = 1000 * median(self.ours), 1000 * median(self.bare)
        low, high = self.interval
        return f"| {self.name} | {ours:.1f} | {bare:.1f} | {self.ratio:.3f} | {low:.3f} to {high:.3f} | {self.bound} |"

    def facts(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "interval": self.interval,
            "coverage": coverage(len(self.ours)),
        }


def median_rank(count: int, confidence: float = CONFIDENCE) -> int:
    """The largest k such that the k-th smallest and k-th largest of `count` values enclose the median so confidently.

    Raises:
        ValueError: there is none, not even for the extremes (fewer than 6 values at 95 %).
    """
    outside, rank = 0.0, 0
    while 2 * (outside + math.comb(count, rank) / 2**count) <= 1 - confidence:
        outside += math.comb(count, rank) / 2**count
        rank += 1
    if not rank:
        raise ValueError(
            f"{count} values have no interval of the median at {confidence:.0%}: measure more"
        )
    return rank


def coverage(count: int) -> float:
    """The probability with which the interval of `count` values covers the median."""
    return 1 - 2 * sum(math.comb(count, j) for j in range(median_rank(count))) / 2**count


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that enclose the median of the values' distribution."""
    rank, ordered = median_rank(len(values)), sorted(values)
    return ordered[rank - 1], ordered[-rank]


def interleaved(
    ours: Callable[[], object],
    bare: Callable[[], object],
    pairs: int,
    warmup: int = WARMUP_PAIRS,
    clock: Callable[[], float] = perf_counter,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each side over `pairs` pairs, ours first in even pairs and bare first in odd; warm-up pairs dropped."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(warmup + pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            start = clock()
            (ours, bare)[side]()
            seconds[side].append(clock() - start)
    return tuple(seconds[0][warmup:]), tuple(seconds[1][warmup:])


def overhead(pairs: int = 40, steps: int = 1, rows: int = 64) -> list[Comparison]:
    """Training and sampling of the digits network against bare PyTorch, on the device where the trainer trains.

    Args:
        pairs: measured pairs of each, at least `FEWEST_PAIRS`.
        steps: training steps of one measurement.
        rows: samples of one measurement; the network sees twice as many rows.

    Raises:
        ValueError: too few of them.
    """
    check_pairs(pairs)
    if steps < 1 or rows < 1:
        raise ValueError(f"steps and rows are {steps} and {rows}, expected at least 1")
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        return [
            training(state, pairs, steps),
            draws(state, pairs),
            sampling(state, pairs, rows),
        ]


def training(state: TrainState, pairs: int, steps: int) -> Comparison:
    """One optimizer step: batch, draws, loss, gradient, clipping, AdamW, averaged weights, losses kept."""
    bare = BareLoop(state.accelerator.device)
    seconds = interleaved(_repeated(stepper(state), steps), _repeated(bare.step, steps), pairs)
    each = (tuple(value / steps for value in side) for side in seconds)
    return Comparison(f"training step, batch {state.settings.batch_size}", 1.03, *each)


def draws(state: TrainState, pairs: int, warmup: int = WARMUP_PAIRS) -> Comparison:
    """What a step draws (levels, noise, dropout, and their weights) over the whole step: a part measured as its own time."""
    settings = state.settings
    objective, process = settings.objective, settings.process
    index, steps = torch.arange(settings.batch_size), count()

    def drawn() -> None:
        place = SampleKey(settings.seed, next(steps), index, settings.batch_size)
        level = objective.draw(
            process, place, state.accelerator.device, state.level_sampler.learned
        ).level
        assert isinstance(level.logsnr, Tensor)
        objective.weight.on(process.prediction, level.logsnr, process.sigma_data)
        _synchronize()

    seconds = interleaved(drawn, _repeated(stepper(state), 1), pairs, warmup)
    return Comparison(f"draws of a step over the step, batch {settings.batch_size}", 0.01, *seconds)


def sampling(state: TrainState, pairs: int, rows: int) -> Comparison:
    """DDIM with classifier-free guidance, from seeds to samples, against as many forward passes of as many rows."""
    network, process, device = (
        state.network.eval(),
        state.settings.process,
        state.accelerator.device,
    )
    denoiser, n = Denoiser(network, process).eval(), state.settings.sample_steps
    labels = torch.arange(rows) % process.classes
    x = torch.randn(2 * rows, *process.shape, device=device)
    classes = torch.cat((labels, torch.full_like(labels, process.classes))).to(device)
    times = [torch.full((2 * rows,), 1000 * (n - i) / n - 1, device=device) for i in range(n)]

    def ours() -> None:
        sample(
            denoiser,
            DDIM(),
            Trailing(),
            n,
            seeds=range(rows),
            condition=labels,
            guidance=CFG(1.5),
            batch_size=rows,
        )

    @torch.no_grad()
    def bare() -> None:
        for time in times:
            network(x, time, class_labels=classes)
        _synchronize()

    name = f"sampling, {rows} samples, {n} steps of {2 * rows} rows"
    return Comparison(name, 1.02, *interleaved(ours, bare, pairs))


def intervals(pairs: int = 30, rows: int = 64) -> list[Comparison]:
    """Interval(CFG) against CFG over the same knots: as the evaluations fall, so should the time; the bound is their ratio.

    Args:
        pairs: measured pairs of each.
        rows: samples of one measurement; a guided evaluation sees twice as many rows.

    Raises:
        ValueError: too few of them.
    """
    check_pairs(pairs)
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    with TemporaryDirectory() as folder:
        state = digits_state(Path(folder))
        denoiser = Denoiser(state.network, state.settings.process).eval()
        return [_interval(denoiser, bounds, pairs, rows) for bounds in ((0.285, 2.415), (0.5, 1.0))]


def _interval(denoiser: Denoiser, bounds: tuple[float, float], pairs: int, rows: int) -> Comparison:
    rule = Interval(CFG(3.0), sigma=bounds)
    knots = with_levels(
        UniformLogSNR(-9.0, 7.0).knots(denoiser.process.schedule, 20), rule.levels(denoiser.process)
    )
    labels, used = torch.arange(rows) % denoiser.process.classes, {}

    def drawn(guidance: Guidance) -> None:
        noise = Noise(torch.arange(rows), denoiser.process.shape, denoiser.device)
        with torch.no_grad():
            x = noise.first_sample(knots[0], denoiser.process.sigma_data)
            _, used[guidance] = integrate(
                denoiser, DDIM(), x, knots, noise, guidance, labels.to(denoiser.device)
            )
        _synchronize()

    seconds = interleaved(partial(drawn, rule), partial(drawn, CFG(3.0)), pairs)
    counts = f"{used[rule]} evaluations of {used[CFG(3.0)]}"
    return Comparison(
        f"Interval {bounds} over CFG, {counts}", round(used[rule] / used[CFG(3.0)], 3), *seconds
    )


# The library's side ----------------------------------------------------------------------------------------------


def digits_state(folder: Path) -> TrainState:
    """The state of the digits recipe at step 0, with `folder` as its own."""
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, skip={"config"})
    settings = parser.parse_args(
        ["--config", str(RECIPE), "--folder", str(folder), "--trackers", "[]"]
    )
    fields = parser.instantiate(settings).as_dict()
    return build_state(Trainer(**{k: v for k, v in fields.items() if k != "config"}))


def stepper(state: TrainState) -> Callable[[], None]:
    """Takes one step of a run at each call; a benchmark may outlast the recipe's steps."""
    batches = training_batches(state, 2**31)
    return partial(advance, state, state.denoiser(state.modules[0]).train(), batches)


# The bare side -----------------------------------------------------------------------------------------------------


class BareLoop:
    """The digits recipe as a careful user of PyTorch writes it: a network, a loss, and a loop; nothing of diffcore but data.

    Args:
        device: where the network and the data are.
    """

    def __init__(self, device: torch.device) -> None:
        recipe = yaml.safe_load(RECIPE.read_text())
        self.recipe, self.batch, self.device = recipe, recipe["batch_size"], device
        digits = Digits()
        self.x0, self.labels = digits.x0.to(device), digits.labels.to(device)
        self.network = bare_network(recipe).to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), **recipe["optimizer"]["init_args"]
        )
        self.shadow = [parameter.detach().clone() for parameter in self.network.parameters()]
        self.taken, self.order = 0, torch.zeros(0, dtype=torch.int64)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def step(self) -> None:
        """Draw a batch, levels, noise and who loses the label, and step."""
        x0, labels = self.next_batch()
        places = torch.arange(self.batch, device=self.device) / self.batch
        t = (torch.rand((), device=self.device) + places) % 1
        dropped = torch.rand(self.batch, device=self.device) < self.recipe["process"]["dropout"]
        labels = labels.masked_fill(dropped, self.recipe["process"]["classes"])
        self.kept.append(self.update(x0, labels, t, torch.randn_like(x0)))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next of a random permutation's rows, and of the next permutation's."""
        if len(self.order) < self.batch:
            self.order = torch.cat((self.order, torch.randperm(len(self.x0))))
        rows, self.order = self.order[: self.batch].to(self.device), self.order[self.batch :]
        return self.x0[rows], self.labels[rows]

    def update(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step and one of the averaged weights: losses and gradient norm."""
        losses = self.losses(x0, labels, t, noise)
        losses.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        self.average()
        return losses.detach(), norm

    def losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Min-SNR on v: min(SNR, γ) / (SNR + 1) = min(α², γ σ²) with α = cos(πt/2), σ = sin(πt/2)."""
        alpha, sigma = (
            torch.cos(t * (math.pi / 2)).view(-1, 1, 1, 1),
            torch.sin(t * (math.pi / 2)).view(-1, 1, 1, 1),
        )
        gamma = self.recipe["objective"]["weight"]["init_args"]["gamma"]
        weight = torch.minimum(alpha**2, gamma * sigma**2)
        v = self.network(alpha * x0 + sigma * noise, 1000 * t - 1, class_labels=labels).sample
        return (weight * (v - (alpha * noise - sigma * x0)) ** 2).flatten(1).mean(1)

    def lr(self) -> float:
        """Linear warm-up, then half a cosine."""
        peak, warmup, steps = (
            self.recipe["lr"]["peak"],
            self.recipe["lr"]["warmup"],
            self.recipe["steps"],
        )
        progress = min(max(self.taken - warmup, 0) / (steps - warmup), 1)
        return float(
            peak * min(1, (self.taken + 1) / warmup) * (1 + math.cos(math.pi * progress)) / 2
        )

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights, in float32, towards the network's."""
        decay = min(self.recipe["ema"]["decay"], (1 + self.taken) / (10 + self.taken))
        torch._foreach_lerp_(self.shadow, list(self.network.parameters()), 1 - decay)


def bare_network(recipe: dict[str, Any]) -> nn.Module:
    """The recipe's network, by its class's own constructor."""
    import diffusers

    name = recipe["network"]["class_path"].removeprefix("diffusers.")
    network: nn.Module = getattr(diffusers, name)(**recipe["network"]["init_args"])
    return network


def check_pairs(pairs: int) -> None:
    """Raise where so few pairs tell nothing."""
    if pairs < FEWEST_PAIRS:
        raise ValueError(
            f"pairs is {pairs}, expected at least {FEWEST_PAIRS}: fewer do not tell 1.03 from the scatter"
        )


def _repeated(step: Callable[[], object], steps: int) -> Callable[[], None]:
    """`steps` steps, waited for."""

    def block() -> None:
        for _ in range(steps):
            step()
        _synchronize()

    return block


def _synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
