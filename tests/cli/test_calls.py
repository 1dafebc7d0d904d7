"""Constructor calls on the command line."""

import json

import pytest

from diffcore.cli.run_defaults import spell_calls
from diffcore.io.specs import describe_component, from_spec, to_spec
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    DPMSolverPP,
    Heun,
    Restart,
    Sampler,
    UniPC,
)
from diffcore.schedules import Cosine, Explicit, Schedule
from tests.helpers.guidance_rules import LEAVES, WRAPPED
from tests.helpers.schedules import SCHEDULES


def read(text):
    return json.loads(spell_calls([text])[0])


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(),
        DDIM(0.5),
        Heun(),
        Heun(2.0, noise_scale=1.1),
        DPMSolverPP("3M"),
        UniPC(2),
        UniPC(3, "bh1"),
        AdamsMoulton(3, every=10),
        AdamsMoulton(2, "x0", "logsnr"),
        AdamsBashforth.flow(3),
        AdamsBashforth.ipndm(4),
        Restart(DDIM(0.5), ((1.0, 2.0, 3, 1),)),
    ],
    ids=describe_component,
)
def test_a_printed_sampler_is_read_back(sampler):
    class Holder:
        def __init__(self, sampler: Sampler):
            self.sampler = sampler

    for text in (describe_component(sampler), repr(sampler)):
        assert from_spec(Holder, {"sampler": read(text)}).sampler == sampler


@pytest.mark.parametrize("schedule", SCHEDULES, ids=describe_component)
def test_a_printed_schedule_is_read_back(schedule):
    class Holder:
        def __init__(self, schedule: Schedule):
            self.schedule = schedule

    for text in (describe_component(schedule), repr(schedule)):
        assert from_spec(Holder, {"schedule": read(text)}).schedule == schedule


def test_an_argument_that_has_to_be_named_is_printed_only_if_it_is_no_default():
    assert describe_component(Cosine()) == "Cosine()"
    assert describe_component(Cosine(scaling="flow", shift=1.0)) == (
        "Cosine(scaling='flow', shift=1.0)"
    )


@pytest.mark.parametrize("name", ["CFG", "APG", "Interval", "Rescale"])
def test_a_printed_rule_is_read_back(name):
    rule = (LEAVES | WRAPPED)[name]
    for text in (describe_component(rule), repr(rule)):
        spec = read(text)
        assert spec["class_path"] == name
        expected = to_spec(rule)["init_args"]
        assert {k: v for k, v in spec["init_args"].items() if not isinstance(v, dict)}.items() <= (
            expected.items()
        )


def test_lists_infinity_and_options_are_read():
    assert read("Explicit([-2, 0, inf])")["init_args"] == {"logsnrs": [-2, 0, ".inf"]}
    assert to_spec(Explicit((-2.0, 0.0, float("inf"))))["init_args"]["logsnrs"][2] == ".inf"
    word = "--sampler=DPMSolverPP('2S')"
    expected = '--sampler={"class_path": "DPMSolverPP", "init_args": {"variant": "2S"}}'
    assert spell_calls([word]) == [expected]


@pytest.mark.parametrize(
    "word",
    [
        "DDIM",
        "a cat (black)",
        "print(1)",
        "__import__('os').system('true')",
        "DDIM.__init__(1)",
        "DDIM(open('x'))",
        "AdamsBashforth.advance(1)",
        "--out=f(x).png",
        "CFG(",
        "{class_path: DDIM}",
        "--grid",
        "x" * 5000 + "()",
    ],
)
def test_other_words_are_unchanged(word):
    assert spell_calls([word]) == [word]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("CFG(1, 2, 3)", "too many positional arguments"),
        ("UniPC(q=3)", "unexpected keyword argument"),
        ("AdamsBashforth.flow(99)", "k is 99"),
    ],
)
def test_wrong_arguments_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        spell_calls([word])
