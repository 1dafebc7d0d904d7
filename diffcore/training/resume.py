"""Which run can be continued: one of the same settings and process."""

from dataclasses import fields

import yaml

from diffcore.core.process import Process
from diffcore.run import Run

# Settings that a resumed run may change: they do not enter the weights (steps: through the learning rate alone).
FREE = {
    "steps",
    "patience",
    "log_every",
    "save_every",
    "keep",
    "sample_steps",
    "workers",
    "sample_every",
}
FREE |= {"accumulation", "folder", "resume", "trackers", "sampler", "grid", "guidance"}


def check(run: Run, config: str, process: Process) -> None:
    """Raise where a run was begun as another one.

    Args:
        run: begun before.
        config: YAML of the settings now; empty where they are not known.
        process: what the network is trained on now.
    """
    if not run.config.exists():
        raise ValueError(
            f"{run.folder} holds no run to resume: leave out --resume, or name another folder"
        )
    if config:
        then, now = yaml.safe_load(run.config.read_text()) or {}, yaml.safe_load(config)
        _refuse(
            run, sorted(name for name in {*then, *now} - FREE if then.get(name) != now.get(name))
        )
    before = Process.load(run.process)
    other = [
        field.name
        for field in fields(Process)
        if getattr(before, field.name) != getattr(process, field.name)
    ]
    _refuse(
        run,
        [
            f"process.{name} (the data's captions?)" if name == "classes" else f"process.{name}"
            for name in other
        ],
    )


def _refuse(run: Run, changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"the run in {run.folder} was started with another {', '.join(changed)}: resume it with "
            f"--config {run.config}, or start a new run in another folder"
        )
