"""The process record: the time conditioning, the processes that are refused, and the JSON file."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import get_args

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process, TimeConditioning, TimeVariable
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import (
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Karras,
    Laplace,
    Leading,
    Linspace,
    Normal,
    Shifted,
    UniformLogSNR,
    ZeroTerminalSNR,
)
from tests.helpers.damaged_folders import edit_json
from tests.helpers.oracles import PREDICTION_TYPES

inf = math.inf
ZERO = ZeroTerminalSNR(Discrete())
EDM = TimeConditioning("logsnr", -1 / 8)


@pytest.mark.parametrize(
    ("time", "level", "number"),
    [
        (TimeConditioning(), Discrete().level(1.0), 999),
        (TimeConditioning(), Discrete().level(1 / 1000), 0),
        (TimeConditioning(scale=50.0), Discrete(steps=50).level(7 / 50), 6),
        (TimeConditioning("t", 1.0), Flow().level(0.3), 0.3),
        (TimeConditioning("t"), Flow().level(0.3), 300),
        (TimeConditioning("blend"), Shifted(Flow(), -2 * math.log(3)).at_blend(0.3), 300),
        (TimeConditioning("blend", 1.0), Cosine().at(-2 * math.log(3)), 0.75),
        (TimeConditioning("blend"), Cosine().level(1.0), 1000),
        (TimeConditioning("blend"), Cosine().level(0.0), 0),
        (
            EDM,
            Normal(scaling="ve").at(-2 * math.log(80)),
            math.log(80) / 4,
        ),  # EDM's c_noise = ln(σ)/4
        (TimeConditioning("sigma", 2.0), Cosine().at(-2 * math.log(5)), 10),
        (TimeConditioning("logsnr", 1.0, clamp=20.0), Cosine().level(1.0), -20),
        (TimeConditioning("logsnr", 1.0, clamp=20.0), Cosine().level(0.0), 20),
        (TimeConditioning("logsnr", 1.0, clamp=20.0), Cosine().at(19.0), 19),
        (TimeConditioning("sigma", 1.0, clamp=2.0), Cosine().level(1.0), math.e),
        (TimeConditioning("sigma", 1.0), Cosine().level(0.0), 0),
    ],
    ids=str,
)
def test_the_conditioning_number_is_the_level_in_the_chosen_variable(time, level, number):
    assert time(level) == pytest.approx(number, rel=1e-12, abs=1e-12)
    batch = level.schedule.at(torch.tensor([0.0, level.logsnr], dtype=torch.float64))
    assert time(batch)[1].item() == pytest.approx(number, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("variable", get_args(TimeVariable))
@pytest.mark.parametrize(
    "schedule", (Discrete(), ZERO, Shifted(Flow(), -2 * math.log(3)), Cosine()), ids=str
)
def test_the_level_follows_from_the_conditioning_number(variable, schedule):
    time = TimeConditioning(variable, {"index": 1000.0, "logsnr": -1 / 8}.get(variable, 7.0))
    for logsnr in (-4.0, 0.3, 5.0):
        assert time.level(schedule, time(schedule.at(logsnr))).logsnr == pytest.approx(
            logsnr, abs=1e-9
        )
    batch = schedule.at(torch.tensor([-4.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(
        time.level(schedule, time(batch)).logsnr, batch.logsnr, rtol=0, atol=1e-9
    )


def test_the_infinite_levels_follow_from_their_conditioning_numbers():
    for time in (TimeConditioning("blend"), TimeConditioning("t", 1.0)):
        assert [time.level(Cosine(), time.scale * a).logsnr for a in (0, 1)] == [inf, -inf]
    assert TimeConditioning().level(ZERO, 999).logsnr == -inf


def test_the_levels_of_a_table_have_their_indices_as_conditioning_numbers():
    level = Discrete().level(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(
        TimeConditioning()(level), torch.arange(1000.0).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("time", "reaches"),
    [
        (TimeConditioning("index"), True),
        (TimeConditioning("t"), True),
        (TimeConditioning("blend"), True),
        (EDM, False),
        (TimeConditioning("sigma"), False),
        (TimeConditioning("logsnr", clamp=30.0), True),
        (TimeConditioning("sigma", clamp=30.0), True),
    ],
    ids=repr,
)
def test_pure_noise_has_a_finite_number_for_index_t_blend_or_with_a_clamp(time, reaches):
    assert time.can_express_pure_noise == reaches
    assert math.isfinite(time(Cosine().level(1.0))) == reaches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"variable": "lambda"},
            "variable is 'lambda', expected one of index, t, blend, logsnr, sigma",
        ),
        ({"scale": 0.0}, "scale is 0.0, expected a finite factor other than 0"),
        ({"scale": inf}, "scale is inf"),
        ({"clamp": 0.0}, "clamp is 0.0, expected a positive bound"),
        ({"clamp": math.nan}, "clamp is nan"),
    ],
    ids=str,
)
def test_time_conditioning_with_a_field_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeConditioning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prediction": "eps"},
            "prediction is 'eps', expected one of epsilon, sample, v_prediction",
        ),
        (
            {"shape": ()},
            r"shape is \(\), expected the positive sizes of one x_0, such as \(1, 8, 8\)",
        ),
        ({"shape": (3, 0, 8)}, r"shape is \(3, 0, 8\)"),
        ({"low": 1.0}, "low and high are 1.0 and 1.0, expected low < high"),
        ({"high": math.nan}, "low and high are -1.0 and nan"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0, expected a positive standard deviation"),
        ({"sigma_data": inf}, "sigma_data is inf"),
        ({"classes": -1}, "classes is -1, expected 0 for none or the number of labels"),
        ({"classes": 2, "dropout": 1.5}, r"dropout is 1.5, expected a probability within \[0, 1\]"),
        ({"classes": 2, "dropout": math.nan}, "dropout is nan"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_with_the_expected_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Process(**arguments)


FINITE = "or train on Truncated levels, or start from a grid whose first level is finite"
# (fields, message): the processes that are undefined at α = 0.
PURE_NOISE = [
    (
        {"prediction": "epsilon"},
        "predicts epsilon does not determine x_0: use v_prediction, sample, flow_prediction or edm",
    ),
    (
        {"time": EDM},
        "time conditioning by logsnr cannot express: condition on index, t or blend, set a clamp",
    ),
    (
        {"time": TimeConditioning("sigma", 1.0)},
        "time conditioning by sigma cannot express: condition on index, t or blend",
    ),
]


@pytest.mark.parametrize(("fields", "message"), PURE_NOISE, ids=str)
def test_a_start_at_pure_noise_where_the_network_is_undefined_is_refused(fields, message):
    process = Process(schedule=Cosine(), **fields)  # trains on finite levels
    process.check_level(Cosine().at(-160.0))
    with pytest.raises(ValueError, match=f"the first knot is pure noise .*{message}.*{FINITE}"):
        process.check_level(Cosine().level(1.0))


@pytest.mark.parametrize(("fields", "message"), PURE_NOISE, ids=str)
def test_a_table_with_pure_noise_where_the_network_is_undefined_is_refused(fields, message):
    Process(schedule=Discrete(), **fields)
    with pytest.raises(ValueError, match=f"the table's last level is pure noise .*{message}"):
        Process(schedule=ZERO, **fields)


def test_pure_noise_in_the_ve_scaling_is_refused():
    message = "pure noise .*the ve scaling has σ = inf: use the scaling vp or flow"
    process = Process(schedule=Cosine(scaling="ve"))
    process.check_level(process.schedule.at(-100.0))
    with pytest.raises(ValueError, match=f"the first knot is {message}.*{FINITE}"):
        process.check_level(process.schedule.level(1.0))
    with pytest.raises(ValueError, match=f"the table's last level is {message}"):
        Process(schedule=ZeroTerminalSNR(Discrete(scaling="ve")))


@pytest.mark.parametrize("prediction", [name for name in PREDICTION_TYPES if name != "epsilon"])
@pytest.mark.parametrize("time", [TimeConditioning("t"), replace(EDM, clamp=30.0)], ids=repr)
@pytest.mark.parametrize("scaling", ["vp", "flow"])
def test_pure_noise_is_accepted_if_output_time_and_sigma_are_finite(prediction, time, scaling):
    process = Process(
        schedule=ZeroTerminalSNR(Discrete(scaling=scaling)), prediction=prediction, time=time
    )
    process.check_level(process.schedule.level(1.0))
    assert process.schedule.logsnr(1.0) == -inf


PROCESSES = [
    Process(),
    Process(
        schedule=Discrete("scaled_linear", 1000, 0.00085, 0.012),
        prediction="epsilon",
        shape=(4, 64, 64),
    ),
    Process(
        schedule=Shifted(ZeroTerminalSNR(Discrete("cosine", 50, scaling="flow")), -2 * math.log(3))
    ),
    Process(
        schedule=Shifted(Shifted(Laplace(0.1, 1 / 3), 1e-3), -7.0), time=TimeConditioning("t", 1.0)
    ),
    Process(schedule=Normal(2.4, 2.4, scaling="ve"), prediction="edm", time=EDM, sigma_data=0.3),
    Process(
        time=TimeConditioning("sigma", 0.1, 20.0), classes=10, dropout=0.15, low=0.0, high=255.0
    ),
    Process(schedule=Flow(), prediction="flow_prediction", shape=(7,)),
    Process(variance="learned"),
]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_saved_process_is_loaded_bit_for_bit(process, tmp_path):
    path = tmp_path / "process.json"
    process.save(path)
    assert Process.load(path) == process
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_every_field_is_in_the_record(tmp_path):
    PROCESSES[4].save(tmp_path / "process.json")
    record = json.loads((tmp_path / "process.json").read_text())
    assert len(record.pop("sha256")) == 64
    assert record == {
        "schedule": {
            "class_path": "Normal",
            "init_args": {"scaling": "ve", "mean": 2.4, "std": 2.4},
        },
        "prediction": "edm",
        "time": {"variable": "logsnr", "scale": -0.125, "clamp": ".inf"},
        "shape": [1, 8, 8],
        "low": -1.0,
        "high": 1.0,
        "sigma_data": 0.3,
        "classes": 0,
        "dropout": 0.0,
    }


def test_a_record_that_was_changed_is_refused_unless_its_hash_is_deleted(tmp_path):
    path = tmp_path / "process.json"
    PROCESSES[4].save(path)
    edit_json(path, sigma_data=0.4)
    with pytest.raises(ValueError, match=r"it is not what was written .* delete the entry sha256"):
        Process.load(path)
    edit_json(path, sha256=None)
    assert Process.load(path) == replace(PROCESSES[4], sigma_data=0.4)


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"process.json is missing: weights cannot be sampled without"
    ):
        Process.load(tmp_path / "process.json")


GOOD = {"schedule": {"class_path": "Cosine"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schedule": ', "Expecting value"),
        ("", "Expecting value"),
        ("\xff", "codec can't decode"),
        (
            json.dumps(GOOD | {"predicton": "edm"}),
            "does not accept option 'predicton' .did you mean 'prediction'",
        ),
        (json.dumps(GOOD | {"prediction": "eps"}), "prediction.*Got value: eps"),
        (json.dumps(GOOD | {"classes": 1.5}), "classes.*Got value: 1.5"),
        (json.dumps(GOOD | {"classes": -1}), "classes is -1, expected 0 for none"),
        (
            json.dumps({"schedule": {"class_path": "os.system", "init_args": {}}}),
            "'os.system' is not allowed",
        ),
        (json.dumps({"schedule": {"class_path": "Cosin"}}), "Cosin .did you mean 'Cosine'"),
        ("[1]", ""),
        ("3", ""),
        ("null", ""),
    ],
)
def test_the_error_of_a_corrupt_record_names_the_file(text, reason, tmp_path):
    path = tmp_path / "process.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"process.json is not a process record: .*{reason}"):
        Process.load(path)


# Defaults for missing fields would describe another process: `{}` would be a cosine v network.
@pytest.mark.parametrize("field", ["schedule", "prediction"])
def test_a_record_that_lacks_a_field_is_refused(field, tmp_path):
    path = tmp_path / "process.json"
    PROCESSES[4].save(path)
    record = json.loads(path.read_text())
    del record[field]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=field):
        Process.load(path)


def test_a_process_is_a_frozen_value_with_a_tuple_for_a_shape():
    process = Process(shape=[3, 8, 8])
    assert process == Process(shape=(3, 8, 8))
    assert hash(process) == hash(Process(shape=(3, 8, 8)))
    with pytest.raises(FrozenInstanceError):
        process.prediction = "epsilon"


@pytest.mark.parametrize(
    ("schedule", "fields", "logsnr"),
    [
        (Cauchy(), {"prediction": "sample"}, 318.3),
        (Cauchy(), {"prediction": "epsilon"}, -200.0),
        (Cauchy(scaling="ve"), {"prediction": "edm", "time": EDM}, -200.0),
        (Cauchy(), {"time": TimeConditioning("sigma", 1.0)}, -200.0),
    ],
    ids=str,
)
def test_a_finite_level_at_which_float32_overflows_is_refused(schedule, fields, logsnr):
    record = Process(schedule, **fields)
    with pytest.raises(ValueError, match=f"knot 3 is at λ = {logsnr:g}, where float32 overflows"):
        record.check_level(schedule.at(logsnr), "knot 3")
    record.check_level(schedule.at(math.copysign(170.0, logsnr)))
    Process(
        schedule, "v_prediction" if schedule.scaling == "vp" else "flow_prediction"
    ).check_level(schedule.at(abs(logsnr)))


def test_a_grid_to_levels_at_which_float32_overflows_is_refused_and_the_remedy_samples():
    record = Process(Cauchy(), "sample", shape=(2,))
    denoiser = Denoiser(Half(), record)
    for grid in (Linspace(), Leading()):
        with pytest.raises(ValueError, match="such as Karras or UniformLogSNR"):
            sample(denoiser, DDIM(), grid, 10, seeds=[0])
    for grid in (Karras(), UniformLogSNR()):
        assert sample(denoiser, DDIM(), grid, 10, seeds=[0]).x.isfinite().all()


class Half(nn.Module):
    """A network that returns half of its input."""

    def forward(self, x, time):
        return x / 2
