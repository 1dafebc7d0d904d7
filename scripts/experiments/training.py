"""A study of training on the digits: how soon each combination of schedule, weight and objective makes good samples.

Every run has the same network, data order, noise and learning rate; after each of a few numbers of steps the averaged network
samples 500 digits over the same λ knots, and their Fréchet distance to the training scans and to the held-out ones is taken.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.evaluation.digits import scan
from diffcore.evaluation.metrics import frechet_distance
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Levels, Objective
from diffcore.objectives.weighting import MSE, P2, Debiased, MinSNR
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Discrete, Laplace, Normal, Schedule, UniformLogSNR
from diffcore.training.data import Digits
from diffcore.training.ema import Decay
from diffcore.training.loop import advance, training_batches
from diffcore.training.lr import LearningRate
from diffcore.training.state import TrainState, build_state
from diffcore.training.trainer import Trainer

POINTS = (100, 200, 400, 800)
KNOTS = UniformLogSNR(-9.0, 7.0)  # within every schedule compared
BATCH = 64


@dataclass(frozen=True)
class Arm:
    """What is compared: a schedule, a prediction type and an objective."""

    schedule: Schedule
    prediction: PredictionType
    objective: Objective


ARMS: dict[str, Arm] = {
    "linear, ε": Arm(Discrete(), "epsilon", Objective(MSE("epsilon"))),
    "cosine, v": Arm(Cosine(), "v_prediction", Objective(MSE("v_prediction"))),
    "cosine, v, Min-SNR": Arm(Cosine(), "v_prediction", Objective(MinSNR())),
    "cosine, v, Debiased": Arm(Cosine(), "v_prediction", Objective(Debiased())),
    "cosine, v, P2": Arm(Cosine(), "v_prediction", Objective(P2())),
    "Laplace(0, 0.5), v": Arm(Laplace(), "v_prediction", Objective(MSE("v_prediction"))),
    "Normal(0, 2), v": Arm(Normal(), "v_prediction", Objective(MSE("v_prediction"))),
    "cosine, v, DDPM-IP": Arm(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), perturbation=0.1)
    ),
    "cosine, v, OT": Arm(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), coupling=OptimalTransport(BATCH))
    ),
    "cosine, v, second moment": Arm(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), resampler=SecondMoment())
    ),
    "cosine, v, learned": Arm(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), resampler=LearnedSchedule())
    ),
}


def network(channels: tuple[int, int] = (24, 56)) -> torch.nn.Module:
    """Half a million parameters, class-conditional; with (16, 32) a third of them."""
    from diffusers import UNet2DModel

    made: torch.nn.Module = UNet2DModel(  # type: ignore[no-untyped-call, assignment]
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=channels[1] // 2,
        num_class_embeds=11,
    )
    return made


def trainer(
    arm: Arm,
    levels: Levels,
    seed: int,
    folder: Path,
    steps: int,
    network: Callable[[], torch.nn.Module] = network,
) -> Trainer:
    """A run of an arm."""
    process = Process(
        arm.schedule, arm.prediction, shape=(1, 8, 8), sigma_data=0.75, classes=10, dropout=0.1
    )
    return Trainer(
        network=network,
        data=Digits("train"),
        process=process,
        optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.99)),
        folder=folder,
        steps=steps,
        objective=replace(arm.objective, levels=levels),
        lr=LearningRate(1e-3, warmup=50),
        ema=Decay(0.995),
        batch_size=BATCH,
        seed=seed,
        trackers=[],
    )


def averaged(settings: Trainer) -> Denoiser:
    """The averaged network of a run after its last step; nothing is written."""
    *_, state = stepped(settings)
    state.network.load_state_dict(state.average.shadow)
    return Denoiser(state.network, settings.process).eval()


def stepped(settings: Trainer) -> Iterator[TrainState]:
    """The state of a run after each of its steps; nothing is written."""
    state = build_state(settings)
    denoiser = state.denoiser(state.modules[0]).train()
    batches = training_batches(state, settings.steps)
    while state.step < settings.steps:
        advance(state, denoiser, batches)
        yield state


def measure(
    arm: Arm, levels: Levels, seed: int, points: Iterable[int] = POINTS, per_label: int = 50
) -> dict[int, Any]:
    """Fréchet distances (to the training scans, to the held-out ones) after each number of steps."""
    points, found = sorted(points), {}
    with TemporaryDirectory() as folder:
        settings = trainer(arm, levels, seed, Path(folder), points[-1])
        for state in stepped(settings):
            if state.step in points:
                with state.average.applied():
                    denoiser = Denoiser(state.network, settings.process)
                    found[state.step] = distances(denoiser, seed, per_label)
    return found


def distances(denoiser: Denoiser, seed: int, per_label: int) -> tuple[float, float]:
    """Of samples of every digit to the training scans and to the held-out scans, in pixels."""
    labels = torch.arange(10).repeat_interleave(per_label)
    seeds = range(seed * 10**6, seed * 10**6 + len(labels))
    made: Tensor = sample(
        denoiser, DDIM(), KNOTS, 20, seeds=seeds, condition=labels, batch_size=100
    ).x
    train, test = (
        frechet_distance(scan(made), scan(Digits(split).x0)) for split in ("train", "test")
    )
    return train, test


def study(
    out: Path, seeds: Iterable[int], arms: Mapping[str, Arm] = ARMS, points: Iterable[int] = POINTS
) -> Iterator[str]:
    """Measure every arm, levels and seed that `out` does not hold yet, a line of JSON each."""
    done = {(row["arm"], row["levels"], row["seed"]) for row in rows(out)}
    for seed in seeds:
        for name, arm in arms.items():
            for levels in ("independent", "stratified"):
                if (name, levels, seed) not in done:
                    found = measure(arm, levels, seed, points)
                    row = json.dumps(
                        {"arm": name, "levels": levels, "seed": seed, "distances": found},
                        ensure_ascii=False,
                    )
                    with out.open("a") as file:
                        file.write(row + "\n")
                    yield row


def rows(out: Path) -> list[dict[str, Any]]:
    """What was measured."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def table(measured: list[dict[str, Any]], to: int) -> str:
    """Mean over seeds, and half the range, of the distances to the training (0) or the held-out (1) scans, as Markdown."""
    points = sorted({int(point) for row in measured for point in row["distances"]})
    lines = ["| arm | levels | " + " | ".join(f"{point} steps" for point in points) + " |"]
    lines.append("|---|---|" + "---|" * len(points))
    for arm, levels in dict.fromkeys((row["arm"], row["levels"]) for row in measured):
        own = [row["distances"] for row in measured if (row["arm"], row["levels"]) == (arm, levels)]
        cells = [_cell([found[str(point)][to] for found in own]) for point in points]
        lines.append(f"| {arm} | {levels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(measured: list[dict[str, Any]], out: Path) -> None:
    """Mean distance over seeds against steps, to the training and to the held-out scans; dashed: independent levels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(row["arm"] for row in measured))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for place, arm in enumerate(arms):
        colour, mark = (
            mpl.colormaps["viridis"](0.9 * place / max(len(arms) - 1, 1)),
            "os^Dvpx*P+h"[place % 11],
        )
        for levels, style in (("stratified", "-"), ("independent", "--")):
            own = [
                row["distances"] for row in measured if (row["arm"], row["levels"]) == (arm, levels)
            ]
            points = sorted(map(int, own[0])) if own else []
            for to, axis in enumerate(axes):
                curve = [mean(found[str(point)][to] for found in own) for point in points]
                axis.plot(
                    points,
                    curve,
                    style,
                    color=colour,
                    marker=mark,
                    label=arm if (to, style) == (0, "-") else None,
                )
    for axis, (scans, span) in zip(
        axes, {"training": (20, 250), "held-out": (90, 250)}.items(), strict=True
    ):
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="steps",
            ylabel=f"Fréchet distance to the {scans} scans",
            ylim=span,
        )
        axis.set_xticks(points, map(str, points))
        axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"
