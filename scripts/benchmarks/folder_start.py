"""The start of a training on a large folder of images, beside that on a small one."""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Start", "measure_starts"]

COMMAND = [
    "--data.size=8",
    "--steps=1000000",
    "--log_every=1",
    "--save_every=1000000",
    "--batch_size=4",
    "--workers=0",
    "--trackers=[]",
    "--sample_every=0",
    "--network.layers_per_block=1",
    "--process.classes=0",
]


class Start(NamedTuple):
    """A training on a folder whose scan is recorded, from command to report of the first step.

    Args:
        images: number of images.
        seconds: median time.
        processor_seconds: median time of all processors.
        megabytes: median of the largest memory.
    """

    images: int
    seconds: float
    processor_seconds: float
    megabytes: float


def measure_starts(folder: Path, counts: tuple[int, ...], repeats: int) -> list[Start]:
    """Train on folders of small JPEG files to the first step, after a training that scans them.

    Args:
        folder: folder in which the folders of images are made.
        counts: number of images of each.
        repeats: number of trainings on each, in alternation.

    Returns:
        The start on each folder.
    """
    for count in counts:
        _write_images(folder / str(count), count)
        _train(folder, count)
    rounds = [[_train(folder, count) for count in counts] for _ in range(repeats)]
    return [
        Start(count, *map(median, zip(*[row[column] for row in rounds], strict=True)))
        for column, count in enumerate(counts)
    ]


def _write_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index % 10}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)


def _train(folder: Path, count: int) -> tuple[float, float, float]:
    """Seconds, seconds of processors, and largest memory in megabytes of one training."""
    run = folder / f"run-{time.time_ns()}"
    words = [f"--data.folder={folder / str(count)}", f"--folder={run}"]
    command = [sys.executable, "-m", "diffcore", "train", "images", *words, *COMMAND]
    begin = time.perf_counter()
    child = subprocess.Popen(command)
    report = run / "metrics.jsonl"
    while not (report.exists() and report.stat().st_size):
        if child.poll() is not None:
            raise ValueError(f"a training of {count} images ended with status {child.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    child.kill()
    _, _, usage = os.wait4(child.pid, 0)
    child.returncode = 0
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
