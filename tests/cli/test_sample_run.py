"""`diffcore sample` on a run: files, printed facts, and samples that depend on their seed alone."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.guidance import APG
from diffcore.io.network_size import BoundedFactory
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK = ("--steps=3", "--batch-size=4", "--guidance=CFG", "--guidance.scale=2")


def draw(diffcore, run, *options):
    """The samples of a run by (label, seed)."""
    ended = diffcore("sample", run, *QUICK, "--out=x.safetensors", *options)
    assert ended.status == 0, ended.err
    tensors = read_weights(Path("x.safetensors"))
    assert tensors["x"].shape[1:] == (1, 8, 8)
    keys = zip(tensors["label"].tolist(), tensors["seed"].tolist(), strict=True)
    return dict(zip(keys, tensors["x"], strict=True))


def test_a_labelled_grid_is_written_and_its_cost_is_printed(diffcore, trained):
    options = (
        "--labels=0-2",
        "--per-label=2",
        "--seeds=0-5",
        "--sampler=DDIM",
        "--out=new/grid.png",
    )
    ended = diffcore("sample", trained, *QUICK, *options)
    assert ended.status == 0, ended.err
    assert "6 samples of 6 network evaluations each" in ended.out  # three steps, guided
    assert "4 knots" in ended.out
    assert "-inf" in ended.out  # from pure noise
    assert [path.name for path in Path("new").iterdir()] == ["grid.png"]
    with Image.open("new/grid.png") as grid:
        assert grid.size[0] > 2 * 44 + 4  # two columns and the labels
        assert grid.size[1] == 3 * 44 + 4
    x = draw(diffcore, trained, "--labels=0-2", "--per-label=2", "--seeds=0-5")
    assert list(x) == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        (("--guidance.scale=1",), 3),
        (("--guidance.scale=2",), 6),
        (("--steps=5", "--guidance.scale=1"), 5),
        (("--sampler=AlphaBlending", "--sampler.order=1"), 6),
    ],
)
def test_the_printed_evaluations_are_those_of_the_network(
    diffcore, trained, monkeypatch, options, evaluations
):
    rows = []
    network = Run(trained).network()
    monkeypatch.setattr(BoundedFactory, "__call__", lambda _: network)
    network.register_forward_hook(lambda module, arguments, output: rows.append(len(arguments[0])))
    ended = diffcore(
        "sample", trained, *QUICK, "--labels=1", "--batch-size=1", "--out=x.png", *options
    )
    assert f"1 samples of {evaluations} network evaluations each" in ended.out
    assert sum(rows) == evaluations


KNOT = r"\s+[-\d.inf]+\s+[01]\.\d{5} "


def test_every_knot_is_printed_on_request(diffcore, trained):
    ended = diffcore(
        "sample",
        trained,
        *QUICK,
        "--labels=1",
        "--out=x.png",
        "--grid=Trailing",
        "--print-knots=true",
    )
    knots = [line.split() for line in ended.out.splitlines() if re.match(KNOT, line)]
    assert [float(knot[1]) for knot in knots] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-5)


GRIDS = {  # σ/α of the knots of three steps
    "--grid=Trailing": [math.inf, 1.7321, 0.57735, 0],
    "--grid=Linspace --grid.last=0.5": [math.inf, 2.4142, 1, 0],
    "--grid=Leading --grid.last=0.25": [2.4142, 1, 0.41421, 0],
    "--grid=Quadratic": [math.inf, 0.8391, 0.17633, 0],
    "--grid=BetaSpacing --grid.a=1 --grid.b=1": [math.inf, 1.7321, 0.57735, 0],
    "--grid=Karras --grid.sigma_max=8 --grid.sigma_min=0.5 --grid.rho=1": [8, 4.25, 0.5, 0],
    "--grid=UniformLogSNR --grid.low=-2 --grid.high=2": [2.7183, 1, 0.36788, 0],
    "--grid=UniformBlend --grid.rho=1 --grid.center=1": [math.inf, 2, 0.5, 0],
    "--grid=AlignYourSteps --grid.table=[8,4,2,1]": [8, 4, 2, 0],
    "--grid=AlignYourSteps --grid.table=svd --steps=10": [
        700,
        *(54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
        0,
    ],
    "--grid=Explicit --grid.logsnrs=[-2,0,2,.inf]": [2.7183, 1, 0.36788, 0],
    "--grid=Within --grid.grid=UniformLogSNR --grid.grid.high=2 --grid.low=-4 --grid.high=2": [
        7.3891,
        2.7183,
        1,
        0.36788,
    ],
}


@pytest.mark.parametrize("options", GRIDS)
def test_every_grid_prints_its_knots(diffcore, trained, options):
    ended = diffcore(
        "sample",
        trained,
        *QUICK,
        "--labels=1",
        "--out=x.png",
        "--print-knots=true",
        *options.split(),
    )
    assert ended.status == 0, ended.err
    knots = [line.split() for line in ended.out.splitlines() if re.match(KNOT, line)]
    assert [float(knot[4]) for knot in knots] == pytest.approx(GRIDS[options], rel=1e-4)


def test_samples_start_from_an_image_at_the_given_level(diffcore, trained):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("white.png")
    near, far = (
        torch.stack(
            list(
                draw(
                    diffcore, trained, "--labels=1", "--image=white.png", f"--start={start}"
                ).values()
            )
        )
        for start in (0.01, 50)
    )
    assert (near - 1).abs().max() < 0.2
    assert (far - 1).abs().max() > 0.5
    ended = diffcore(
        "sample",
        trained,
        *QUICK,
        "--labels=1",
        "--image=white.png",
        "--start=0.5",
        "--print-knots=true",
    )
    knots = [line.split() for line in ended.out.splitlines() if re.match(KNOT, line)]
    assert float(knots[0][4]) == 0.5
    assert len(knots) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--start=0.5",), "there is no image to start from: pass --image"),
        (("--start=-1", "--image=white.png"), "start is -1.0, expected σ/α above 0"),
        (("--image=white.png",), "first knot is pure noise, which keeps nothing of the image"),
        (("--image=none.png", "--start=1"), "none.png is not a readable image"),
        (("--image=wide.png", "--start=1"), "is 9 x 8 of mode L, expected 8 x 8"),
        (
            ("--image=white.png", "--start=1", "--grid=Explicit", "--grid.logsnrs=[0,1,2,3]"),
            "names its first knot itself",
        ),
    ],
)
def test_an_impossible_start_is_refused_in_one_line(diffcore, trained, options, message):
    Image.new("L", (8, 8), 255).save("white.png")
    Image.new("L", (9, 8), 255).save("wide.png")
    ended = diffcore("sample", trained, *QUICK, "--labels=1", *options)
    assert ended.status != 0
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_folder_gets_one_picture_for_each_seed(diffcore, trained):
    options = ("--labels=3,7", "--per-label=2", "--seeds=5,0,9,2")
    ended = diffcore("sample", trained, *QUICK, *options, "--out=pictures")
    assert ended.status == 0, ended.err
    x = draw(diffcore, trained, *options)
    assert {path.name for path in Path("pictures").glob("*.png")} == {
        f"label-{a}-seed-{b}.png" for a, b in x
    }
    for (label, seed), value in x.items():
        with Image.open(f"pictures/label-{label}-seed-{seed}.png") as picture:
            expected = ((value[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
            assert np.abs(np.array(picture).astype(int) - expected).max() <= 1


def test_seeds_without_labels_are_unconditional(diffcore, trained):
    ended = diffcore(
        "sample", trained, "--steps=2", "--guidance.scale=1", "--seeds=4,2", "--out=pictures"
    )
    assert ended.status == 0, ended.err
    assert {path.name for path in Path("pictures").glob("*.png")} == {"seed-4.png", "seed-2.png"}


@pytest.mark.parametrize("options", [(), ("--sampler=DDIM", "--sampler.eta=1")], ids=["ode", "sde"])
def test_a_sample_has_equal_bits_in_every_batch_and_order(diffcore, trained, options):
    all_samples = draw(diffcore, trained, "--labels=3,5", "--per-label=5", "--seeds=0-9", *options)
    assert len({value.numpy().tobytes() for value in all_samples.values()}) == 10
    for others in (
        ("--labels=3", "--seeds=2"),
        ("--labels=5", "--per-label=3", "--seeds=9,7,5"),
        ("--labels=5,3", "--per-label=2", "--seeds=6,8,4,1"),
        ("--labels=3", "--per-label=5", "--seeds=4,3,2,1,0"),
    ):
        for key, value in draw(diffcore, trained, *others, *options).items():
            assert torch.equal(value, all_samples[key]), key


def test_on_one_brownian_path_twice_the_steps_give_a_nearby_sample(diffcore, trained):
    def change(*options):
        few, many = (
            torch.stack(
                list(
                    draw(
                        diffcore,
                        trained,
                        "--labels=3",
                        "--per-label=4",
                        "--sampler=DDPM",
                        n,
                        *options,
                    ).values()
                )
            )
            for n in ("--steps=10", "--steps=20")
        )
        return (few - many).norm()

    assert change("--path=true") < 0.7 * change()


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_another_batch_size_changes_samples_by_rounding_only(diffcore, trained, rows):
    options = ("--labels=3,5", "--per-label=3", "--seeds=0-5")
    all_samples = draw(diffcore, trained, *options)
    for key, value in draw(diffcore, trained, *options, f"--batch-size={rows}").items():
        torch.testing.assert_close(value, all_samples[key], rtol=0, atol=1e-4)


def test_another_seed_or_label_gives_another_sample(diffcore, trained):
    seeds = draw(
        diffcore, trained, "--labels=3", "--per-label=2", "--seeds=1,4294967297"
    )  # equal in 32 bits
    labels = draw(diffcore, trained, "--labels=3,4", "--seeds=1,1")
    assert len({value.numpy().tobytes() for value in [*seeds.values(), *labels.values()]}) == 3


def test_sampler_steps_and_guidance_default_to_those_of_the_run(diffcore, trained):
    ended = diffcore("sample", trained, "--labels=1", "--out=x.png")
    assert (
        "1 samples of 50 network evaluations each, 50 planned "
        f"({DEFAULT_SAMPLER}, {DEFAULT_GRID}, 25 steps, CFG(scale=1.5" in ended.out
    )


def test_another_guidance_rule_does_not_inherit_the_scale_of_the_run(diffcore, trained):
    ended = diffcore("sample", trained, "--labels=1", "--steps=2", "--guidance=APG", "--out=x.png")
    assert f"2 steps, {APG()})" in ended.out, ended.err


def test_a_run_that_does_not_come_first_is_refused(diffcore, trained):
    ended = diffcore("sample", "--labels=1", "--out=x.png", trained)
    assert ended.status != 0
    assert "run's folder comes first" in ended.err


def test_other_weights_of_the_run_are_drawn_by_name_and_recorded(diffcore, trained, tmp_path):
    arrays, file = {}, tmp_path / "copy.safetensors"
    file.write_bytes((trained / "ema.safetensors").read_bytes())
    names = ("averaged", "raw", "step-00000004/raw", "step-00000002", "step-00000002/raw", file)
    for name in names:
        out = tmp_path / "x.npy"
        ended = diffcore(
            "sample", trained, "--labels=3", "--steps=2", f"--weights={name}", f"--out={out}"
        )
        assert ended.status == 0, ended.err
        arrays[name] = out.read_bytes()
    assert arrays["raw"] == arrays["step-00000004/raw"]
    assert arrays["averaged"] == arrays[file]
    assert len({arrays[name] for name in names}) == 4
    out = tmp_path / "folder"
    diffcore("sample", trained, "--labels=3", "--steps=2", "--weights=raw", f"--out={out}")
    assert '"selected": "raw"' in (out / "sampling.json").read_text()


def test_weights_that_do_not_exist_are_one_line_with_those_that_do(diffcore, trained):
    ended = diffcore("sample", trained, "--weights=step-00000003")
    assert ended.status == 1
    assert "one of averaged, raw, step-00000002, step-00000004" in ended.err
    assert len(ended.err.splitlines()) == 1
    ended = diffcore("sample", trained / "pipeline", "--weights=raw")
    assert ended.status == 1
    assert "is a pipeline, which has one set of weights" in ended.err
    assert "step-00000002" in diffcore("info", trained).out.split("weights", 1)[1]


def test_exported_weights_are_recorded_and_are_those_of_the_checkpoint(diffcore, trained, tmp_path):
    out = tmp_path / "exported"
    ended = diffcore("export", trained, f"--out={out}", "--weights=step-00000002/raw")
    assert ended.status == 0, ended.err
    assert '"weights": "step-00000002/raw"' in (out / "weights.json").read_text()
    for name, folder in (("a", out), ("b", trained)):
        words = [f"--out={tmp_path / name}.npy", "--steps=2", "--labels=3"]
        words += ["--weights=step-00000002/raw"] if folder == trained else []
        ended = diffcore("sample", folder, *words)
        assert ended.status == 0, ended.err
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
