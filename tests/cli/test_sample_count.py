"""`diffcore sample --n`: many samples in a folder, by all ranks; and `--cache`."""

import hashlib
import json

import pytest


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")
    }


def draw(diffcore, trained, out, *words):
    return diffcore(
        "sample", trained, "--steps=2", "--threads=1", "--batch-size=4", f"--out={out}", *words
    )


def test_labels_take_turns_and_each_sample_has_its_number_as_seed(diffcore, trained, tmp_path):
    out = tmp_path / "all"
    assert draw(diffcore, trained, out, "--n=7", "--labels=2,5").status == 0
    names = {f"label-{(2, 5)[k % 2]}-seed-{k}.png" for k in range(7)}
    assert contents(out).keys() == names
    single = tmp_path / "single"
    draw(diffcore, trained, single, "--labels=5", "--seeds=3")
    assert contents(single)["label-5-seed-3.png"] == contents(out)["label-5-seed-3.png"]


def test_ranks_share_the_samples_and_a_restart_draws_what_is_missing(
    diffcore, trained, tmp_path, monkeypatch
):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    draw(diffcore, trained, whole, "--n=10", "--labels=0-1")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        before = len(contents(shared))
        assert draw(diffcore, trained, shared, "--n=10", "--labels=0-1").status == 0
        counts.append(len(contents(shared)) - before)
    assert counts == [4, 3, 3]
    assert contents(shared) == contents(whole)
    lost = shared / "label-0-seed-4.png"
    lost.unlink()
    ended = draw(diffcore, trained, shared, "--n=10", "--labels=0-1")  # of rank 2 of 3
    assert "3 existed, 0 samples" in ended.out
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    ended = draw(diffcore, trained, shared, "--n=12", "--labels=0-1")
    assert "9 existed, 3 samples" in ended.out
    assert contents(shared).items() >= contents(whole).items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n=-1",), "n is -1"),
        (("--n=5", "--per-label=2"), "per_label 2: give one"),
        (("--n=5", "--seeds=0-3"), "seeds are 4, expected 5: n is 5"),
    ],
)
def test_bad_counts_are_one_line(diffcore, trained, tmp_path, words, message):
    ended = draw(diffcore, trained, tmp_path / "x", *words)
    assert ended.status
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_count_is_not_for_one_picture(diffcore, trained):
    ended = diffcore("sample", trained, "--n=5")
    assert "set --out to a folder" in ended.err


def test_a_cache_is_named_with_the_share_of_reused_calls(diffcore, trained, tmp_path):
    exact, out = tmp_path / "exact", tmp_path / "cached"
    draw(diffcore, trained, exact, "--n=3", "--labels=0-2", "--steps=6")
    words = ("--n=3", "--labels=0-2", "--steps=6", "--cache=DeepCache", "--cache.every=3")
    ended = draw(diffcore, trained, out, *words)
    assert "67% with features of DeepCache(every=3" in ended.out
    assert contents(out).keys() == contents(exact).keys()
    assert "DeepCache" in json.loads((out / "sampling.json").read_text())["cache"]
    assert "cache" not in json.loads((exact / "sampling.json").read_text())
    again = draw(diffcore, trained, exact, *words)
    assert "cache differ" in again.err
    wrong = draw(
        diffcore, trained, tmp_path / "other", "--n=1", "--labels=1", "--cache=FirstBlockCache()"
    )
    assert "use DeepCache" in wrong.err
