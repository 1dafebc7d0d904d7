"""Components and settings on the command line and in files."""

from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("one_thread")


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
    settings = yaml.safe_load(ended.out)
    weight = settings["objective"]["init_args"]["weight"]
    assert weight["class_path"].endswith("MinSNR")
    assert weight["init_args"] == {"gamma": 7}
    schedule = settings["process"]["schedule"]
    assert schedule["class_path"].endswith("Shifted")
    assert schedule["init_args"]["shift"] == -1
    assert schedule["init_args"]["inner"]["init_args"]["scale"] == 0.75
    assert settings["sampler"]["init_args"]["order"] == 2
    assert (settings["lr"]["peak"], settings["lr"]["warmup"]) == (
        0.5,
        50,
    )
    assert settings["save_every"] == 7


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


def test_the_options_of_the_objective_are_components(diffcore):
    """P2 has γ = 1, its own default; jsonargparse alone would keep the 5 of the recipe's MinSNR."""
    settings = yaml.safe_load(diffcore("train", "digits", *OBJECTIVE, "--print_config").out)[
        "objective"
    ]["init_args"]
    assert settings["weight"] == {
        "class_path": "diffcore.objectives.P2",
        "init_args": {"k": 2.0, "gamma": 1.0},
    }
    assert settings["coupling"]["init_args"] == {"group": 32}
    assert settings["resampler"]["init_args"] == {
        "bins": 50,
        "history": 10,
        "floor": 0.001,
        "update_interval": 10,
    }
    assert settings["loss"]["init_args"] == {"delta": 1.0}
    assert (settings["perturbation"], settings["corrected"], settings["uncertainty"]) == (
        0.1,
        True,
        {"features": 64},
    )


def test_a_component_keeps_the_options_of_the_file_unless_its_class_changes(
    diffcore,
):
    def weight(*options):
        return yaml.safe_load(diffcore("train", "digits", *options, "--print_config").out)[
            "objective"
        ]["init_args"]["weight"]

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
            "bins and update_interval are 1 and 10",
        ),
        (
            ("--objective.corrected=true", "--process.schedule=Discrete"),
            "corrected divides by the density",
        ),
        (("--optimizer.lr=0.1",), "'lr' is not accepted"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_impossible_objectives_are_refused_in_one_line(diffcore, options, message):
    ended = diffcore("train", "digits", *options)
    assert ended.status in (1, 2)
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("options", [(), CHOSEN, OBJECTIVE], ids=["recipe", "chosen", "objective"])
def test_a_printed_config_prints_itself_again(diffcore, options):
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
def test_an_option_overrides_the_file_on_either_side_of_it(diffcore, argv):
    Path("f.yaml").write_text(diffcore("train", "digits", "--print_config").out)
    assert yaml.safe_load(diffcore("train", *argv, "--print_config").out)["steps"] == 3


def test_the_config_of_a_run_reproduces_the_run(diffcore, trained):
    ended = diffcore("train", "--config", trained / "config.yaml", "--folder=again")
    assert ended.status == 0, ended.err
    for name in ("ema.safetensors", "metrics.jsonl", "process.json"):
        assert Path("again", name).read_bytes() == (trained / name).read_bytes(), name
