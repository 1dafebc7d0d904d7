"""A process that opens every hostile file under an audit hook, and reports what happens.

`python -P -m tests.helpers.hostile_process RUN` works in the current folder, and prints a line of
JSON for each file and each command or function that reads it.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.hostile_files import (
    CHECKPOINTS,
    HOSTILE,
    PIPELINES,
    RUNS,
    SAMPLING,
    TEXT_PIPELINES,
    TRAINING,
    UNET,
    Damage,
)

EXECUTION = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
)
"""Audit events that no hostile file may cause."""


def resume(folder: Path) -> int:
    return command("train", "--config", folder / "config.yaml", "--resume=true", "--steps=4",
                   f"--folder={folder}")  # fmt: skip


def draw(folder: Path) -> int:
    return command("sample", folder, "--labels=1", "--out=drawn.png")


def describe(folder: Path) -> int:
    return command("info", folder)


def export(folder: Path) -> int:
    return command("export", folder, "--out=exported")


def draw_text(folder: Path) -> int:
    return command("sample", folder, "--prompt=a cat", "--steps=1", "--out=drawn.png")


def command(*words: object) -> int:
    from diffcore.cli.main import main

    try:
        return main([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)


def read_diffusers(folder: Path) -> int:
    from diffcore.integrations.diffusers import from_diffusers

    return guarded(lambda: from_diffusers(folder))


def read_pipeline(folder: Path) -> int:
    from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline

    return guarded(lambda: DiffcorePipeline.from_pretrained(folder))


def guarded(call: Callable[[], object]) -> int:
    """1 after a ValueError, whose message is printed as one line; other errors are not caught."""
    try:
        call()
    except ValueError as error:
        print(f"python: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


GROUPS: dict[str, tuple[dict[str, Damage], tuple[Callable[[Path], int], ...]]] = {
    "run": (RUNS, (resume, draw, describe, export)),
    "training": (TRAINING, (resume,)),
    "sampling": (SAMPLING, (draw,)),
    "checkpoint": (CHECKPOINTS, (resume,)),
    "pipeline": (PIPELINES, (read_pipeline, read_diffusers, draw)),
    "text": (TEXT_PIPELINES, (draw_text,)),
}
CASES = [f"{group}: {name}" for group, (damages, _) in GROUPS.items() for name in damages]


class Recorder:
    """The audit hook: what happens while a hostile file is read, outside what it may do."""

    def __init__(self, workplace: Path) -> None:
        self.outside = str(workplace / "outside")
        self.events: list[str] = []
        self.is_active = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_active:
            return
        path = arguments[0] if arguments and isinstance(arguments[0], (str, bytes)) else ""
        name = os.fsdecode(path)
        if event == "import" and name.split(".")[0] in (HOSTILE, "attack"):
            self.events.append(f"import {name}")
        elif event == "open" and os.path.realpath(name).startswith(self.outside):
            self.events.append(f"open {name}")
        elif event in EXECUTION:
            self.events.append(f"{event} {arguments!r}"[:200])


def write_originals(workplace: Path, run: Path) -> dict[str, Path]:
    """The intact folders of which each hostile one is a copy, and the files outside of them."""
    from diffcore.core.denoiser import Denoiser
    from diffcore.core.process import Process
    from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline
    from diffcore.schedules import Cosine
    from tests.helpers.text_networks import ddim, sd
    from tests.helpers.tiny_pipelines import unet

    process = Process(Cosine(), shape=(3, 8, 8), classes=4, dropout=0.1)
    network = unet(num_class_embeds=5)
    DiffcorePipeline.of(Denoiser(network, process)).save_pretrained(workplace / "pipeline")
    sd(ddim()).save_pretrained(workplace / "text")
    (workplace / "outside").mkdir()
    (workplace / "outside" / "secret").write_text("secret")
    shutil.copy(
        workplace / "pipeline" / f"{UNET}.safetensors", workplace / "outside/secret.safetensors"
    )
    folders = dict.fromkeys(("run", "training", "sampling", "checkpoint"), run)
    return folders | {name: workplace / name for name in ("pipeline", "text")}


def copy_folder(original: Path, folder: Path) -> None:
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("samples", "pipeline"))
    (folder / "attack.sh").write_text("#!/bin/sh\ntouch attacked\n")
    (folder / "attack.sh").chmod(0o755)


def open_hostile(recorder: Recorder, entry: Callable[[Path], int], folder: Path) -> dict[str, Any]:
    """Open one hostile folder and report what happened."""
    recorder.events, error, status = [], "", -1
    err = io.StringIO()
    recorder.is_active = True
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = entry(folder)
        except BaseException as raised:  # every other end is a fault, and reported
            error = f"{type(raised).__name__}: {raised}"
    recorder.is_active = False
    lines = [line for line in err.getvalue().splitlines() if ": error: " in line]
    return {
        "entry": entry.__name__,
        "status": status,
        "events": recorder.events,
        "traceback": error[:300],
        "lines": lines,
        "attacked": [str(path) for path in Path().rglob("attacked")],
    }


def main(run: Path) -> None:
    """Open every hostile file in the current folder, and print what happened as JSON lines."""
    warnings.simplefilter("ignore")
    workplace = Path().resolve()
    originals = write_originals(workplace, run)
    Path(f"{HOSTILE}.py").write_text("import os\nos.system('touch attacked')\nclass Attack: pass\n")
    sys.path.append(str(workplace))
    recorder = Recorder(workplace)
    for group, (damages, functions) in GROUPS.items():
        for place, (name, damage) in enumerate(damages.items()):
            for number, entry in enumerate(functions):
                if (place + number) % len(functions) > 1:
                    continue
                folder = workplace / f"hostile-{number}"
                copy_folder(originals[group], folder)
                damage(folder)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                report = open_hostile(recorder, entry, folder)
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                print(json.dumps(report | {"case": f"{group}: {name}", "grown": grown}), flush=True)
                shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
