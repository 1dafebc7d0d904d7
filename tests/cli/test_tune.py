"""`diffcore tune`: what it writes, who uses it, and bad input."""

import json
import shutil

import pytest

from diffcore.cli.tuned_record import find_record
from diffcore.guidance import CFG
from diffcore.schedules import Tuned

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = (
    *("--evaluations", 3, "--fit=4", "--held-out=10", "--flow-steps=12"),
    *("--starts=1", "--iterations=1", "--samplers", "DDIM", "--grids", "Trailing"),
)
SAMPLE = ("--steps=3", "--labels=0-1", "--out=a.npz")


@pytest.fixture(scope="module")
def tuned(trained, tmp_path_factory):
    """A copy of the tiny run with a record for 3 evaluations and the run's guidance."""
    from diffcore.cli.main import main

    folder = shutil.copytree(trained, tmp_path_factory.mktemp("tuned") / "run")
    assert main(["tune", str(folder), *map(str, QUICK)]) == 0
    return folder


@pytest.fixture
def run(tuned, tmp_path):
    return shutil.copytree(tuned, tmp_path / "run")


def content(run):
    (path,) = (run / "tuned").glob("*.json")
    return path, json.loads(path.read_text())


def test_the_record_holds_what_was_found_and_how(tuned):
    _, data = content(tuned)
    record = find_record(tuned, 3, CFG(1.5))
    facts = data["facts"]
    better = facts["tuned"]["held_out"]["median"] < facts["untuned"]["held_out"]["median"]
    assert (record.evaluations, record.steps, record.guidance) == (3, 3, CFG(1.5))
    assert isinstance(record.grid, Tuned) == record.is_tuned
    assert facts["history"] == 3
    assert better or not record.is_tuned
    assert facts["fit"] == 4
    assert facts["held_out"] == 10
    assert len(data["record"]["weights"]) == 64
    assert find_record(tuned, 4, CFG(1.5)) is None
    assert find_record(tuned, 3, CFG(2.0)) is None


def as_tuned(run):
    """Give the record knots and coefficients of its own, so that their use is seen."""
    path, data = content(run)
    knots = {"logsnrs": ["-.inf", -1.25, 2.5, ".inf"], "otherwise": {"class_path": "Quadratic"}}
    grid = {"class_path": "Tuned", "init_args": knots}
    rows = {"x0": [[0.1], [0.2, 0.3]], "eps": [[0.0], [0.0, -0.5]], "guidance": "CFG(1.5)"}
    coefficients = {"inner": {"class_path": "DDIM"}, **rows}
    sampler = {"class_path": "TunedMultistep", "init_args": coefficients}
    data["record"] |= {"grid": grid, "sampler": sampler, "is_tuned": True}
    path.write_text(json.dumps(data))
    return path


def test_sample_uses_the_record_for_its_steps_and_guidance_alone(diffcore, run):
    path = as_tuned(run)
    used = diffcore("sample", run, *SAMPLE, "--print-knots=true")
    assert used.status == 0, used.err
    assert f"tuned knots and coefficients for 3 evaluations, of {path}" in used.out
    assert "TunedMultistep" in used.out
    assert "-1.25" in used.out
    assert "2.5" in used.out
    for options in (
        ("--steps=4",),
        ("--guidance=CFG(2)",),
        ("--grid=Trailing",),
        ("--sampler=Heun",),
        ("--weights=raw",),
    ):
        other = diffcore("sample", run, *SAMPLE, *options, "--print-knots=true")
        assert other.status == 0, other.err
        assert "tuned" not in other.out, options
        assert "-1.25" not in other.out, options


def test_a_record_of_other_weights_is_named_and_not_used(diffcore, run):
    path = as_tuned(run)
    data = json.loads(path.read_text())
    data["record"]["weights"] = "0" * 64
    path.write_text(json.dumps(data))
    ended = diffcore("sample", run, *SAMPLE)
    assert ended.status == 0, ended.err
    assert "of other weights and not used: tune again" in ended.out
    assert "Tuned" not in ended.out


def test_the_exported_pipeline_has_the_tuned_knots(diffcore, run):
    from diffcore.integrations.diffusers import DiffcorePipeline

    as_tuned(run)
    ended = diffcore("export", run, "--steps=3", "--out=pipe")
    assert ended.status == 0, ended.err
    assert "tuned knots and coefficients for 3 evaluations" in ended.out
    pipe = DiffcorePipeline.from_pretrained("pipe")
    sampler = pipe.scheduler.settings.sampler
    assert (sampler.x0, sampler.eps) == (((0.1,), (0.2, 0.3)), ((0.0,), (0.0, -0.5)))
    pipe.scheduler.set_timesteps(3)
    assert [knot.logsnr for knot in pipe.scheduler.call.plan.all_knots][1:3] == [-1.25, 2.5]
    pipe.scheduler.set_timesteps(6)
    assert pipe.scheduler.num_inference_steps == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--evaluations", "1"), "evaluations are [1], expected 2 to 100 each"),
        (("--fit", "2"), "fit is 2, expected 4 to"),
        (("--held-out", "3"), "held_out is 3, expected 10 to"),
        (("--iterations", "0"), "expected 1 to 100 and 1 to 1000"),
        (("--history", "-1"), "history is -1, expected 0 for knots alone"),
        (("--flow-steps", "1"), "flow_steps is 1, expected at least 2"),
        (("--guidance", "APG(3)", "--flow-steps", "4"), "defines no flow"),
        (("--samplers", "DDPM", *QUICK[:6]), "no sampler can be tuned to 3 evaluations: "),
    ],
)
def test_mistakes_are_one_line(diffcore, trained, words, message):
    ended = diffcore("tune", trained, *words)
    assert ended.status != 0
    lines = [line for line in ended.err.splitlines() if not line.startswith("diffcore: flow of")]
    assert len(lines) == 1, ended.err
    assert message in lines[0]


def test_a_damaged_record_is_an_error_of_one_line(diffcore, run):
    path, _ = content(run)
    path.write_text('{"record": {"steps": 3}}')
    ended = diffcore("sample", run, *SAMPLE)
    assert ended.status != 0
    assert "is no record of diffcore tune" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
