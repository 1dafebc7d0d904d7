"""All benchmarks in one command: pages, baseline and regressions; no times are tested."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks import suite
from benchmarks.comparison import Comparison
from benchmarks.sides import peers
from benchmarks.training_speed import measure_loops

ROOT = Path(__file__).parents[3]


@pytest.fixture
def docs(tmp_path):
    """A copy of the pages that are rewritten."""
    folder = tmp_path / "docs"
    (folder / "experiments").mkdir(parents=True)
    for name in ("benchmarks.md", "experiments/accuracy.md"):
        shutil.copy(ROOT / "docs" / name, folder / name)
    return folder


def facts(ratio, interval, **other):
    comparison = {"name": "work", "bound": 1.02, "ratio": ratio, "interval": interval}
    verdict = {"verdict": "met" if ratio <= 1.02 else "missed"}
    return {"comparisons": [comparison | verdict]} | other


def test_every_benchmark_has_its_block_in_one_page(docs):
    pages = [
        path.read_text() for path in (docs / "benchmarks.md", docs / "experiments/accuracy.md")
    ]
    names = [part.name for part in suite.PARTS] + ["summary", "accuracy-peers", "accuracy-methods"]
    for name in names:
        assert sum(page.count(f"<!-- benchmark {name} -->") for page in pages) == 1, name
    assert sum(page.count("<!-- benchmark ") for page in pages) == len(names)
    assert sum(page.count("<!-- end -->") for page in pages) == len(names)


def test_every_benchmark_has_a_command_that_the_script_accepts(monkeypatch):
    parser = benchmark._parser()
    for part in suite.PARTS:
        for words in (part.words, f"{part.words} {part.quick}"):
            assert callable(parser.parse_args([*words.split(), "--out", "x.json"]).measure)


def test_the_stored_measurements_are_plain_json_and_those_of_the_page():
    """Start-up is not stored yet; the regressions of a run are not stored either."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    page, measured = (ROOT / "docs/benchmarks.md").read_text(), {}
    for part in suite.PARTS:
        path = ROOT / f"docs/benchmarks/{part.name}.json"
        if not path.is_file():
            continue
        stored = json.loads(path.read_text(), parse_constant=refuse)
        assert stored["command"] == f"python scripts/benchmark.py {part.words}"
        block = page.partition(f"<!-- benchmark {part.name} -->")[2].partition("<!-- end -->")[0]
        for each in stored.get("comparisons", ()):
            low, high = each["interval"]
            cells = f" | {each['ratio']:.3f} | {low:.3f} to {high:.3f} | "
            (row,) = (line for line in block.splitlines() if line.startswith(f"| {each['name']} |"))
            assert cells in row, each["name"]
            assert row.endswith(f" {each['verdict']} |") or part.name == "guidance", each["name"]
        measured[part.name] = stored
    assert suite._summary(measured, []) in page


def test_a_block_is_replaced_between_its_markers():
    page = "a\n<!-- benchmark x -->\nold \\1\n<!-- end -->\nb\n<!-- benchmark y -->\n<!-- end -->\n"
    new = suite.replace_block(page, "x", "| \\d |\n")
    assert new == page.replace("old \\1", "| \\d |")
    assert suite.replace_block(new, "y", "z").endswith("<!-- benchmark y -->\nz\n<!-- end -->\n")
    with pytest.raises(ValueError, match="0 blocks <!-- benchmark z -->"):
        suite.replace_block(page, "z", "")
    with pytest.raises(ValueError, match="2 blocks"):
        suite.replace_block(page + page, "x", "")


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        (facts(1.0, [0.99, 1.01]), facts(1.05, [1.02, 1.08]), 1),
        (facts(1.0, [0.99, 1.03]), facts(1.05, [1.02, 1.08]), 0),  # the intervals meet
        (facts(1.05, [1.02, 1.08]), facts(1.0, [0.99, 1.01]), 0),
        ({"comparisons": []}, facts(1.5, [1.4, 1.6]), 0),
        ({"default_errors": [["64-D", 5, 0.1]]}, {"default_errors": [["64-D", 5, 0.106]]}, 1),
        ({"default_errors": [["64-D", 5, 0.1]]}, {"default_errors": [["64-D", 5, 0.104]]}, 0),
        ({"default_errors": [["64-D", 5, 0.1]]}, {"default_errors": [["64-D", 8, 0.2]]}, 0),
        ({"memory": {"diffcore": 800.0}}, {"memory": {"diffcore": 850.0}}, 1),
        ({"memory": {"diffcore": 800.0}}, {"memory": {"diffcore": 830.0}}, 0),
        (
            {"starts": [{"seconds": 3.0}, {"seconds": 3.6}]},
            {"starts": [{"seconds": 6.0}, {"seconds": 9.0}]},
            1,
        ),
        (
            {"starts": [{"seconds": 3.0}, {"seconds": 3.6}]},
            {"starts": [{"seconds": 9.0}, {"seconds": 10.8}]},  # a slower machine
            0,
        ),
    ],
)
def test_a_regression_is_a_number_beyond_the_baseline_and_its_scatter(before, after, count):
    assert len(suite.find_regressions(before, after)) == count


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, "met"), (1.04, "missed"), (1.021, "undecided")]
)
def test_a_target_is_met_missed_or_undecided(ours, verdict):
    scatter = [ours - 0.01, ours + 0.01] * 15 + [ours]
    found = Comparison("work", 1.02, tuple(scatter), (1.0,) * 31)
    assert found.verdict == verdict
    assert found.to_json()["verdict"] == verdict


def test_the_pages_the_measurements_and_the_summary_are_written(docs, monkeypatch):
    ratios = iter([(1.0, [0.99, 1.01]), (1.1, [1.05, 1.15])])

    def measure(part, *_):
        found = facts(*next(ratios), rows=[1])
        return found | {"blocks": {"table": f"| {part.name} |", "accuracy-peers": "| peers |"}}

    monkeypatch.setattr(suite, "_measure", measure)
    part, lines = suite.PARTS[1], []
    assert suite.run_suite([part], docs, report=lines.append) == []
    stored = json.loads((docs / f"benchmarks/{part.name}.json").read_text())
    assert "rows" not in stored
    page = (docs / "benchmarks.md").read_text()
    assert f"<!-- benchmark {part.name} -->\n| {part.name} |\n<!-- end -->" in page
    assert "<!-- benchmark accuracy-peers -->\n| peers |\n" in page
    assert "Every target of a ratio is met." in page
    assert "stored measurements: nothing." in page
    (regression,) = suite.run_suite([part], docs, report=lines.append)
    assert "ratio 1.100 (1.050 to 1.150), stored 1.000 (up to 1.010)" in regression
    page = (docs / "benchmarks.md").read_text()
    assert f"- {regression}" in page
    assert f"| {part.name} | work | 1.100 | 1.02 | missed |" in page
    assert (docs / "pictures/ratios.png").stat().st_size > 3000
    assert len(lines) == 4


def test_a_ratio_without_target_has_no_verdict_and_is_plain_json():
    found = Comparison("work", math.inf, (2.0,) * 30, (1.0,) * 30)
    assert found.verdict == found.cells[-1] == ""
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["bound"] is None


def test_a_benchmark_that_fails_does_not_stop_the_others(docs, monkeypatch):
    def measure(part, *_):
        if part is suite.PARTS[0]:
            raise subprocess.CalledProcessError(3, "x")
        comparison = Comparison("work", math.inf, (2.0,) * 30, (1.0,) * 30)
        return {"comparisons": [comparison.to_json()], "blocks": {"table": "new"}}

    monkeypatch.setattr(suite, "_measure", measure)
    with pytest.raises(ValueError, match=f"failed, .* are old: {suite.PARTS[0].name}"):
        suite.run_suite(suite.PARTS[:2], docs, report=lambda line: None)
    page = (docs / "benchmarks.md").read_text()
    assert f"<!-- benchmark {suite.PARTS[1].name} -->\nnew\n" in page
    assert f"so that the tables are older: {suite.PARTS[0].name}." in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("all", "--only", "nothing"), "only names nothing, expected some of start-up, steps"),
        (("all", "--quick"), "quick numbers are not for docs/"),
        (("memory", "--networks", "huge"), "networks are ['huge'], expected some of tiny, large"),
        (("start_up", "--pairs", "3"), "3 values have no interval of the median"),
    ],
)
def test_bad_options_are_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        benchmark.main()
    torch.set_num_threads(threads)
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_library_that_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    def absent():
        raise ImportError("azula is not installed")

    with pytest.raises(ImportError, match="no_such_library is not installed"):
        peers.import_peer("no_such_library.module")
    monkeypatch.setattr(peers, "SIDES", {"x": ("no_such_library.module", None)})
    assert peers.available_sides() == ({}, ["x (no_such_library is not installed)"])
    monkeypatch.setattr("benchmarks.training_speed.digits_state", lambda folder: None)
    monkeypatch.setattr("benchmarks.training_speed.step_function", lambda state: None)
    assert measure_loops({"azula": absent}, 30) == ([], ["azula (azula is not installed)"])


def test_a_package_is_imported_without_its_init_and_torchvision_leaves_no_trace(
    tmp_path, monkeypatch
):
    package = tmp_path / "some_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a tracker is missing')")
    (package / "sampling.py").write_text(
        "from torchvision.transforms import functional as TF\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = {name for name in sys.modules if name.startswith("torchvision")}
    try:
        assert peers.import_peer("some_peer.sampling").value == 3
        assert {name for name in sys.modules if name.startswith("torchvision")} == before
    finally:
        for name in ("some_peer", "some_peer.sampling"):
            sys.modules.pop(name, None)
