"""A mistake of the user is one line; a bug in a module of the user keeps its traceback."""

import io
import sys
from pathlib import Path

import pytest

from diffcore.cli.main import main
from diffcore.io.mistakes import MAXIMUM_LENGTH, one_line
from tests.helpers.products import thinned

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {in_init}
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, time, class_labels=None):
        {in_forward}
        return self.layer(x)
"""
DATA = """
import torch
from torch.utils.data import Dataset


class Data(Dataset):
    def __init__(self):
        {in_init}

    def __len__(self):
        {in_len}
        return 16

    def __getitem__(self, index):
        {in_item}
        return torch.zeros(1, 8, 8), 0
"""
SCHEDULE = """
from dataclasses import dataclass
from diffcore.schedules import Cosine


@dataclass(frozen=True)
class Mine(Cosine):
    def _logsnr(self, t):
        {in_logsnr}
        return super()._logsnr(t)
"""
BUGS = {
    TypeError: "None + 1",
    RuntimeError: "raise RuntimeError('planted')",
    IndexError: "[][1]",
    KeyError: "{}['planted']",
    AttributeError: "None.planted",
    ZeroDivisionError: "1 / 0",
    ValueError: "int('planted')",
    OSError: "open('planted')",
}
PLACES = [
    *((NETWORK, "in_forward", error) for error in BUGS),
    *((NETWORK, "in_init", error) for error in (TypeError, ValueError, KeyError, IndexError)),
    *((DATA, "in_item", error) for error in BUGS),
    *((DATA, place, error) for place in ("in_init", "in_len") for error in (TypeError, KeyError)),
    *((SCHEDULE, "in_logsnr", error) for error in (TypeError, RuntimeError, ZeroDivisionError)),
]
OPTIONS = {
    NETWORK: ("--network=planted.Net",),
    DATA: ("--network=torch.nn.Identity", "--data=planted.Data"),
    SCHEDULE: ("--process.schedule=planted.Mine",),
}


def plant(source, place, bug):
    """Write the module `planted` with a bug in one place."""
    places = dict.fromkeys(("in_init", "in_forward", "in_len", "in_item", "in_logsnr"), "pass")
    Path("planted.py").write_text(source.format(**{**places, place: bug}))


@pytest.fixture
def _forget_planted():
    yield
    sys.modules.pop("planted", None)


@pytest.mark.usefixtures("_forget_planted")
@pytest.mark.parametrize(
    ("source", "place", "error"),
    thinned(PLACES, 14),
    ids=[f"{list(OPTIONS).index(s)}-{p}-{e.__name__}" for s, p, e in PLACES],
)
def test_a_bug_in_a_module_of_the_user_keeps_its_traceback(
    diffcore, tiny, source, place, error, monkeypatch
):
    plant(source, place, BUGS[error])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    small = tiny if source == SCHEDULE else tiny[3:]
    argv = ("train", "digits", *small, "--folder=new", "--steps=1", "--trust=planted")
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any class: checked below
        diffcore(*argv, *OPTIONS[source])
    chain, cause = [], caught.value
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__
    assert isinstance(chain[-1], error), chain
    assert any("planted.py" in str(entry.path) for entry in caught.traceback) or len(chain) > 1


@pytest.mark.usefixtures("_forget_planted")
def test_a_syntax_error_in_a_module_of_the_user_names_the_file_and_the_line(diffcore):
    Path("planted.py").write_text("class Net:\n    def forward(\n")
    try:
        ended = diffcore("train", "digits", "--network=planted.Net", "--trust=planted")
    except SyntaxError as error:
        assert error.filename.endswith("planted.py")  # noqa: PT017
    else:
        assert "planted.py" in ended.err
        assert "line 2" in ended.err


def test_a_bug_of_diffcore_keeps_its_traceback(diffcore, trained, monkeypatch):
    for bug in (lambda *_: int("x"), lambda *_: None + 1, lambda *_: {}["x"], lambda *_: 1 / 0):
        monkeypatch.setattr("diffcore.cli.commands.sample.load_image_model", bug)
        with pytest.raises((ValueError, TypeError, KeyError, ZeroDivisionError)):
            diffcore("sample", trained, "--out=x.png")


@pytest.mark.parametrize(
    "option",
    [
        "--optimizer.betas=[2,3]",
        "--optimizer.eps=-1",
        "--network.init_args.down_block_types=[Nonsense,DownBlock2D]",
        "--network.init_args.norm_num_groups=5",
        "--network.init_args.in_channels=3",
        "--network.init_args.block_out_channels=[8]",
        "--network=torch.nn.Linear",
        "--network=torch.nn.Flatten",
        "--network=torch.nn.Identity",
        "--process.shape=[1,9,9]",
        "--trackers=[nonsense]",
        "--data=Digitz",
    ],
)
def test_options_that_another_library_refuses_are_one_line(diffcore, tiny, option):
    ended = diffcore("train", "digits", *tiny, "--folder=new", "--steps=1", option)
    assert ended.status in (1, 2)
    assert len(ended.err.splitlines()) == 1
    assert len(ended.err) <= MAXIMUM_LENGTH + 40


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    text = "steps is wrong\n" + "x" * 1000 + "\n use 3"
    assert len(one_line(text)) == MAXIMUM_LENGTH
    assert one_line(text).startswith("steps is wrong x")
    assert one_line(text).endswith("x use 3")
    assert one_line("a\n  b") == "a b"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_spelled_in_an_encoding_without_greek_letters(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert "noise level sigma/alpha of the noise added to the image" in " ".join(text.split())


def test_a_device_that_torch_lacks_is_refused_in_one_line(diffcore, trained):
    for device in ("mps", "nonsense", "xpu"):
        ended = diffcore("sample", trained, f"--device={device}", "--out=x.png")
        assert ended.status == 1
        assert len(ended.err.splitlines()) == 1
        assert len(ended.err) <= MAXIMUM_LENGTH + 40
        assert "use auto or cpu" in ended.err


def test_running_out_of_memory_is_one_line_with_a_remedy(diffcore, trained, monkeypatch):
    import torch

    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. " * 50)

    monkeypatch.setattr("diffcore.cli.commands.sample.load_image_model", exhaust)
    ended = diffcore("sample", trained, "--out=x.png")
    assert ended.status == 1
    assert "use a smaller network or --batch-size" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_network_that_does_not_fit_into_memory_is_one_line(diffcore):
    ended = diffcore("train", "points", "--network.width=1000000000", "--folder=run")
    assert ended.status == 1
    assert "too little memory: use a smaller network" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_message_that_contains_the_name_of_a_builtin_class_is_one_line(diffcore):
    ended = diffcore("features", "train", "--data=ref", "--out=x.safetensors")
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--threads=-1", "--lr=0", "--out=x.txt"])
def test_settings_of_features_are_checked_before_the_data_is_read(diffcore, option):
    words = ["features", "train", "nowhere", "--out=x.safetensors", option]
    ended = diffcore(*words)
    assert ended.status in (1, 2)
    assert "nowhere" not in ended.err
    assert "expected" in ended.err
    assert len(ended.err.splitlines()) == 1
