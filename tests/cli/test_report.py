"""`diffcore report`: one page that holds everything of a run, and fetches nothing."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from diffcore.cli.commands import report
from diffcore.io.files import hash_file
from diffcore.report.charts import Curve, line_chart
from diffcore.report.figures import line_colours
from diffcore.report.page import Section, page, text_block

VOID = {"img", "input", "meta", "path", "use"}


class Checker(HTMLParser):
    """Collects tags and addresses, and checks that elements are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, with held-out losses and two previews."""
    from PIL import Image

    folder = shutil.copytree(trained, tmp_path / "a <b>run")
    lines = [
        {
            "step": step,
            "loss": 1 / step,
            "loss_current": None,
            "logsnr": [None, 1.5, None],
            "loss_by_level": [0.5, 0.25 / step],
        }
        for step in (2, 4)
    ]
    (folder / "validation.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    (folder / "samples").mkdir(exist_ok=True)
    for step in (2, 4):
        Image.new("L", (8, 8), 30 * step).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


@pytest.fixture
def no_charts(monkeypatch):
    """Charts are the longest part of a report, and left out where the test is about the rest."""
    monkeypatch.setattr(report, "line_chart", lambda title, *_, **__: f"<figure>{title}</figure>")


def test_the_page_holds_everything_of_the_run_and_fetches_nothing(diffcore, run, tmp_path):
    ended = diffcore("report", run, f"--out={tmp_path / 'new/page.html'}")
    assert ended.status == 0, ended.err
    html = (tmp_path / "new/page.html").read_text("utf-8")
    found = Checker(html)
    assert not [tag for tag in found.open if tag != "html"]
    assert found.tags.count("svg") == 4 + 2 + 3 + 3  # training, speed, held-out, levels
    assert found.tags.count("img") == 2
    text = " ".join(found.text)
    for fact in ("UNet2DModel", "v_prediction", "λ 1.5 to ∞", "norm of the gradient", "MinSNR"):
        assert fact in text, fact
    assert "a &lt;b&gt;run" in html
    assert "a <b>run" not in html
    assert found.addresses
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in found.addresses)
    assert "default-src 'none'" in html
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.usefixtures("no_charts")
def test_a_run_without_previews_and_held_out_data_has_no_empty_sections(
    diffcore, trained, tmp_path
):
    ended = diffcore("report", trained, f"--out={tmp_path / 'page.html'}")
    assert ended.status == 0, ended.err
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "Held-out data" not in html
    assert "Samples during training" not in html
    assert "Environment" in html


def test_a_folder_that_holds_no_run_is_one_line(diffcore, tmp_path):
    ended = diffcore("report", tmp_path / "absent")
    assert ended.status == 1
    assert "is not a run's folder" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("metrics.jsonl", "loss", "low"),
        ("metrics.jsonl", "step", None),
        ("metrics.jsonl", "noise_scale", "low"),
        ("metrics.jsonl", "loss_by_level", 1.0),
        ("speed.jsonl", "memory_resident", "much"),
        ("validation.jsonl", "loss_by_level", [0.5, "low"]),
        ("validation.jsonl", "logsnr", 1.0),
    ],
)
def test_an_entry_that_is_missing_or_no_number_is_named_with_file_and_line(
    diffcore, run, file, name, value
):
    lines = (run / file).read_text().splitlines()
    line = json.loads(lines[1])
    without = {key: each for key, each in line.items() if key != name}
    optional = ("step", "noise_scale", "loss_by_level", "memory_resident")
    changes = [line | {name: value}]
    changes += [without] if name not in optional or file == "validation.jsonl" else []
    for changed in changes:
        (run / file).write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]))
        ended = diffcore("report", run)
        assert ended.status == 1
        assert f"{run / file}: line 2 has no {name}, or one that is no number" in ended.err
        assert len(ended.err.splitlines()) == 1


def test_the_noise_scale_is_the_quotient_of_its_averaged_parts():
    """One report is NaN, and the first square is negative."""
    parts = [(1.0, -1.0), (None, None), (5.0, 4.0), (6.0, 1.0)]
    reports = [
        {"step": step, "grad_variance": variance, "grad_square": square}
        for step, (variance, square) in enumerate(parts)
    ]
    drawn = {}

    def line_chart(title, curves, *_):
        drawn.update(curves)
        return title

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "line_chart", line_chart)
        report._noise_chart(reports)
        assert report._noise_chart(reports[:2]) == {}
    (curve,) = drawn.values()
    assert curve.x == [0, 2, 3]
    assert curve.y == [None, 6 / 3, 12 / 4]


@pytest.mark.usefixtures("no_charts")
def test_a_report_of_a_run_without_levels_and_speed_has_no_charts_of_them(diffcore, run):
    (run / "speed.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["loss_by_level"], line["logsnr"]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert diffcore("report", run).status == 0
    html = (run / "report.html").read_text("utf-8")
    assert "norm of the gradient" in html
    assert "images per second" not in html
    assert ">loss by noise level" not in html


@pytest.mark.usefixtures("no_charts")
def test_held_out_losses_of_another_number_of_intervals_are_left_out(diffcore, run):
    path = run / "validation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"loss_by_level": [1.0], "logsnr": [None, None]}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ended = diffcore("report", run)
    assert ended.status == 0, ended.err


def test_a_chart_has_the_colour_of_the_page_and_the_same_bytes_each_time():
    curves = {"a": Curve([1, 2, 3], [1.0, None, 3.0]), "b & c": Curve([1, 2], [2.0, 1.0])}
    svg = line_chart('a "<title>"', curves, "step", "log")
    assert svg == line_chart('a "<title>"', curves, "step", "log")
    assert "currentColor" in svg
    pairs = zip(line_colours(2, "light"), line_colours(2, "dark"), strict=True)
    assert {f"light-dark({light}, {dark})" for light, dark in pairs} == set(
        re.findall(r"light-dark\([^)]*\)", svg)
    )
    assert not re.search("#[0-9a-f]{6}", re.sub(r"light-dark\([^)]*\)", "", svg))
    assert ">b &amp; c</text>" in svg
    assert 'aria-label="a &quot;&lt;title>&quot;"' in svg
    assert not re.search(r"<svg[^>]*(width|height)=", svg)


def test_text_is_escaped_and_sections_without_a_body_are_left_out():
    html = page("<t>", "a & b", [Section("one", text_block("<x>")), Section("two", text_block(""))])
    assert "&lt;x&gt;" in html
    assert "a &amp; b" in html
    assert "two" not in html


@pytest.mark.usefixtures("no_charts")
def test_the_results_of_an_evaluation_are_shown_with_the_weights_that_they_belong_to(diffcore, run):
    results = {
        "accuracy": 0.98765,
        "guidance": {"class_path": "CFG", "init_args": {"scale": 1.5}},
        "weights": hash_file(run / "ema.safetensors"),
    }
    for weights, sentence in ((results["weights"], "those of the run;"), ("0", "NOT those of the")):
        (run / "evaluation.json").write_text(json.dumps(results | {"weights": weights}))
        assert diffcore("report", run).status == 0
        html = (run / "report.html").read_text("utf-8")
        for fact in ("Evaluation", "0.9877", "CFG(scale=1.5)", f"<td>{sentence}"):
            assert fact in html, fact
    (run / "evaluation.json").write_text("[1]")
    ended = diffcore("report", run)
    assert ended.status == 1
    assert "evaluation.json holds a list" in ended.err


@pytest.mark.usefixtures("no_charts")
def test_the_bits_per_dimension_are_shown_with_the_weights_that_they_belong_to(diffcore, run):
    found = {
        "bits_per_dimension": 2.71828,
        "standard_error": 0.0123,
        "data": "Digits: 3 of 9 items",
    }
    current = {"weights": hash_file(run / "ema.safetensors")}
    results = {"ode, a": found | current, "bound, a": found | {"weights": "0"}}
    (run / "likelihood.json").write_text(json.dumps(results))
    assert diffcore("report", run).status == 0
    html = (run / "report.html").read_text("utf-8")
    shown = "2.718 ± 0.0123 (standard error), Digits: 3 of 9 items; weights:"
    assert f"<th>ode, a</th><td>{shown} those of the run" in html
    assert f"<th>bound, a</th><td>{shown} NOT those of the run" in html


@pytest.mark.usefixtures("no_charts")
def test_a_comparison_of_other_weights_is_marked(diffcore, run):
    case = {"guidance": "CFG(1.0)", "sampler": "DDIM()", "evaluations": 4, "steps": 4}
    case |= {"distance": None, "interval": None, "reason": "a stochastic sampler"}
    record = {"cases": [case], "seconds": [{"seconds_per_sample": 0.5}]}
    (run / "comparison").mkdir()
    for weights, is_other in ((hash_file(run / "ema.safetensors"), False), ("0", True)):
        content = json.dumps(record | {"weights": weights})
        (run / "comparison/comparison.json").write_text(content)
        assert diffcore("report", run).status == 0
        html = (run / "report.html").read_text("utf-8")
        assert "<td>a stochastic sampler</td>" in html
        assert ("Of other weights than those of the run" in html) == is_other
