"""Mutated command lines and settings end in success or in one line, never in a traceback."""

import random
import re
from pathlib import Path

import pytest
import yaml

from diffcore.io.mistakes import MAXIMUM_LENGTH

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, DEFAULT = 400, 30
VALUES = (
    *("", "-1", "0", "1.5", "nan", ".inf", "-.inf", "1e400", "99999999999999999999", "true"),
    *("null", "[]", "[1,2]", "[[1],[2]]", "{}", "{a: 1}", "{class_path: DDIM}", "DDIM", "Cosine"),
    *(
        "os.system",
        "nowhere.Net",
        "λ",
        "🐱",
        "a: b",
        "!!python/object:os.system",
        "%s{}",
        "\\",
        "'",
    ),
    *(
        "missing.yaml",
        "/nowhere/x.png",
        "~",
        "0-9",
        "9-0",
        "1,,2",
        "x" * 2000,
        "&a [*a]",
        "\t",
        "[[[",
    ),
)
TRAIN = (
    *(
        "folder",
        "steps",
        "batch_size",
        "accumulation",
        "clip",
        "precision",
        "seed",
        "workers",
        "data",
    ),
    *("log_every", "sample_every", "save_every", "keep", "trackers", "sampler", "grid", "guidance"),
    *(
        "sample_steps",
        "resume",
        "network",
        "optimizer",
        "lr",
        "lr.peak",
        "lr.warmup",
        "ema",
        "process",
    ),
    *(
        "objective.weight",
        "objective.loss",
        "objective.coupling",
        "objective.corrected",
        "objective",
    ),
    *("process.schedule", "process.prediction", "process.time", "process.shape", "process.classes"),
    *("process.dropout", "process.low", "process.high", "network.init_args", "config", "pipeline"),
    *(
        "validation.data",
        "snapshots.lengths",
        "nonsense",
        "lr.nonsense",
        "sampler.nonsense",
        "help",
    ),
)
SAMPLE = (
    *("labels", "prompt", "negative", "height", "width", "per_label", "seeds", "sampler", "grid"),
    *("steps", "guidance", "guidance.scale", "image", "start", "batch_size", "micro_batch", "path"),
    *("out", "threads", "device", "print_knots", "config", "sampler.order", "grid.rho", "nonsense"),
)
OTHERS = (
    ("export", "RUN", "--out"),
    ("export", "RUN", "--out=new", "--format"),
    ("plot", "schedules"),
    ("plot", "weights"),
    ("plot", "weights", "--configs"),
    ("plot", "weights", "MinSNR", "--on"),
    ("plot", "schedules", "Cosine", "--out"),
    ("info",),
    ("sample",),
    ("train",),
    ("train", "--trust"),
    ("ema", "RUN"),
    ("report",),
)
SETTINGS = {"steps": 3, "lr": {"peak": 0.1}, "process": {"schedule": "Cosine"}, "sampler": "DDIM"}


def mutate(number):
    """A command line, and the settings of the file that it names or None, by its number."""
    source = random.Random(number)
    value, kind = source.choice(VALUES), number % 5
    if kind == 0:
        options = source.sample(TRAIN, source.randint(1, 3))
        return ["train", "digits", *(f"--{name}={source.choice(VALUES)}" for name in options)], None
    if kind in (1, 2):
        options = source.sample(SAMPLE, source.randint(1, 3))
        words = [f"--{name}={source.choice(VALUES)}" for name in options]
        return ["sample", "RUN", "--labels=1", "--steps=2", *words], None
    if kind == 3:
        words = list(source.choice(OTHERS))
        if words[-1].startswith("--"):
            return [*words[:-1], f"{words[-1]}={value}"], None
        return [*words, value], None
    settings = dict(SETTINGS)
    for name in source.sample(TRAIN, source.randint(1, 3)):
        first, _, second = name.partition(".")
        new = source.choice((value, 3, -1.5, None, [], {}, [1, None], True, {"class_path": value}))
        settings[first] = {second: new} if second else new
    return ["train", "fuzzed.yaml"], settings


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[] if number < DEFAULT else pytest.mark.thorough)
        for number in range(COUNT)
    ],
)
def test_a_mutated_command_line_ends_in_success_or_in_one_line(
    diffcore, trained, monkeypatch, number
):
    monkeypatch.setattr("diffcore.training.trainer.Trainer.train", lambda _: None)
    monkeypatch.setattr("diffcore.cli.commands.sample.draw_samples", lambda *_: (0.0, []))
    monkeypatch.setattr("diffcore.cli.commands.export.write_folder", lambda *_: None, raising=False)
    monkeypatch.setattr("diffcore.cli.commands.plot.save_figure", lambda *_: None)
    words, settings = mutate(number)
    if settings is not None:
        Path("fuzzed.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))
    ended = diffcore(*[str(trained) if word == "RUN" else word for word in words])
    assert ended.status in (0, 1, 2)
    if ended.status:
        assert len(ended.err.splitlines()) == 1, ended.err
        message = re.sub(r"^diffcore( \w+)*: error: ", "", ended.err.strip())
        assert 10 < len(message) <= MAXIMUM_LENGTH, message
