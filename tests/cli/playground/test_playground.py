"""The playground without its page: controls, pictures, evaluations and what is refused."""

import io
import re
import socket
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.cli.commands.playground.controls import (
    AS_CONFIGURED,
    GRIDS,
    RULES,
    SAMPLERS,
    SCHEDULES,
    Controls,
)
from diffcore.cli.commands.playground.drawing import BATCH, draw
from diffcore.cli.commands.playground.page import Address, answer_controls, serve
from diffcore.cli.commands.playground.panels import draw_panels
from diffcore.cli.commands.playground.request import parse_request
from diffcore.core.oracle import PLANE_NAMES
from diffcore.core.process import Process
from diffcore.io.extras import has_extra
from diffcore.io.specs import describe_component

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def controls(model="moons", *words, **values):
    """The controls of settings, of which some are set to values."""
    return Controls.of(model, parse_request(model, ["--per_label=6", *words]))._replace(**values)


def pictures(answer):
    """The pictures in an answer, as arrays."""
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", answer.pictures)
    return [np.asarray(Image.open(io.BytesIO(b64decode(text)))) for text in encoded]


@pytest.mark.parametrize(
    "guidance",
    [
        *(f"--guidance={describe_component(build(3.5))}" for build in RULES.values()),
        "--guidance=Interval(CFG(3), 0.3, 1.5)",
        "--guidance=Interval(APG(3), high=2.0)",
    ],
)
def test_controls_stand_for_the_settings_that_they_show(guidance):
    words = [guidance, "--steps=7", "--seed=3", "--labels=1", "--sampler=Heun(2.0)"]
    request = parse_request("ring", words)
    values = Controls.of("ring", request)
    assert values.rule != AS_CONFIGURED
    assert parse_request("ring", values.words) == request


@pytest.mark.parametrize(
    "guidance",
    ["CFG(2, reference=Label(0))", "Interval(CFG(2), logsnr=(-1.0, 3.0))", "APG(2, eta=0.5)"],
)
def test_a_rule_that_the_controls_cannot_show_stays_as_the_model_brings_it(guidance, monkeypatch):
    request = parse_request("moons", [f"--guidance={guidance}"])
    values = Controls.of("moons", request)
    assert (values.rule, values.low, values.high) == (AS_CONFIGURED, 0, 0)
    assert not [word for word in values.words if word.startswith("--guidance")]


@pytest.mark.slow
def test_each_choice_of_the_lists_gives_pictures():
    for name, choices in {"schedule": SCHEDULES, "sampler": SAMPLERS, "grid": GRIDS}.items():
        for choice in choices:
            text = describe_component(choice)
            words = controls(**{name: text}).words
            assert getattr(parse_request("moons", words), name) == choice
            grid = {"grid": "UniformLogSNR(-8.0, high=8.0)"} if name == "schedule" else {}
            request = parse_request("moons", controls(**{name: text} | grid).words)
            assert torch.isfinite(draw("moons", request, CPU).samples.x).all(), text


@pytest.fixture(scope="module")
def before():
    """The answer to the controls of the moons as they are at the start."""
    return answer_controls(controls(), PLANE_NAMES, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "ring"},
        {"sampler": "Heun()"},
        {"steps": 3},
        {"scale": 5.0},
        {"labels": [1]},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                {"schedule": "Laplace()"},
                {"grid": "Trailing()"},
                {"rule": "Rescale"},
                {"low": 0.5},
                {"high": 1.0},
                {"per_label": 9},
                {"seed": 4},
            )
        ),
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_control_changes_pictures_and_commands(before, change):
    after = answer_controls(controls(**change), PLANE_NAMES, CPU)
    assert len(pictures(before)) == len(pictures(after)) == 3
    assert not all(
        np.array_equal(*pair) for pair in zip(pictures(before), pictures(after), strict=True)
    )
    assert before.command != after.command
    assert before.code != after.code


def test_the_number_of_evaluations_is_that_of_the_network_calls():
    words = ["--sampler=Heun()", "--steps=10", "--guidance=Interval(CFG(2), 0.5, 2.0)"]
    drawing = draw("moons", parse_request("moons", words), CPU)
    steps = drawing.step_starts
    assert len(steps) == len(drawing.samples.knots) - 1 == 11  # σ/α = 2 becomes a knot, 0.5 is one
    guided = [step for step in steps if 0.5 + 1e-9 < np.exp(-step.level.logsnr / 2) <= 2.0 + 1e-9]
    count = len(drawing.evaluations) + 2 * len(guided)  # two evaluations of a step have a reference
    assert drawing.facts["network evaluations for each sample"] == f"{count} ({count} planned)"
    assert len(guided) == 3


def test_the_trajectories_begin_at_the_noise_and_pass_the_knots():
    drawing = draw("mixture", parse_request("mixture", ["--sampler=Heun()", "--steps=6"]), CPU)
    levels = [evaluation.level for evaluation in drawing.step_starts]
    assert levels == list(drawing.samples.knots[:-1])
    assert len(drawing.evaluations) == 10  # the steps from pure noise and to data have one
    first = drawing.evaluations[0].x
    assert float(first.std()) == pytest.approx(1.0, abs=0.1)
    last = drawing.evaluations[-1].x0
    assert torch.allclose(last, drawing.samples.x, atol=1e-6)  # Euler to the clean level gives x_0


@pytest.mark.slow
def test_trajectories_are_those_of_the_first_batch(trained):
    words = ["--steps=2", f"--per_label={BATCH + 3}", "--labels=1"]
    drawing = draw(str(trained), parse_request(str(trained), words), CPU)
    assert len(drawing.samples.x) == BATCH + 3
    assert [evaluation.x.shape[0] for evaluation in drawing.evaluations] == [BATCH, BATCH]
    assert drawing.batch_size == BATCH


def test_a_run_shows_predictions_and_samples(trained):
    values = controls(str(trained), "--steps=3", "--labels=1,2")
    answer = answer_controls(values, [str(trained)], CPU)
    _, predictions, samples = pictures(answer)
    assert predictions.std() > 0 < samples.std()
    assert "diffcore sample" in answer.command
    assert "predicted at λ = -inf" in answer.pictures


def test_a_run_begins_with_its_own_settings(trained):
    request = parse_request(str(trained), [])
    assert describe_component(request.guidance) == "CFG(1.5)"
    assert request.steps == 25
    assert (list(request.labels), request.per_label) == ([0, 1, 2, 3], 4)


def test_a_run_of_points_begins_with_many_samples(tmp_path):
    Process(shape=(2,), classes=2, dropout=0.1).save(tmp_path / "process.json")
    (tmp_path / "config.yaml").write_text("sample_steps: 5\nnetwork: mine.Network\n")
    request = parse_request(str(tmp_path), [])
    assert (request.steps, list(request.labels), request.per_label) == (5, [0, 1], 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "Hoin()"}, "did you mean"),
        ({"sampler": "os.system"}, "sampler"),
        ({"grid": "Karras()"} | {"schedule": "LogLinear()"}, "choose bounds within it"),
        ({"sampler": "<b>Heun</b>"}, "&lt;b&gt;"),
        ({"labels": [5]}, "labels [5] are out of range, expected 0 .. 1"),
        ({"steps": 10_000}, "steps is 10000, expected 1 to 1,000"),
        ({"per_label": 5000}, "at most 2,048 samples in all"),
        ({"rule": "Mine"}, "the rule is"),
        ({"model": "ring"}, "the model is 'ring', expected one of moons, /nowhere"),
        ({"model": "/nowhere"}, "/nowhere is not a run's folder"),
        ({"prompt": "a cat", "labels": []}, "moons is not conditioned on text"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"seed": None}, "seed is empty, expected a number"),
    ],
)
def test_a_wrong_value_is_explained_in_place_of_the_pictures(change, message):
    answer = answer_controls(controls()._replace(**change), ["moons", "/nowhere"], CPU)
    assert 'role="alert"' in answer.pictures
    assert message in answer.pictures.replace("&#x27;", "'")
    assert "<b>" not in answer.pictures
    assert answer.command == answer.code == ""


def test_the_picture_of_knots_states_their_levels():
    drawing = draw("moons", parse_request("moons", ["--grid=Karras()", "--steps=4"]), CPU)
    knots, trajectories, samples = draw_panels(drawing)
    assert knots.text == "λ of the knots: -8.76, -4.55, 1.51, 12.4, inf"
    assert trajectories.text.startswith("4 steps")
    assert samples.text == "256 samples"


def test_the_command_writes_arrays_only(diffcore, tmp_path):
    ended = diffcore("playground", "moons", "--out=picture.png")
    assert ended.status == 1
    assert "expected a file of suffix .safetensors, .npz, .npy" in ended.err
    ended = diffcore("playground", "--steps=2", "--out=new/x.npy")
    assert ended.status == 0, ended.err
    assert "256 samples of 4 evaluations each" in ended.out
    assert np.load("new/x.npy").shape == (256, 2)


@pytest.mark.skipif(has_extra("gradio"), reason="gradio is installed")
def test_without_gradio_the_command_names_the_extra(diffcore):
    ended = diffcore("playground")
    assert ended.status == 1
    assert "pip install 'diffcore[ui]'" in ended.err


@pytest.mark.skipif(not has_extra("gradio"), reason="gradio is not installed")
@pytest.mark.slow
def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(port=server.getsockname()[1])
        with pytest.raises(ValueError, match=r"cannot be used .*choose another --port"):
            serve(["moons"], controls(), CPU, address)


def test_a_port_out_of_range_is_refused():
    with pytest.raises(ValueError, match="port is 70000, expected 1 to 65535"):
        Address(port=70_000)
