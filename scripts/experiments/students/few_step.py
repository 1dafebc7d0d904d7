"""Few-step students of the digits' teacher: their distance to real digits, by method and steps.

Each student is trained by `diffcore distil` and measured by `diffcore evaluate`, as `make demo`
measures its run.
"""

import json
import time
from collections.abc import Iterator, Sequence
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

__all__ = ["METHODS", "STEPS", "draw", "measure", "table"]

METHODS = ("Consistency", "MeanFlow", "DistributionMatching")
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
METRICS = ("frechet_distance", "label_accuracy")


def _command(*words: str) -> float:
    """Run a command of diffcore, and return the processor seconds that it took."""
    start = time.process_time()
    if status := main(list(words)):
        raise SystemExit(status)
    return time.process_time() - start


def _evaluate(run: Path, steps: int, sampling: Sequence[str] = ()) -> dict[str, Any]:
    out = run / f"evaluation-{steps}"
    _command("evaluate", str(run), *EVALUATION, *sampling, f"--steps={steps}", f"--out={out}")
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
    students = [(method, seed) for method in methods for seed in seeds]

    def rows(key: tuple[str, int]) -> Iterator[dict[str, Any]]:
        method, seed = key
        if method == TEACHER:
            for steps in (*STEPS, TEACHER_STEPS):
                yield {
                    "method": method,
                    "seed": seed,
                    **_evaluate(teacher, steps, TEACHER_SAMPLING),
                }
            return
        run = student_folder(folder, method, seed)
        options = (f"--method={method}", f"--folder={run}", f"--seed={seed}")
        seconds = _command(
            "distil",
            str(teacher),
            *options,
            f"--batch-size={BATCH}",
            "--steps=4",
            "--sample-every=0",
            "--trackers=[]",
            "--resume=auto",
        )
        for steps in STEPS:
            row = {"method": method, "seed": seed, **_evaluate(run, steps)}
            yield row | {"training_processor_seconds": round(seconds)}

    done = {(row["method"], row["seed"]) for row in read_measurements(out)}
    for key in [(TEACHER, 0), *students]:
        if key not in done:
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows(key))


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
        _command("sample", str(run), "--labels=0-9", f"--steps={steps}", *words, f"--out={arrays}")
        digits[steps] = torch.from_numpy(np.load(arrays))
        arrays.unlink()
    return digits
