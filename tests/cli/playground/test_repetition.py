"""The command lines and the Python code of the playground draw the samples that it shows."""

import shlex
import shutil

import diffusers
import numpy as np
import pytest
import torch

from diffcore.cli.commands.playground.drawing import draw
from diffcore.cli.commands.playground.request import parse_request
from diffcore.cli.commands.playground.snippets import command_line, python_code
from tests.helpers import text_networks
from tests.helpers.tiny_pipelines import dit_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DISTRIBUTIONS = {
    "moons": [],
    "mixture": ['--schedule=Normal(2.4, 2.4, scaling="ve")', "--grid=Karras()", "--sampler=Heun()"],
    "ring": ["--schedule=Shifted(Flow(), -1.5)", "--guidance=Interval(APG(4), 0.3, 1.5)"],
    "points": ["--labels=[]", "--guidance=CFG(1)", '--sampler=DPMSolverPP("2M")', "--seed=7"],
}


def repeat(diffcore, drawing):
    """The samples of the printed command and of the printed code."""
    words = shlex.split(command_line(drawing))
    ended = diffcore(*words[1:])
    assert ended.status == 0, ended.err
    names: dict = {}
    exec(python_code(drawing), names)
    with np.load("samples.npz") as arrays:
        return dict(arrays), names["x"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_is_drawn_again(diffcore, name):
    drawing = draw(name, parse_request(name, ["--per_label=5", *DISTRIBUTIONS[name]]), CPU)
    arrays, x = repeat(diffcore, drawing)
    assert np.array_equal(arrays["x"], drawing.samples.x.numpy())
    assert torch.equal(x, drawing.samples.x)
    assert arrays["seed"].tolist() == list(drawing.request.seeds)
    assert arrays["label"].tolist() == (drawing.request.condition or [2] * 5)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--labels=3,1", "--per_label=2", "--seed=5", '--sampler=DPMSolverPP("2M")', "--steps=4"],
    ],
    ids=["unconditional", "labels"],
)
@pytest.mark.slow
def test_a_run_is_drawn_again(diffcore, trained, tmp_path, words):
    folder = shutil.copytree(trained, tmp_path / "a run's")
    drawing = draw(str(folder), parse_request(str(folder), ["--steps=3", *words]), CPU)
    arrays, x = repeat(diffcore, drawing)
    assert np.array_equal(arrays["x"], drawing.samples.x.numpy())
    assert torch.equal(x, drawing.samples.x)


@pytest.mark.parametrize("kind", ["text", "classes"])
@pytest.mark.slow
def test_a_pipeline_is_drawn_again(diffcore, tmp_path, kind):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    if kind == "text":
        pipe, words = text_networks.sd(scheduler), ["--prompt=a red cat", "--prompt=two dogs"]
    else:
        pipe, words = dit_pipeline(scheduler), ["--labels=1,0"]
    pipe.save_pretrained(tmp_path / "pipe")
    name = str(tmp_path / "pipe")
    request = parse_request(name, ["--steps=2", "--per_label=1", "--grid=Trailing()", *words])
    drawing = draw(name, request, CPU)
    arrays, x = repeat(diffcore, drawing)
    assert np.array_equal(arrays["x"], drawing.model.decode(drawing.samples.x).numpy())
    assert torch.equal(x, drawing.model.decode(drawing.samples.x))
