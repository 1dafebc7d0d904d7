"""Specs: plain data reads back to equal components and names classes of trusted modules only."""

import json
import math
import sys

import pytest

from diffcore.core.process import Process, TimeConditioning
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import describe_component, from_spec, to_spec
from diffcore.io.trust import trust
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.losses import Huber, PseudoHuber
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.weighting import (
    EDM,
    ELBO,
    MSE,
    P2,
    DebiasedWeight,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
)
from diffcore.samplers import DDPM, DPMSolverSDE, PredictorCorrector, Restart
from diffcore.schedules import Discrete, Explicit, Shifted, ZeroTerminalSNR

NESTED = Shifted(ZeroTerminalSNR(Discrete(end=0.01)), -1.5)


@pytest.mark.parametrize(
    "value",
    [
        NESTED,
        Objective(MinSNR(3.0), "independent"),
        Objective(MSE("edm")),
        Objective(
            P2(2.0, 0.5), corrected=True, resampler=SecondMoment(50), loss=Huber(0.3), offset=0.1
        ),
        Objective(SigmoidWeight(-1.0), resampler=LearnedSchedule(rate=0.2), loss=PseudoHuber()),
        Objective(
            DebiasedWeight(),
            coupling=OptimalTransport(32),
            perturbation=0.1,
            uncertainty=Uncertainty(16),
        ),
        *(Objective(kind()) for kind in (EDM, ELBO, SoftMinSNR, TruncatedSNR)),
        TimeConditioning("sigma", -0.125, 20.0),
        TimeConditioning("t", 1.0, math.inf),
        Explicit((-math.inf, 0.0, math.inf)),
        DPMSolverSDE(3, 0.5),
        Restart(
            PredictorCorrector(DDPM(0.5), 2, 0.16, "corrector"),
            ((0.2, 0.8, 4, 2), (1.5, 4.0, 3, 1)),
        ),
        Process(schedule=NESTED),
    ],
    ids=repr,
)
def test_a_spec_of_plain_json_reads_back_to_an_equal_value(value):
    data = json.loads(json.dumps(to_spec(value), allow_nan=False))
    assert from_spec(type(value), data.get("init_args", data)) == value


def test_a_spec_names_each_component_and_all_of_its_fields():
    assert to_spec(NESTED)["class_path"] == "Shifted"
    assert to_spec(NESTED)["init_args"]["shift"] == -1.5
    assert to_spec(NESTED)["init_args"]["inner"] == {
        "class_path": "ZeroTerminalSNR",
        "init_args": {
            "inner": {
                "class_path": "Discrete",
                "init_args": {
                    "betas": "linear",
                    "steps": 1000,
                    "start": 1e-4,
                    "end": 0.01,
                    "scaling": "vp",
                },
            }
        },
    }


def test_numbers_that_json_lacks_are_spelled_as_in_yaml():
    assert to_spec([math.inf, -math.inf, 1.5]) == [".inf", "-.inf", 1.5]
    assert to_spec(math.nan) == ".nan"


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Process, {"predicton": "edm"}, "option 'predicton' .*did you mean 'prediction'"),
        (Process, {"sigmadata": 1.0}, "option 'sigmadata' .*did you mean 'sigma_data'"),
        (
            Process,
            {"time": {"variabel": "t"}},
            r"'time.variabel' .did you mean '[\w.]*time.variable'",
        ),
        (Process, {"schedule": {"class_path": "Cosin"}}, "Cosin .did you mean 'Cosine'"),
        (
            Process,
            {"schedule": {"class_path": "ZeroTerminal"}},
            "ZeroTerminal .did you mean 'ZeroTerminalSNR'",
        ),
        (
            Process,
            {"schedule": {"class_path": "Normal", "init_args": {"meen": 1.0}}},
            "'meen' .*did you mean 'mean'",
        ),
        (Objective, {"weight": {"class_path": "MinSRN"}}, "MinSRN .did you mean 'MinSNR'"),
        (Objective, {"weight": "minsnr"}, "minsnr .did you mean 'MinSNR'"),
        (Objective, {"weigth": {"class_path": "MinSNR"}}, r"'weigth.*did you mean '[\w.]*weight"),
    ],
    ids=str,
)
def test_misspelled_keys_and_names_are_refused_with_the_nearest_spelling(kind, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_spec(kind, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Process, {"classes": "many"}, "classes.*Got value: many"),
        (
            Process,
            {"schedule": {"class_path": "MinSNR"}},
            "schedule",
        ),  # a component, but no schedule
        (Process, {"schedule": 3}, "schedule.*3"),
        (
            Process,
            {"schedule": {"class_path": "Laplace", "init_args": {"scale": -1.0}}},
            "scale is -1.0, expected",
        ),
        (MinSNR, {"gamma": -1.0}, "gamma is -1.0, expected a positive finite number"),
        (Shifted, {"shift": 1.0}, "inner"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(kind, data, message):
    with pytest.raises(ValueError, match=message):
        from_spec(kind, data)


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "builtins.eval", "pathlib.Path", "intruder.Schedule"]
)
def test_a_spec_cannot_name_a_class_outside_the_trusted_modules(path, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is not allowed"):
        from_spec(Process, {"schedule": {"class_path": path, "init_args": {}}})
    assert "intruder" not in sys.modules


@pytest.fixture
def two_modules(tmp_path, monkeypatch):
    """Two modules with a schedule each; the test trusts only my_schedules."""
    for module in ("my_schedules", "other_schedules"):
        text = "from diffcore.schedules import Cosine\nclass Mine(Cosine):\n    '''A user's.'''\n"
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_schedules", None)


def test_a_module_trusted_by_name_can_be_used_and_no_other(two_modules):
    mine, other = (
        {"schedule": {"class_path": f"{name}_schedules.Mine"}} for name in ("my", "other")
    )
    with pytest.raises(ValueError, match="is not allowed"):
        from_spec(Process, mine)
    with trust("my_schedules"):
        process = from_spec(Process, mine)
        assert type(process.schedule).__module__ == "my_schedules"
        with pytest.raises(ValueError, match="is not allowed"):
            from_spec(Process, other)
    # By the bare class name, another interpreter could not find the class, even if trusted.
    assert to_spec(process)["schedule"]["class_path"] == "my_schedules.Mine"


def test_the_command_line_fails_in_one_line_with_the_nearest_option(capsys):
    parser = ComponentParser(prog="diffcore")
    parser.add_class_arguments(Objective, "objective")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--objective.levls", "independent"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("diffcore: error: ")
    assert error.count("\n") == 1
    assert "did you mean 'objective.levels'" in error


def test_a_component_is_described_without_the_arguments_that_are_defaults():
    from diffcore.guidance import APG, CFG, AutoGuidance, Rescale, Sum
    from diffcore.samplers import DDIM, AdamsMoulton, Heun, UniPC

    for component, text in (
        (DDIM(), "DDIM()"),
        (DDIM(0.5), "DDIM(0.5)"),
        (UniPC(2), "UniPC(2)"),
        (Heun(noise_scale=1.1), "Heun(noise_scale=1.1)"),
        (AdamsMoulton(3, every=10), "AdamsMoulton(3, every=10)"),
        (CFG(1.0), "CFG(1.0)"),
        (APG(3.0, momentum=0.0), "APG(3.0, momentum=0.0)"),
        (Rescale(CFG(2.0)), "Rescale(CFG(2.0))"),
        (Sum((CFG(2.0), APG(2.0))), "Sum((CFG(2.0), APG(2.0),))"),
        (AutoGuidance(2.0, "weak"), "AutoGuidance(scale=2.0, weaker=WeakerNetwork(weak))"),
    ):
        assert describe_component(component) == text
