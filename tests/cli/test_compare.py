"""`diffcore compare`: results that are equal each time, pictures, the report, and bad input."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--steps", 2, 4, "--n=6", "--repeats=1", "--flow-steps=6")
CASES = (
    *("--samplers", "DDIM", "Heun()", "{class_path: DDPM, init_args: {variance: 0.5}}"),
    *("--guidance", "CFG(1.5)", "none", "APG(3)"),
)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.slow
def test_the_tables_the_record_and_the_pictures_are_equal_each_time(diffcore, run):
    printed, records, images = [], [], []
    for _ in range(2):
        ended = diffcore("compare", run, *CASES, *OPTIONS)
        assert ended.status == 0, ended.err
        printed.append(ended.out)
        record = json.loads((run / "comparison/comparison.json").read_text())
        assert all(row["seconds_per_sample"] > 0 for row in record.pop("seconds"))
        records.append(record)
        images.append({p.name: p.read_bytes() for p in (run / "comparison").glob("*.png")})
    assert records[0] == records[1]
    assert images[0] == images[1]
    names = ["guidance.png", *(f"samplers-{i}.png" for i in (1, 2, 3))]
    assert sorted(images[0]) == sorted(record["pictures"]) == names
    rows = {(c["guidance"], c["sampler"], c["evaluations"]): c for c in record["cases"]}
    assert len(rows) == len(record["cases"]) == 3 * 3 * 2
    heun = rows["CFG(1.5)", "Heun()", 4]
    assert (heun["steps"], heun["network_evaluations"]) == (3, 8)  # the first and last of order 1
    assert heun["distance"] > heun["flow_error"] > 0
    assert rows["CFG(1.0)", "DDIM()", 4]["network_evaluations"] == 4
    assert rows["APG(3.0)", "DDIM()", 2]["distance"] is None
    assert "defines no flow" in rows["APG(3.0)", "DDIM()", 2]["reason"]
    assert "stochastic" in rows["CFG(1.5)", "DDPM(0.5)", 2]["reason"]
    assert record["labels"] == [0, 1, 2, 3, 4, 5]
    assert record["seeds"] == "0-5"
    assert "Heun() (2, 3 steps)" in printed[0]
    assert "guidance APG(3.0): one evaluation of the guided network is 2" in printed[0]
    assert "error of about" in printed[0]
    with Image.open(run / "comparison/samplers-1.png") as one:
        assert one.height > 3 * 44
    assert diffcore("report", run).status == 0
    html = (run / "report.html").read_text("utf-8")
    for fact in ("<h2>Samplers</h2>", "distance to the flow, CFG(1.5)", "<td>Heun()</td>"):
        assert fact in html, fact
    assert html.count('alt="samplers-') == 3


def test_the_defaults_are_those_of_the_run(diffcore, run):
    ended = diffcore("compare", run, *OPTIONS, "--out=there", "--labels=3", "--seed=5")
    assert ended.status == 0, ended.err
    record = json.loads(Path("there/comparison.json").read_text())
    samplers = list(dict.fromkeys(case["sampler"] for case in record["cases"]))
    expected = ["AdamsMoulton(3, every=10)", "DDIM()", "Heun()", "DPMSolverPP('2M')", "UniPC(2)"]
    assert samplers == expected
    assert {case["guidance"] for case in record["cases"]} == {"CFG(1.5)"}  # of the recipe
    assert record["labels"] == [3]
    assert record["seeds"] == "5-10"
    assert record["pictures"] == ["samplers.png"]
    assert not (run / "comparison").exists()


def test_rules_of_weaker_networks_are_named_by_their_folders(diffcore, run):
    folders = [str(run), f"{run}/."]
    rules = [f"AutoGuidance(2.0, weaker={folder!r})" for folder in folders]
    fast = ("--steps", 1, "--n=1", "--repeats=1", "--flow-steps=2")
    ended = diffcore("compare", run, "--samplers", "DDIM", "--guidance", *rules, *fast)
    assert ended.status == 0, ended.err
    cases = json.loads((run / "comparison/comparison.json").read_text())["cases"]
    assert [case["guidance"] for case in cases] == [
        f"AutoGuidance(scale=2.0, weaker=WeakerNetwork({folder}))" for folder in folders
    ]
    assert [case["network_evaluations"] for case in cases] == [2, 2]
    assert ended.out.count("guidance AutoGuidance") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samplers", "AdaptiveRungeKutta"), "chooses its number of evaluations itself"),
        (("--samplers", "DDIMM"), "did you mean 'DDIM'"),
        (("--samplers", "UniPC(q=1)"), "UniPC(q=1): got an unexpected keyword argument"),
        (("--guidance", "CFG(-1)"), "scale is -1"),
        (("--steps", 0), "steps are [0], expected 1 to 10,000 each"),
        (("--steps", "many"), "steps"),
        (("--n=0",), "n is 0"),
        (("--repeats=0",), "repeats is 0"),
        (("--flow-steps=1",), "flow_steps is 1"),
        (("--seed=-1",), "seed is -1"),
        (("--labels=11",), "labels [11] are out of range"),
        (("--prompt=a cat",), "UNet2DModel is not conditioned on text"),
        (("--samplers", "AlphaBlending(2)", "--steps", 1), "one step takes more than 1"),
        (("--picture=lines",), "picture is 'lines'"),
        (("--weights=step-9",), "weights is 'step-9'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_one_line(diffcore, trained, words, message):
    ended = diffcore("compare", trained, "--n=2", "--flow-steps=2", "--repeats=1", *words)
    assert ended.status in (1, 2)
    assert message in ended.err
    assert len([x for x in ended.err.splitlines() if "error" in x]) == 1
    assert "Traceback" not in ended.err
    assert not (trained / "comparison").exists()


def test_no_run_is_one_line(diffcore, tmp_path):
    assert "is not a run's folder" in diffcore("compare", tmp_path / "absent").err
    assert "the run's folder comes first" in diffcore("compare", "--n=2").err


@pytest.mark.parametrize(
    "change",
    [
        {"cases": 3},
        pytest.param({"seconds": [{}]}, marks=pytest.mark.slow),
        pytest.param({"cases": [{"sampler": "DDIM()"}], "seconds": [{}]}, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_record_is_named_by_the_report(diffcore, run, change):
    (run / "comparison").mkdir()
    (run / "comparison/comparison.json").write_text(
        json.dumps({"cases": [], "seconds": []} | change)
    )
    ended = diffcore("report", run)
    assert ended.status == 1
    assert "comparison.json" in ended.err
    assert "run diffcore compare again" in ended.err


def test_a_pipeline_is_compared_by_its_prompts_in_latents(diffcore, tmp_path):
    import diffusers

    from tests.helpers import text_networks

    folder = tmp_path / "pipeline"
    text_networks.sd(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)).save_pretrained(
        folder
    )
    words = ("--samplers", "DDIM", "--steps", 2, "--n=2", "--repeats=1", "--flow-steps=2")
    prompts = ("--prompt=a red cat", "--prompt=dogs", "--negative=blur")
    ended = diffcore("compare", folder, *words, *prompts)
    assert ended.status == 0, ended.err
    record = json.loads((tmp_path / "pipeline-comparison/comparison.json").read_text())
    assert record["prompts"] == ["a red cat", "dogs"]
    assert (record["negative"], record["adapters"]) == ("blur", [])
    assert record["cases"][0]["distance"] > 0
    assert record["shape"][0] == 4  # channels of the latents
    with Image.open(tmp_path / "pipeline-comparison/samplers.png") as picture:
        assert picture.width > 100
    assert "give prompts, --prompt" in diffcore("compare", folder, *words).err
