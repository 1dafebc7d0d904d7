"""Named conditions on small problems with a known answer: training, sampling, guidance.

    brightness    digits by their mean: a vector beside the time embedding
    resolution    8x8 digits by their 4x4 means: an image beside x in channels
    moons         points of two half circles by the angle: a vector that an own network reads
    inpainting    digits by their left half: a ControlNet beside a frozen network

Each row is an error that is 0 if samples obey their condition; `without` is the same error of
samples that were drawn without the condition, and `data` that of the data itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset

from diffcore.core.conditioned_networks import ConcatenatedChannels, EmbeddedVectors
from diffcore.core.conditions import ConditionRecord
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance
from diffcore.objectives.objective import Objective
from diffcore.sampling.generation import sample
from diffcore.training.data import Digits
from experiments.study import create_trainer, train_averaged

COUNT = 256
"""Number of samples of each measurement."""
SCALES = (1.0, 2.0)
NOISE = 0.05
"""Standard deviation of points around the half circles."""
HALF = 4
"""Number of columns of a digit that the condition of inpainting contains."""


class Problem(NamedTuple):
    """A data set with a condition, and how far samples are from obeying it.

    Args:
        name: name of the condition.
        record: its record in the process.
        x0: data (N, *shape).
        values: condition (N, ...) of each item.
        error: function (x, values) -> (N,) errors.
        network: function (folder) -> function that builds the network; it may train another one in
            the folder first.
        sigma_data: standard deviation of the data.
        bound: largest absolute value of the data.
    """

    name: str
    record: ConditionRecord
    x0: Tensor
    values: Tensor
    error: Callable[[Tensor, Tensor], Tensor]
    network: Callable[[Path, int], Callable[[], nn.Module]]
    sigma_data: float = 0.75
    bound: float = 1.0

    def process(self, is_conditional: bool = True) -> Process:
        """The process of a network with the condition, or of one without it."""
        named = {self.name: self.record} if is_conditional else {}
        shape = tuple(self.x0.shape[1:])
        bounds = {"low": -self.bound, "high": self.bound}
        return Process(shape=shape, sigma_data=self.sigma_data, conditions=named, **bounds)


class ConditionedItems(Dataset[Any]):
    """Items with one condition.

    Args:
        x0: data (N, *shape).
        name: name of the condition.
        values: its value (N, ...) for each item.
    """

    def __init__(self, x0: Tensor, name: str, values: Tensor) -> None:
        self.x0, self.name, self.values = x0, name, values

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        return self.x0[index], -1, {self.name: self.values[index]}


class PointNetwork(nn.Module):
    """A perceptron on points of the plane that reads an angle; absent angles are learned.

    Args:
        width: width of its layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(2 + 3 + 3, width)
        self.absent = nn.Parameter(torch.zeros(2))
        self.layers = nn.Sequential(
            *(layer for _ in range(3) for layer in (nn.SiLU(), nn.Linear(width, width))),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, time: Tensor, angle: Tensor, angle_absent: Tensor) -> Tensor:
        """The output (B, 2) at x (B, 2), time (B,), and angle (B, 1) where it is not absent."""
        is_absent, t = angle_absent[:, None], time[:, None] / 1000
        direction = torch.cat([(math.pi * angle).cos(), (math.pi * angle).sin()], 1)
        direction = torch.where(is_absent, self.absent, direction)
        features = [x, direction, is_absent.float(), t, (math.pi * t).sin(), (math.pi * t).cos()]
        hidden: Tensor = self.layers(self.first(torch.cat(features, 1)))
        return hidden


def unet(**options: Any) -> nn.Module:
    """Build a small UNet of diffusers for 8x8 images."""
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(  # type: ignore[no-untyped-call, assignment]
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "add_attention": False,
        }
        | options
    )
    return network


def brightness() -> Problem:
    """Digits by the mean of their pixels, in standard deviations from the average."""
    x0 = Digits().x0
    means = x0.flatten(1).mean(1, keepdim=True)
    center, width = means.mean(), means.std()
    return Problem(
        "brightness",
        ConditionRecord((1,), low=-5.0, high=5.0, dropout=0.1, absent="learned"),
        x0,
        (means - center) / width,
        lambda x, values: (x.flatten(1).mean(1) - (center + width * values[:, 0])).abs(),
        lambda folder, steps: partial(
            EmbeddedVectors,
            partial(unet, class_embed_type="identity"),
            {"brightness": 1},
            learned=("brightness",),
        ),
    )


def resolution() -> Problem:
    """Digits of 8x8 pixels by the means of 2x2 pixels."""
    x0 = Digits().x0
    return Problem(
        "low",
        ConditionRecord((1, 4, 4), low=-1.0, high=1.0, dropout=0.1),
        x0,
        avg_pool2d(x0, 2),
        lambda x, values: (avg_pool2d(x, 2) - values).flatten(1).square().mean(1).sqrt(),
        lambda folder, steps: partial(
            ConcatenatedChannels, partial(unet, in_channels=2), {"low": 1}
        ),
    )


def moons() -> Problem:
    """Points near two half circles by the angle; each angle has a point on both."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(2000, 1, generator=generator)
    is_upper = torch.rand(2000, 1, generator=generator) < 0.5
    noise = NOISE * torch.randn(2000, 2, generator=generator)
    x0 = torch.where(is_upper, *moon_points(angle)) + noise
    return Problem(
        "angle",
        ConditionRecord((1,), low=0.0, high=1.0, dropout=0.1, absent="learned"),
        x0,
        angle,
        lambda x, values: torch.stack(
            [(x - point).norm(dim=1) for point in moon_points(values)]
        ).amin(0),
        lambda folder, steps: PointNetwork,
        bound=4.0,
    )


def moon_points(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The points (N, 2) of both half circles at an angle (N, 1) of 0 to 1 half turns."""
    phi = math.pi * angle
    upper = torch.cat([phi.cos(), phi.sin()], 1)
    return upper - torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25]) - upper


def inpainting() -> Problem:
    """Digits by their left half and a mask of it."""
    x0 = Digits().x0
    mask = (torch.arange(8) < HALF).float().expand(len(x0), 1, 8, 8)
    return Problem(
        "control",
        ConditionRecord((2, 8, 8), low=-1.0, high=1.0, dropout=0.1, absent="learned"),
        x0,
        torch.cat([x0 * mask, mask], 1),
        lambda x, values: (x - values[:, :1])[..., :HALF].flatten(1).square().mean(1).sqrt(),
        _controlled,
    )


def _controlled(folder: Path, steps: int) -> Callable[[], nn.Module]:
    """Train a network without condition, and freeze it beside a ControlNet."""
    from diffcore.integrations.diffusers import ControlledNetwork

    process = inpainting().process(is_conditional=False)
    trainer = create_trainer(
        _BaseNetwork, Digits(), process, Objective(), folder / "base", 0, steps
    )
    base = train_averaged(trainer).network
    return partial(ControlledNetwork, base.network, channels=2, embedding=(16,))


class _BaseNetwork(nn.Module):
    """A UNet2DConditionModel without cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.network: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The output (B, 1, 8, 8) at x (B, 1, 8, 8) and time (B,)."""
        output: Tensor = self.network(x, time, None).sample
        return output


PROBLEMS = {
    "brightness": brightness,
    "resolution": resolution,
    "moons": moons,
    "inpainting": inpainting,
}


def run_study(names: list[str], steps: int) -> Iterator[dict[str, Any]]:
    """Train, sample and measure problems.

    Args:
        names: names in `PROBLEMS`.
        steps: optimizer steps of each network.

    Yields:
        The errors of one problem: of the data, without the condition, and by the guidance scale.
    """
    for name in names:
        problem = PROBLEMS[name]()
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            trainer = create_trainer(
                problem.network(folder, steps),
                ConditionedItems(problem.x0, problem.name, problem.values),
                problem.process(),
                Objective(),
                folder / "run",
                0,
                steps,
            )
            yield {"problem": name, **measure(train_averaged(trainer), problem)}


def measure(denoiser: Denoiser, problem: Problem) -> dict[str, float]:
    """The mean errors of the data and of samples.

    Args:
        denoiser: network with the condition of the problem.
        problem: the problem.

    Returns:
        Error of the data, of samples without condition, and of samples by the guidance scale.
    """
    rows = torch.arange(COUNT) * len(problem.x0) // COUNT
    values = problem.values[rows]
    errors = {"data": problem.error(problem.x0[rows], values)}
    errors["without"] = problem.error(_draw(denoiser, None, CFG(1.0)), values)
    for scale in SCALES:
        x = _draw(denoiser, {problem.name: values}, CFG(scale))
        errors[f"w = {scale:g}"] = problem.error(x, values)
    return {name: round(float(error.mean()), 4) for name, error in errors.items()}


def _draw(denoiser: Denoiser, condition: Mapping[str, Tensor] | None, rule: Guidance) -> Tensor:
    options: dict[str, Any] = {"condition": condition, "guidance": rule, "batch_size": COUNT}
    return sample(denoiser, steps=20, seeds=range(COUNT), **options).x


def format_table(measurements: list[dict[str, Any]]) -> str:
    """The measurements as a table of Markdown.

    Args:
        measurements: what `run_study` yields.

    Returns:
        The table, one row for each problem.
    """
    columns = [name for name in measurements[0] if name != "problem"]
    rows = [[row["problem"], *(f"{row[name]:.4f}" for name in columns)] for row in measurements]
    return markdown_table(["problem", *columns], rows)
