"""The command line, end to end on a tiny run: quick help, components by name, and sample i the same whatever is beside it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffcore.cli import plot
from diffcore.cli.arguments import Ints, normalized
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.sampling.generation import GRID, SAMPLER
from diffcore.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

HEAVY = ("torch", "diffusers", "numpy", "accelerate", "transformers", "jsonargparse", "matplotlib")
COMMANDS = ("train", "sample", "plot", "info")


@pytest.mark.parametrize(("option", "says"), [("--help", "COMMAND"), ("--version", "diffcore 0.")])
def test_help_and_version_import_nothing_heavy(option, says):
    argv = [sys.executable, "-X", "importtime", "-m", "diffcore", option]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert says in ended.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert "diffcore" in imported
    assert not imported & set(HEAVY)


def test_help_names_every_command(diffcore):
    assert all(f"  {name} " in diffcore("--help").out for name in COMMANDS)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "train",
            (
                "--config",
                "--network",
                "--data",
                "--process.schedule",
                "--objective.weight",
                "--lr.peak",
                "--resume",
            ),
        ),
        (
            "sample",
            (
                "RUN",
                "--labels",
                "--per_label",
                "--seeds",
                "--sampler",
                "--grid",
                "--guidance",
                "--out",
            ),
        ),
        ("plot", ("schedules", "--out")),
        ("info", ("RUN",)),
    ],
)
def test_each_commands_help_names_its_options(diffcore, command, options):
    ended = diffcore(command, "--help")
    assert ended.status == 0
    assert ended.err == ""
    assert all(option in ended.out for option in options)
    assert len(ended.out.splitlines()) < 250  # without every known class of torch's


# Components and configuration ----------------------------------------------------------------------------------------

CHOSEN = (
    "--objective.weight=MinSNR",
    "--objective.weight.gamma=7",
    "--process.schedule=Shifted",
    "--process.schedule.inner=Laplace",
    "--process.schedule.inner.scale=0.75",
    "--process.schedule.shift=-1",
    "--sampler=AlphaBlending",
    "--sampler.order=2",
    "--lr.peak=0.5",
    "--save-every=7",
)


def test_components_are_chosen_by_class_name_with_their_own_options(diffcore):
    ended = diffcore("train", "digits", *CHOSEN, "--print_config")
    assert ended.status == 0, ended.err
    made = yaml.safe_load(ended.out)
    assert made["objective"]["weight"]["class_path"].endswith("MinSNR")
    assert made["objective"]["weight"]["init_args"] == {"gamma": 7}
    schedule = made["process"]["schedule"]
    assert schedule["class_path"].endswith("Shifted")
    assert schedule["init_args"]["shift"] == -1
    assert schedule["init_args"]["inner"]["init_args"]["scale"] == 0.75
    assert made["sampler"]["init_args"]["order"] == 2
    assert (made["lr"]["peak"], made["lr"]["warmup"]) == (
        0.5,
        50,
    )  # the recipe's own where nothing is said
    assert made["save_every"] == 7


OBJECTIVE = (
    "--objective.weight=P2",
    "--objective.weight.k=2",
    "--objective.coupling=OptimalTransport",
    "--objective.coupling.group=32",
    "--objective.resampler=SecondMoment",
    "--objective.resampler.bins=50",
    "--objective.loss=PseudoHuber",
    "--objective.perturbation=0.1",
    "--objective.corrected=true",
    "--objective.uncertainty.features=64",
)


def test_the_objectives_options_are_components_of_their_own(diffcore):
    """P2 in place of the recipe's MinSNR has its own gamma of 1, not the recipe's 5, which jsonargparse would keep."""
    made = yaml.safe_load(diffcore("train", "digits", *OBJECTIVE, "--print_config").out)[
        "objective"
    ]
    assert made["weight"] == {
        "class_path": "diffcore.objectives.weighting.P2",
        "init_args": {"k": 2.0, "gamma": 1.0},
    }
    assert made["coupling"]["init_args"] == {"group": 32}
    assert made["resampler"]["init_args"] == {
        "bins": 50,
        "history": 10,
        "floor": 0.001,
        "every": 10,
    }
    assert made["loss"]["init_args"] == {"delta": 1.0}
    assert (made["perturbation"], made["corrected"], made["uncertainty"]) == (
        0.1,
        True,
        {"features": 64},
    )


def test_a_component_of_another_class_begins_with_its_own_defaults_and_the_same_keeps_the_files(
    diffcore,
):
    def weight(*options):
        return yaml.safe_load(diffcore("train", "digits", *options, "--print_config").out)[
            "objective"
        ]["weight"]

    assert weight("--objective.weight=SoftMinSNR")["init_args"] == {"gamma": 4.0}
    assert weight("--objective.weight=MinSNR")["init_args"] == {"gamma": 5.0}
    assert weight("--objective.weight=diffcore.objectives.weighting.MinSNR")["init_args"] == {
        "gamma": 5.0
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OBJECTIVE, "resampler and uncertainty both even out the losses"),
        (("--objective.uncertainty.features=0",), "error: features is 0, expected at least 1"),
        (
            ("--objective.weight=P2", "--objective.weight.kk=1"),
            "'kk' is not accepted (did you mean 'k'?)",
        ),
        (("--objective.loss=Hubr",), "did you mean 'Huber'?"),
        (
            ("--objective.loss=Huber", "--objective.loss.delta=-1"),
            "delta is -1.0, expected a positive finite error",
        ),
        (
            ("--objective.coupling=OptimalTransport", "--objective.coupling.group=48"),
            "groups of 48",
        ),
        (
            ("--objective.resampler=SecondMoment", "--objective.resampler.bins=1"),
            "bins and every are 1 and 10",
        ),
        (
            ("--objective.corrected=true", "--process.schedule=Discrete"),
            "corrected divides by the density",
        ),
        (("--optimizer.lr=0.1",), "'lr' is not accepted"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_objectives_that_cannot_be_are_refused_in_one_line(diffcore, options, message):
    ended = diffcore("train", "digits", *options)
    assert ended.status in (1, 2)
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("options", [(), CHOSEN, OBJECTIVE], ids=["recipe", "chosen", "objective"])
def test_a_printed_config_prints_itself(diffcore, options):
    first = diffcore("train", "digits", *options, "--print_config")
    Path("first.yaml").write_text(first.out)
    for argv in (("--config", "first.yaml"), ("--config=first.yaml",), ("first.yaml",)):
        again = diffcore("train", *argv, "--print_config")
        assert again.status == 0, again.err
        assert again.out == first.out


@pytest.mark.parametrize(
    "argv",
    [
        ("digits", "--steps=3"),
        ("--steps=3", "--config=f.yaml"),
        ("--steps", "3", "--config", "f.yaml"),
    ],
)
def test_an_option_overrides_the_file_wherever_it_stands(diffcore, argv):
    Path("f.yaml").write_text(diffcore("train", "digits", "--print_config").out)
    assert yaml.safe_load(diffcore("train", *argv, "--print_config").out)["steps"] == 3


def test_a_runs_config_makes_the_same_run(diffcore, trained):
    ended = diffcore("train", "--config", trained / "config.yaml", "--folder=again")
    assert ended.status == 0, ended.err
    for name in ("ema.safetensors", "metrics.jsonl", "process.json"):
        assert Path("again", name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("0-3", [0, 1, 2, 3]),
        ("3,0-1,3", [3, 0, 1, 3]),
        (" 1 , 2 ", [1, 2]),
        (5, [5]),
        ([1, "2-3"], [1, 2, 3]),
    ],
)
def test_integers_are_single_ones_and_inclusive_ranges_in_order(text, numbers):
    assert list(Ints.parse(text)) == numbers
    assert Ints.parse(str(Ints.parse(text))) == Ints.parse(text)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1.5", "0x1"])
def test_other_text_is_no_range(text):
    with pytest.raises(ValueError, match=r"is not a number or a range such as 0-9|runs backwards"):
        Ints.parse(text)


def test_dashes_and_underscores_are_the_same_in_names_and_kept_in_values():
    argv = ["--per-label", "a-b", "--batch-size=c-d", "-x-y", "--a.b-c=--d-e"]
    assert normalized(argv) == ["--per_label", "a-b", "--batch_size=c-d", "-x-y", "--a.b_c=--d-e"]


# Sampling ------------------------------------------------------------------------------------------------------------

QUICK = ("--steps=3", "--batch-size=4", "--guidance=CFG", "--guidance.scale=2")


def made(diffcore, run, *options):
    """{(label, seed): x} of a safetensors file."""
    ended = diffcore("sample", run, *QUICK, "--out=x.safetensors", *options)
    assert ended.status == 0, ended.err
    tensors = read_weights(Path("x.safetensors"))
    assert tensors["x"].shape[1:] == (1, 8, 8)
    keys = zip(tensors["label"].tolist(), tensors["seed"].tolist(), strict=True)
    return dict(zip(keys, tensors["x"], strict=True))


def test_a_labelled_grid_is_written_and_what_it_took_is_printed(diffcore, trained):
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
    x = made(diffcore, trained, "--labels=0-2", "--per-label=2", "--seeds=0-5")
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
def test_the_evaluations_printed_are_those_of_the_network(
    diffcore, trained, monkeypatch, options, evaluations
):
    rows = []
    network = Run(trained).network()
    monkeypatch.setattr(Run, "network", lambda _: network)
    network.register_forward_hook(lambda module, arguments, output: rows.append(len(arguments[0])))
    ended = diffcore(
        "sample", trained, *QUICK, "--labels=1", "--batch-size=1", "--out=x.png", *options
    )
    assert f"1 samples of {evaluations} network evaluations each" in ended.out
    assert sum(rows) == evaluations


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


KNOT = r"\s+[-\d.inf]+\s+[01]\.\d{5} "
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


def test_an_image_is_the_start_of_each_sample_at_the_level_asked_for(diffcore, trained):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("white.png")
    near, far = (
        torch.stack(
            list(
                made(
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
        (("--image=none.png", "--start=1"), "none.png is not a picture"),
        (("--image=wide.png", "--start=1"), "is 9 x 8 of mode L, expected 8 x 8"),
        (
            ("--image=white.png", "--start=1", "--grid=Explicit", "--grid.logsnrs=[0,1,2,3]"),
            "names its first knot itself",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_one_line(diffcore, trained, options, message):
    Image.new("L", (8, 8), 255).save("white.png")
    Image.new("L", (9, 8), 255).save("wide.png")
    ended = diffcore("sample", trained, *QUICK, "--labels=1", *options)
    assert ended.status != 0
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_folder_gets_one_picture_a_seed_with_its_pixels(diffcore, trained):
    options = ("--labels=3,7", "--per-label=2", "--seeds=5,0,9,2")
    ended = diffcore("sample", trained, *QUICK, *options, "--out=pictures")
    assert ended.status == 0, ended.err
    x = made(diffcore, trained, *options)
    assert {path.name for path in Path("pictures").iterdir()} == {
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
    assert {path.name for path in Path("pictures").iterdir()} == {"seed-4.png", "seed-2.png"}


@pytest.mark.parametrize("options", [(), ("--sampler=DDIM", "--sampler.eta=1")], ids=["ode", "sde"])
def test_F6_a_sample_is_bit_equal_whatever_is_beside_it_and_in_whatever_order(
    diffcore, trained, options
):
    everything = made(diffcore, trained, "--labels=3,5", "--per-label=5", "--seeds=0-9", *options)
    assert len({value.numpy().tobytes() for value in everything.values()}) == 10
    for others in (
        ("--labels=3", "--seeds=2"),
        ("--labels=5", "--per-label=3", "--seeds=9,7,5"),
        ("--labels=5,3", "--per-label=2", "--seeds=6,8,4,1"),
        ("--labels=3", "--per-label=5", "--seeds=4,3,2,1,0"),
    ):
        for key, value in made(diffcore, trained, *others, *options).items():
            assert torch.equal(value, everything[key]), key


def test_with_one_path_a_seed_gives_a_nearby_sample_at_twice_the_steps(diffcore, trained):
    def change(*options):
        few, many = (
            torch.stack(
                list(
                    made(
                        diffcore,
                        trained,
                        "--labels=3",
                        "--per-label=8",
                        "--sampler=DDPM",
                        n,
                        *options,
                    ).values()
                )
            )
            for n in ("--steps=20", "--steps=40")
        )
        return (few - many).norm()

    assert change("--path=true") < 0.7 * change()


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_F6_another_batch_size_agrees_to_rounding(diffcore, trained, rows):
    options = ("--labels=3,5", "--per-label=3", "--seeds=0-5")
    everything = made(diffcore, trained, *options)
    for key, value in made(diffcore, trained, *options, f"--batch-size={rows}").items():
        torch.testing.assert_close(value, everything[key], rtol=0, atol=1e-4)


def test_another_seed_or_label_is_another_sample(diffcore, trained):
    seeds = made(
        diffcore, trained, "--labels=3", "--per-label=2", "--seeds=1,4294967297"
    )  # equal in 32 bits
    labels = made(diffcore, trained, "--labels=3,4", "--seeds=1,1")
    assert len({value.numpy().tobytes() for value in [*seeds.values(), *labels.values()]}) == 3


def test_sampler_steps_and_guidance_are_the_runs(diffcore, trained):
    ended = diffcore("sample", trained, "--labels=1", "--out=x.png")
    assert (
        f"1 samples of 50 network evaluations each, 50 planned ({SAMPLER}, {GRID}, 25 steps, CFG(scale=1.5"
        in ended.out
    )


def test_a_run_that_does_not_come_first_is_refused_since_its_defaults_could_not_be_read(
    diffcore, trained
):
    ended = diffcore("sample", "--labels=1", "--out=x.png", trained)
    assert ended.status != 0
    assert "run's folder comes first" in ended.err


# Plot, info, scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_schedules_are_plotted(diffcore, suffix):
    ended = diffcore("plot", "schedules", "Cosine", "Flow", "Laplace", f"--out=new/plot{suffix}")
    assert ended.status == 0, ended.err
    assert ended.out == f"3 schedules -> new/plot{suffix}\n"
    assert Path(f"new/plot{suffix}").stat().st_size > 5000


def test_schedules_with_options_are_plotted_to_the_default_place(diffcore):
    laplace = json.dumps({"class_path": "Laplace", "init_args": {"scale": 0.75}})
    assert diffcore("plot", "schedules", laplace).status == 0
    assert Path("schedules.png").is_file()


def test_weights_and_effective_weights_are_plotted(diffcore):
    ended = diffcore(
        "plot", "weights", "MinSNR", "P2", "--configs=digits", "--on=epsilon", "--out=w.svg"
    )
    assert ended.status == 0, ended.err
    assert ended.out == "2 weights, 1 training configs -> w.svg\n"
    assert Path("w.svg").stat().st_size > 5000
    assert (
        diffcore("plot", "weights", "--configs=digits").out
        == "0 weights, 1 training configs -> weights.png\n"
    )


def test_A5_the_effective_weight_of_a_config_is_weight_times_density():
    """The recipe's: min(SNR, 5)/(SNR+1) on v, times sech(λ/2) / 2π; the weight alone where the objective is corrected."""
    logsnr = torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    snr, training = logsnr.exp(), plot._training("digits")
    weight = snr.clamp(max=5) / (snr + 1)
    expected = weight / (2 * math.pi * (logsnr / 2).cosh())
    torch.testing.assert_close(
        plot.effective(training, "v_prediction", logsnr), expected, rtol=1e-12, atol=0
    )
    corrected = training._replace(objective=replace(training.objective, corrected=True))
    torch.testing.assert_close(
        plot.effective(corrected, "v_prediction", logsnr), weight, rtol=1e-12, atol=0
    )


def test_info_describes_a_run(diffcore, trained):
    ended = diffcore("info", trained)
    assert ended.status == 0, ended.err
    parameters = sum(parameter.numel() for parameter in Run(trained).network().parameters())
    for fact in (
        f"{parameters:,}",
        "UNet2DModel",
        "Cosine",
        "v_prediction",
        "step-00000004",
        "10",
        "step 4",
    ):
        assert fact in ended.out, fact


def test_info_describes_this_machine(diffcore):
    ended = diffcore("info")
    assert ended.status == 0
    assert torch.__version__.split("+")[0] in ended.out


def test_the_scripts_call_the_same_commands(monkeypatch):
    called = []
    monkeypatch.setattr("diffcore.cli.main.main", lambda argv: called.append(argv) or 0)
    for name in ("train", "sample"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "a", "--b"])
        code = (Path(__file__).parents[2] / "scripts" / f"{name}.py").read_text()
        with pytest.raises(SystemExit, match="0"):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert called == [["train", "a", "--b"], ["sample", "a", "--b"]]


def test_every_field_of_the_trainer_is_documented_and_so_has_help(diffcore):
    out = " ".join(diffcore("train", "--help").out.split())
    for name in Trainer.__dataclass_fields__.keys() - {"config"}:
        assert f"--{name}" in out, name
