"""A study of zero terminal SNR: which mean brightness the samples can have, by schedule and by where sampling begins.

    x_0 = m + (1 - |m|) (tint + waves) / 2,   m uniform in [-1, 1]

Tint and waves have no mean, so m is the mean over pixels and channels. A schedule that ends at α_T > 0 shows a network some of
m in its noisiest training images, and sampling begins where there is none of it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffcore.cli.figures import create_figure, save_figure
from diffcore.core.denoiser import Denoise
from diffcore.core.noise import Stream, uniform
from diffcore.core.oracle import Empirical
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Discrete, Grid, Leading, Schedule, Trailing, ZeroTerminalSNR
from diffcore.training.ema import Decay
from diffcore.training.lr import LearningRate
from diffcore.training.trainer import Trainer
from experiments.training import averaged, rows

SIZE = 16
IMAGES = 4000
WAVES = 3
STEPS = 50
TRAINING = 1000
COUNT = 500
END = 0.6
"""Beyond ±END lies 0.4 of the data."""
BINS = 44
SPAN = 1.1
FLAWED = Discrete("scaled_linear", None, 0.00085, 0.012)
"""Stable Diffusion's table: α_T = 0.068."""
GRIDS: dict[str, Grid] = {"Leading(1)": Leading(1), "Trailing()": Trailing()}


class Arm(NamedTuple):
    """A schedule, and what a network of it outputs; none for the exact denoiser of the training images."""

    schedule: Schedule
    prediction: PredictionType | None


ARMS = {
    "scaled_linear, ε": Arm(FLAWED, "epsilon"),
    "scaled_linear, v": Arm(FLAWED, "v_prediction"),
    "zero terminal SNR, v": Arm(ZeroTerminalSNR(FLAWED), "v_prediction"),
    "scaled_linear, exact": Arm(FLAWED, None),
    "zero terminal SNR, exact": Arm(ZeroTerminalSNR(FLAWED), None),
}


class Fields(Dataset[Tensor]):
    """Smooth fields of colour with a mean brightness between black and white.

    Args:
        count: how many; the first ones are the same whatever the number.
        seed: of all of them.
    """

    def __init__(self, count: int = IMAGES, seed: int = 0) -> None:
        u = uniform(seed, Stream.ORACLE, torch.arange(count), 2 + 6 * WAVES).float()
        m, hue, waves = 2 * u[:, 0] - 1, u[:, 1], u[:, 2:].unflatten(1, (WAVES, 6))
        channel = torch.arange(3) / 3
        tint = torch.cos(2 * math.pi * (hue[:, None] + channel))[..., None, None]
        shape = (tint + _waves(waves)) / 2
        self.x0 = m.view(-1, 1, 1, 1) + (1 - m.abs()).view(-1, 1, 1, 1) * shape

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> Tensor:
        return self.x0[index]


def _waves(u: Tensor) -> Tensor:
    """(N, 3, SIZE, SIZE) cosines of one or two periods, within [-1, 1] and without mean, of u (N, WAVES, 6) in (0, 1)."""
    place = torch.arange(SIZE) / SIZE
    across, down = 1 + (2 * u[..., 0]).floor(), (3 * u[..., 1]).floor()
    phase = (
        across[..., None, None] * place
        + down[..., None, None] * place[:, None]
        + u[..., 2, None, None]
    )
    heights = u[..., 3:] / WAVES
    return torch.einsum("nwc,nwij->ncij", heights, torch.cos(2 * math.pi * phase))


def brightness(x: Tensor) -> Tensor:
    """(N,) mean over pixels and channels."""
    return x.flatten(1).mean(1)


def network() -> nn.Module:
    """0.18 million parameters."""
    from diffusers import UNet2DModel

    made: nn.Module = UNet2DModel(  # type: ignore[no-untyped-call, assignment]
        sample_size=SIZE,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    return made


def _process(schedule: Schedule, prediction: PredictionType) -> Process:
    return Process(
        schedule, prediction, shape=(3, SIZE, SIZE), sigma_data=1.0
    )  # begins with N(0, I), as pipelines do


def denoiser(arm: Arm, seed: int, steps: int = TRAINING) -> Denoise:
    """A run's averaged network, or the exact denoiser of what it was trained on."""
    if arm.prediction is None:
        return Empirical(Fields().x0, process=_process(arm.schedule, "v_prediction"))
    with TemporaryDirectory() as folder:
        return averaged(
            Trainer(
                network=network,
                data=Fields(),
                process=_process(arm.schedule, arm.prediction),
                optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.99)),
                folder=Path(folder),
                steps=steps,
                objective=Objective(MSE(arm.prediction)),
                lr=LearningRate(1e-3, warmup=50),
                ema=Decay(0.995),
                batch_size=64,
                seed=seed,
                trackers=[],
            )
        )


def measure(made: Tensor) -> dict[str, Any]:
    """What there is to say of (N,) mean brightnesses.

    std: 0.577 of the data; beyond: the share beyond ±END; distance: Wasserstein-1, ∫ |F⁻¹(q) - (2q - 1)| dq, to the uniform
    distribution (0.02 of as many images of the data); histogram: how many in each of BINS from -SPAN to SPAN.
    """
    quantiles = 2 * (torch.arange(len(made)) + 0.5) / len(made) - 1
    return {
        "std": made.std().item(),
        "beyond": (made.abs() > END).double().mean().item(),
        "distance": (made.sort().values - quantiles).abs().mean().item(),
        "histogram": torch.histc(made.clamp(-SPAN, SPAN), BINS, -SPAN, SPAN).int().tolist(),
    }


def study(
    out: Path, seeds: Iterable[int], steps: int = TRAINING, count: int = COUNT
) -> Iterator[str]:
    """Measure every arm, grid and seed that `out` does not hold yet, a line of JSON each."""
    done = {(row["arm"], row["seed"]) for row in rows(out)}
    for seed in seeds:
        for name, arm in ARMS.items():
            if (name, seed) not in done:
                lines = [
                    json.dumps(row, ensure_ascii=False)
                    for row in _measured(name, arm, seed, steps, count)
                ]
                with out.open("a") as file:
                    file.writelines(line + "\n" for line in lines)
                yield from lines


def _measured(name: str, arm: Arm, seed: int, steps: int, count: int) -> Iterator[dict[str, Any]]:
    """A row a grid."""
    trained = denoiser(arm, seed, steps)
    for grid, knots in GRIDS.items():
        made = sample(
            trained,
            DDIM(),
            knots,
            STEPS,
            seeds=range(seed * 10**6, seed * 10**6 + count),
            batch_size=100,
        ).x
        yield {"arm": name, "grid": grid, "seed": seed, **measure(brightness(made))}


def real(count: int = COUNT) -> dict[str, Any]:
    """The same of as many images of the data that no network has seen."""
    return {"arm": "images", "grid": "", "seed": 0, **measure(brightness(Fields(count, seed=1).x0))}


def table(measured: list[dict[str, Any]]) -> str:
    """Mean over seeds, and half the range, as Markdown."""
    lines = [
        "| schedule, network | grid | std | beyond ±0.6 | beyond ±1 | distance |",
        "|---|---|---|---|---|---|",
    ]
    for arm, grid in dict.fromkeys((row["arm"], row["grid"]) for row in measured):
        own = [row for row in measured if (row["arm"], row["grid"]) == (arm, grid)]
        found = [
            (row["std"], row["beyond"], outside(row["histogram"]), row["distance"]) for row in own
        ]
        lines.append("| " + " | ".join([arm, grid, *map(_cell, zip(*found, strict=True))]) + " |")
    return "\n".join(lines)


def outside(histogram: list[int]) -> float:
    """The share beyond ±1, where there are no images."""
    bins = round(BINS * (SPAN - 1) / (2 * SPAN))
    return sum(histogram[:bins] + histogram[-bins:]) / sum(histogram)


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def draw(measured: list[dict[str, Any]], out: Path) -> None:
    """Histograms of the mean brightness, over all seeds, a panel an arm (dashed: the data). The last bin holds the rest."""
    made, axes = create_figure(len(ARMS), width=3.2, height=3.4)
    edges = torch.linspace(-SPAN, SPAN, BINS + 1).tolist()
    for axis, arm in zip(axes, ARMS, strict=True):
        for grid, colour in zip(GRIDS, ("0.75", "k"), strict=True):
            own = [row["histogram"] for row in measured if (row["arm"], row["grid"]) == (arm, grid)]
            density = torch.tensor(own, dtype=torch.float64).sum(0)
            density = density / density.sum() * BINS / (2 * SPAN)
            label = grid if arm == next(iter(ARMS)) else None
            axis.stairs(
                density.tolist(), edges, fill=colour != "k", color=colour, label=label, lw=1.5
            )
        axis.plot([-1, -1, 1, 1], [0, 0.5, 0.5, 0], "--", color="0.4", lw=1)
        axis.set(title=arm, xlabel="mean brightness", ylim=(0, 1.4))
    axes[0].set_ylabel("density")
    save_figure(made, out)
