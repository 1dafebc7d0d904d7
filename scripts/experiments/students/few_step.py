"""Few-step students of the digits' teacher: their distance to real digits, by method and steps.

Each student is trained by `diffcore distil`, or by `diffcore train` if its method is an objective
alone, and measured by `diffcore evaluate`, as `make demo` measures its run.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.table import markdown_table
from pictures.themes import draw_themes
from pictures.tiles import show_tiles
from torch import Tensor

from diffcore.cli.main import main
from diffcore.io.plain_data import read_json
from diffcore.report.figures import create_figure, save_figure
from experiments.study import read_measurements

__all__ = [
    "GRID",
    "METHODS",
    "STEPS",
    "TRAINING",
    "draw",
    "evaluate",
    "measure",
    "run_command",
    "table",
]

STEPS = (1, 2, 4)
TEACHER_STEPS = 25
BATCH = 64
TEACHER = "teacher"
EVALUATION = (
    "--features=pixels",
    "--n=500",
    "--reference={class_path: Digits, init_args: {split: test}}",
    "--training={class_path: Digits, init_args: {split: train}}",
)
TEACHER_SAMPLING = (
    "--sampler=DDIM",
    "--grid=Trailing",
    "--guidance=CFG",
    "--guidance.scale=1.5",
)
TRAINING = (f"--batch-size={BATCH}", "--sample-every=0", "--trackers=[]", "--resume=auto")
METRICS = ("frechet_distance", "label_accuracy")
GRID = {"class_path": "UniformBlend", "init_args": {"rho": 1.25, "center": 0.5}}
"""Knots of students that map noise to samples, which are those of `diffcore distil`."""

Words = Callable[[Path, Path], list[str]]
"""Function (teacher, folder of all students) -> words of the command that trains a student."""


def _distil(method: str, *options: str) -> Words:
    def words(teacher: Path, folder: Path) -> list[str]:
        own = [option.format(folder=folder) for option in options]
        return ["distil", str(teacher), f"--method={method}", "--steps=4", *own]

    return words


def _unet(inputs: int, widths: Sequence[int], groups: int, **arguments: Any) -> dict[str, Any]:
    """A class-conditional UNet of digits."""
    fixed = {"sample_size": 8, "out_channels": 1, "layers_per_block": 1, "num_class_embeds": 11}
    own = {"in_channels": inputs, "block_out_channels": widths, "norm_num_groups": groups}
    return {"class_path": "diffusers.UNet2DModel", "init_args": fixed | own | arguments}


def _discriminator(inputs: int) -> dict[str, Any]:
    """A discriminator with a small UNet for samples of some channels, whose output is averaged."""
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = _unet(inputs, [32, 64], 8, add_attention=False, **blocks)
    training = {"lr": {"peak": 2e-3, "warmup": 10}, "betas": [0.0, 0.99]}
    arguments = {"network": network, "r1": 0.03, "training": training}
    return {"class_path": "NetworkDiscriminator", "init_args": arguments}


def _train(objective: str, peak: float, *options: str, inputs: int = 1, **arguments: Any) -> Words:
    """A student against a discriminator, from the teacher's weights, on the data alone."""
    student = {"steps": 4, "grid": GRID}
    given = {"student": student, "discriminator": _discriminator(inputs)} | arguments
    spec = json.dumps({"class_path": objective, "init_args": given})

    def words(teacher: Path, folder: Path) -> list[str]:
        common = ["--steps=120", f"--lr.peak={peak}", "--lr.warmup=30"]
        betas = "--optimizer.init_args.betas=[0.5,0.99]"
        start = f"--init={teacher}"
        return ["train", "digits-dmd", start, f"--objective={spec}", *common, betas, *options]

    return words


def _latent() -> list[str]:
    """Options by which the network of the teacher receives a latent of the sample's seed."""
    blocks = {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    network = _unet(1, [48, 112], 16, attention_head_dim=28, **blocks)
    wrapped = {"class_path": "diffcore.networks.NoiseEmbedding", "init_args": {"network": network}}
    record = {"shape": [8], "low": 0, "high": 255, "absent": "null", "null": [0]}
    conditions = json.dumps({"seed_bytes": record})
    return [f"--network={json.dumps(wrapped)}", f"--process.conditions={conditions}"]


METHODS: dict[str, Words] = {
    "Consistency": _distil("Consistency"),
    "MeanFlow": _distil("MeanFlow"),
    "Shortcut": _distil("Shortcut"),
    "Reflow": _distil(
        "Reflow", "--data.count=4096", "--data.steps=12", "--data.folder={folder}/pairs"
    ),
    "DistributionMatching": _distil("DistributionMatching"),
    "SelfCooperative": _train("SelfCooperative", 1e-4),
    "DiffusionGAN": _train("DiffusionGAN", 5e-5, speed=0.25),
    "DenoisingGAN": _train("DenoisingGAN", 1e-4, *_latent(), inputs=2),
}
"""How a student of each method is trained."""


def run_command(*words: str) -> float:
    """Run a command of diffcore.

    Args:
        *words: the command and its options.

    Returns:
        The processor seconds that it took.

    Raises:
        SystemExit: the command failed.
    """
    start = time.process_time()
    if status := main(list(words)):
        raise SystemExit(status)
    return time.process_time() - start


def evaluate(run: Path, steps: int, sampling: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the samples of a run as `make demo` does.

    Args:
        run: folder of the run.
        steps: sampling steps.
        sampling: options of sampling; those of the run by default.

    Returns:
        The number of steps, the Fréchet distance and the recognised share.
    """
    out = run / f"evaluation-{steps}"
    run_command("evaluate", str(run), *EVALUATION, *sampling, f"--steps={steps}", f"--out={out}")
    results = read_json(run / "evaluation.json")
    return {"steps": steps, **{name: results[name]["samples"] for name in METRICS}}


def student_folder(folder: Path, method: str, seed: int) -> Path:
    """The folder of a student.

    Args:
        folder: folder of all students.
        method: name of the method.
        seed: seed of the training.

    Returns:
        A folder inside of it.
    """
    return folder / f"{method}-{seed}"


def measure(
    teacher: Path, folder: Path, out: Path, methods: Sequence[str], seeds: Sequence[int]
) -> None:
    """Measure the teacher and students that are not in a file yet; train those that are missing.

    Args:
        teacher: folder of the run of the recipe `digits`.
        folder: folder of the students.
        out: file of measurements, one JSON object per line.
        methods: names of methods.
        seeds: seeds of the trainings.
    """
    _continue(out, TEACHER, 0, (*STEPS, TEACHER_STEPS), teacher, TEACHER_SAMPLING)
    for method in methods:
        for seed in seeds:
            if not _missing(out, method, seed, STEPS):
                continue
            run = student_folder(folder, method, seed)
            is_new = not run.exists()
            options = (f"--folder={run}", f"--seed={seed}", *TRAINING)
            seconds = run_command(*METHODS[method](teacher, folder), *options)
            # The seconds of a training that was interrupted are not those of the whole training.
            further = {"training_processor_seconds": round(seconds)} if is_new else {}
            _continue(out, method, seed, STEPS, run, further=further)


def _missing(out: Path, method: str, seed: int, counts: Sequence[int]) -> list[int]:
    """The numbers of steps that a file does not contain yet."""
    done = {(row["method"], row["seed"], row["steps"]) for row in read_measurements(out)}
    return [count for count in counts if (method, seed, count) not in done]


def _continue(
    out: Path,
    method: str,
    seed: int,
    counts: Sequence[int],
    run: Path,
    sampling: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
) -> None:
    """Append the measurements of a run that a file does not contain yet, one after the other."""
    for steps in _missing(out, method, seed, counts):
        row = {"method": method, "seed": seed, **evaluate(run, steps, sampling), **(further or {})}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def table(out: Path) -> str:
    """The table of docs/few-step.md.

    Args:
        out: file of measurements.

    Returns:
        A table in Markdown: the mean over the seeds, and the smallest and the largest value.
    """
    rows = read_measurements(out)
    best = next(
        row["frechet_distance"]
        for row in rows
        if row["method"] == TEACHER and row["steps"] == TEACHER_STEPS
    )
    lines = []
    for method, steps in sorted({(row["method"], row["steps"]) for row in rows}, key=_order):
        own = [row for row in rows if (row["method"], row["steps"]) == (method, steps)]
        values = np.array([row["frechet_distance"] for row in own])
        spread = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
        accuracy = np.mean([row["label_accuracy"] for row in own])
        cells = [f"{values.mean():.3f}{spread}", f"{values.mean() / best:.2f}", f"{accuracy:.3f}"]
        lines.append([method, str(steps), str(len(own)), *cells])
    header = ["method", "steps", "seeds", "Fréchet distance", "over the teacher's", "recognised"]
    return markdown_table(header, lines)


def _order(key: tuple[str, int]) -> tuple[int, int]:
    names = (TEACHER, *METHODS)
    return names.index(key[0]) if key[0] in names else len(names), key[1]


def draw(teacher: Path, folder: Path, picture: Path, methods: Sequence[str]) -> None:
    """Draw the digits of the teacher and of students from the same seeds, in light and dark.

    Args:
        teacher: folder of the teacher.
        folder: folder of the students.
        picture: PNG file of the light picture.
        methods: names of methods, of which the student of seed 0 is drawn.
    """
    panels = {TEACHER: _sample(teacher, (*STEPS, TEACHER_STEPS), picture, TEACHER_SAMPLING)}
    for method in methods:
        if student_folder(folder, method, 0).is_dir():
            panels[method] = _sample(student_folder(folder, method, 0), STEPS, picture)

    def draw_panels(path: Path) -> None:
        figure, axes = create_figure(2, (len(panels) + 1) // 2, width=4.6, height=2.1)
        for axis in axes:
            axis.axis("off")
        for axis, (name, rows) in zip(axes, panels.items(), strict=False):
            axis.axis("on")
            show_tiles(axis, torch.stack(list(rows.values())), [str(steps) for steps in rows])
            axis.set(title=name, ylabel="steps")
        save_figure(figure, path)

    draw_themes(draw_panels, picture)


def _sample(
    run: Path, counts: Sequence[int], picture: Path, words: Sequence[str] = ()
) -> dict[int, Tensor]:
    """Number of steps -> a digit (10, 1, 8, 8) of each class, from the same seeds."""
    digits, arrays = {}, picture.with_suffix(".npy")
    for steps in counts:
        run_command(
            "sample", str(run), "--labels=0-9", f"--steps={steps}", *words, f"--out={arrays}"
        )
        digits[steps] = torch.from_numpy(np.load(arrays))
        arrays.unlink()
    return digits
