"""Named conditions: their record, their absent values, and what a network receives."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.condition_values import check_value, resolve
from diffcore.core.conditions import (
    ConditionRecord,
    Conditions,
    as_conditions,
    batch_condition,
    concatenate,
    condition_arguments,
    drop,
    null_condition,
    without,
)
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process

VECTOR = ConditionRecord((2,), low=-1.0, high=1.0, dropout=0.25, absent="learned")
IMAGE = ConditionRecord((1, 2, 2), dropout=0.5, absent="null", null=(1.0, 2.0, 3.0, 4.0))
NUMBER = ConditionRecord((1,))
PROCESS = Process(
    shape=(1, 2, 2),
    classes=3,
    dropout=0.1,
    conditions={"vector": VECTOR, "image": IMAGE, "number": NUMBER},
)
VALUES = {
    "vector": torch.tensor([[0.5, -0.5], [0.25, 1.0]]),
    "image": torch.arange(8.0).view(2, 1, 2, 2),
    "number": torch.tensor([[3.0], [4.0]]),
}
LABELS = torch.tensor([2, 0])


class Recorder(nn.Module):
    def forward(self, x, time, **arguments):
        self.arguments = arguments
        return torch.zeros_like(x)


def given() -> Conditions:
    condition = batch_condition(PROCESS, LABELS, VALUES)
    assert isinstance(condition, Conditions)
    return condition


def test_a_process_keeps_its_conditions_on_disk(tmp_path):
    PROCESS.save(tmp_path / "process.json")
    loaded = Process.load(tmp_path / "process.json")
    assert loaded == PROCESS
    assert loaded.conditions["image"].null == (1.0, 2.0, 3.0, 4.0)


def test_the_record_of_a_process_without_conditions_is_that_of_earlier_versions(tmp_path):
    path = tmp_path / "process.json"
    Process().save(path)
    assert "conditions" not in json.loads(path.read_text())
    assert Process.load(path) == Process()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": ()}, "the shape of a condition is"),
        ({"shape": (2, 0)}, "the shape of a condition is"),
        ({"low": 1.0, "high": 1.0}, "expected low < high"),
        ({"dropout": 1.5}, "the dropout of a condition is 1.5"),
        ({"absent": "nothing"}, "expected zeros, null or learned"),
        ({"null": (1.0,)}, "null has 1 numbers, but absent is zeros"),
        ({"absent": "null"}, "null has 0 numbers, expected 1, or 2"),
        ({"absent": "null", "null": (1.0, 2.0, 3.0)}, "null has 3 numbers"),
        ({"absent": "null", "null": (math.nan,)}, "not finite"),
    ],
)
def test_a_record_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ConditionRecord(**{"shape": (2,)} | fields)


@pytest.mark.parametrize("name", ["label", "x", "time", "two words", ""])
def test_a_condition_is_named_like_an_argument_of_the_network(name):
    with pytest.raises(ValueError, match="a condition is named"):
        Process(conditions={name: NUMBER})


def test_a_condition_is_not_named_like_the_flags_of_another():
    with pytest.raises(ValueError, match="'number_absent', which are the flags of the condition"):
        Process(conditions={"number": NUMBER, "number_absent": NUMBER})


def test_classes_and_a_condition_class_labels_are_one_argument():
    with pytest.raises(ValueError, match="which are one argument of the network"):
        Process(classes=2, conditions={"class_labels": NUMBER})


def test_a_condition_larger_than_memory_is_refused():
    with pytest.raises(ValueError, match=r"one condition image .* needs"):
        Process(conditions={"image": ConditionRecord((10**6, 10**6, 10**3))})


def test_a_network_receives_each_condition_under_its_name():
    network = Recorder()
    Denoiser(network, PROCESS).output(torch.ones(2, 1, 2, 2), PROCESS.schedule.level(0.5), given())
    assert set(network.arguments) == {"class_labels", *VALUES, "vector_absent"}
    for name, value in VALUES.items():
        assert torch.equal(network.arguments[name], value)
    assert network.arguments["class_labels"] is not None
    assert network.arguments["vector_absent"].tolist() == [False, False]


def test_without_a_condition_a_network_receives_each_absent_value():
    network = Recorder()
    Denoiser(network, PROCESS).output(torch.ones(2, 1, 2, 2), PROCESS.schedule.level(0.5))
    assert network.arguments["class_labels"].tolist() == [3, 3]
    assert network.arguments["vector"].tolist() == [[0, 0], [0, 0]]
    assert network.arguments["vector_absent"].tolist() == [True, True]
    assert network.arguments["image"].flatten(1).tolist() == [[1, 2, 3, 4]] * 2
    assert network.arguments["number"].tolist() == [[0], [0]]


def test_conditions_are_dropped_one_by_one():
    masks = {"label": torch.tensor([True, False]), "image": torch.tensor([False, True])}
    dropped = drop(PROCESS, given(), masks)
    assert isinstance(dropped, Conditions)
    assert dropped.label is not None
    assert dropped.label.tolist() == [3, 0]
    assert dropped.values["image"].flatten(1).tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert dropped.absent["image"].tolist() == [False, True]
    assert torch.equal(dropped.values["vector"], VALUES["vector"])


def test_a_dropped_condition_stays_absent():
    once = without(PROCESS, given(), ("vector",))
    again = drop(PROCESS, once, {"vector": torch.tensor([False, False])})
    assert again.absent["vector"].tolist() == [True, True]


def test_labels_alone_keep_their_form():
    process = replace(PROCESS, conditions={})
    assert torch.equal(null_condition(process, 2), torch.tensor([3, 3]))
    assert torch.equal(without(process, LABELS, ("label",)), torch.tensor([3, 3]))
    assert torch.equal(batch_condition(process, LABELS, VALUES), LABELS)
    assert torch.equal(as_conditions(process, LABELS, 2), LABELS)
    assert condition_arguments(process, LABELS, torch.float32) == {"class_labels": LABELS}
    assert null_condition(replace(process, classes=0, dropout=0.0), 2) is None


def test_labels_of_a_process_with_conditions_leave_these_absent():
    condition = as_conditions(PROCESS, LABELS, 2)
    assert torch.equal(condition.label, LABELS)
    assert condition.absent["image"].tolist() == [True, True]


def test_conditions_without_a_label_have_the_null_label():
    """Beside conditions with labels, a batch of one would else have one label for two samples."""
    condition = as_conditions(PROCESS, replace(given(), label=None), 2)
    assert condition.label.tolist() == [3, 3]
    assert torch.equal(condition.values["vector"], VALUES["vector"])
    assert torch.equal(as_conditions(PROCESS, given(), 2).label, LABELS)


def test_rows_and_batches_of_conditions():
    both = concatenate([given(), without(PROCESS, given(), ("image", "label"))])
    assert len(both) == 4
    assert both.label.tolist() == [2, 0, 3, 3]
    rows = both[torch.tensor([3, 0])]
    assert rows.label.tolist() == [3, 2]
    assert rows.values["image"].flatten(1).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert rows.absent["image"].tolist() == [True, False]


def test_named_values_are_resolved_for_each_sample():
    values = {"number": [7.0], "vector": VALUES["vector"]}
    found = resolve(PROCESS, 2, values, LABELS)
    assert found.values["number"].tolist() == [[7.0], [7.0]]
    assert torch.equal(found.values["vector"], VALUES["vector"])
    assert found.absent["image"].tolist() == [True, True]
    assert found.values["image"].flatten(1).tolist() == [[1, 2, 3, 4]] * 2
    assert torch.equal(found.label, LABELS)
    assert resolve(PROCESS, 2, values, None).label.tolist() == [3, 3]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vector": [0.0, 0.0]}, "condition number is missing, without which the network"),
        ({"number": [1.0], "colour": [1.0]}, "there is no condition 'colour', expected vector"),
        ({"number": [1.0, 2.0]}, r"condition number of shape \(2,\), expected .* shape \(1,\)"),
        ({"number": torch.zeros(0, 1)}, r"condition number of shape \(0, 1\), expected"),
        ({"number": "dark"}, "condition number of shape str"),
        ({"number": [[1.0]] * 3}, "condition number has 3 values, expected one for each of 2"),
        ({"number": [math.inf]}, "not finite"),
        ({"number": [1.0], "vector": [0.0, 1.5]}, r"vector in \[0, 1.5\], expected within"),
    ],
)
def test_named_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        resolve(PROCESS, 2, values, None)


def test_several_values_are_refused_where_one_is_expected():
    with pytest.raises(ValueError, match=r"item 3 has the condition vector of shape \(1, 2\)"):
        check_value("vector", VECTOR, torch.zeros(1, 2), "item 3")


def test_values_become_floats_of_32_bits():
    assert check_value("number", NUMBER, torch.tensor([3]), "the request").dtype == torch.float32
    half = torch.tensor([3.0], dtype=torch.float16)
    assert check_value("number", NUMBER, half, "the request").dtype == torch.float32
