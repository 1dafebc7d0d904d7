"""Training runs that end early, and the hashes of what a run wrote."""

import hashlib
from pathlib import Path

import pytest

from diffcore.training import loop
from diffcore.training.reporting import Reporter
from diffcore.training.resume import start_or_resume
from diffcore.training.state import TrainState, build_state
from diffcore.training.trainer import Trainer


def crash_after(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the checkpoint of a step is written, then end as a crash would."""
    save = loop.save

    def save_and_crash(state: TrainState, reporter: Reporter) -> None:
        save(state, reporter)
        if state.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", save_and_crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.setattr(loop, "save", save)


def refused_run(trainer: Trainer, message: str) -> tuple[TrainState, str]:
    """The state of a run that stops with a ValueError whose text matches `message`, and the text."""
    state = build_state(trainer)
    reporter = Reporter(trainer, state.accelerator)
    start_or_resume(state, reporter.message)
    with pytest.raises(ValueError, match=message) as caught:
        loop.run(state, reporter)
    return state, str(caught.value)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its path in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
