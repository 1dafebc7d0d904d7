"""The scale of guidance as an input of a few-step network: its draws, its teacher, its network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.condition_values import resolve
from diffcore.core.conditions import ConditionRecord, Conditions, batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import TimeConditioning
from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    KnotIntervals,
    MeanFlow,
    OracleTeacher,
    Shortcut,
)
from diffcore.guidance import CFG
from diffcore.networks import GuidanceEmbedding, Perceptron, TwoTimes
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.weighting import MSE
from diffcore.schedules import Flow, Trailing
from diffcore.training.data.checks import read_item
from tests.helpers.oracles import mixture, process
from tests.networks.test_networks import randomised

RANGE = (1.5, 4.0)
RECORD = ConditionRecord((1,), *RANGE, absent="null", null=(2.0,))
COUNT = 6
SHORT = KnotIntervals(Trailing(), first=4, last=4, weighting=MSE("sample"))
OBJECTIVES = {
    "consistency, order 2": (Consistency(intervals=SHORT), "consistency"),
    "consistency, order 1": (Consistency(intervals=SHORT, order=1), "consistency"),
    "continuous": (ContinuousConsistency(), "consistency"),
    "mean flow": (MeanFlow(), "mean_velocity"),
    "shortcut": (Shortcut(), "mean_velocity"),
}


def record(estimate, **fields):
    return process(
        Flow(),
        prediction="flow_prediction",
        time=TimeConditioning("blend", 10.0),
        estimate=estimate,
        conditions={"guidance_scale": RECORD},
        **fields,
    )


def student(process):
    torch.manual_seed(3)

    def network():
        inner = Perceptron([2], 16, 2, 2)
        return inner if process.estimate == "consistency" else TwoTimes(lambda: inner, scale=10.0)

    return Denoiser(randomised(GuidanceEmbedding(network, scale=10.0)).double(), process)


def drawn(objective, process, index, batch=COUNT):
    draw = objective.draw(process, SampleKey(7, 3, index, batch))
    return draw._replace(noise=draw.noise.double())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_sample_is_distilled_from_the_teacher_guided_with_its_own_scale(name):
    objective, estimate = OBJECTIVES[name]
    own, oracle = record(estimate), mixture()
    scaled = replace(objective, teacher=OracleTeacher(oracle), guidance_range=RANGE)
    scaled.check(own)
    index, denoiser = torch.arange(COUNT), student(own)
    x0, labels = oracle.sample(index), index % 2
    draw = drawn(scaled, own, index)
    condition = batch_condition(own, labels, draw.conditions)
    networks = scaled.networks(denoiser, torch.device("cpu"), lambda network: network)
    networks = replace(networks, averaged=denoiser)
    losses = scaled(denoiser, x0, condition, draw, networks=networks)
    for row in range(COUNT):
        w = float(draw.conditions["guidance_scale"][row])
        alone = replace(objective, teacher=OracleTeacher(oracle, CFG(w)))
        one = drawn(scaled, own, index[row : row + 1])
        rows = torch.tensor([row])

        def with_labels(x, level, given, teacher=alone.teacher.denoiser()):
            return teacher(x, level, given.label)

        guided = Networks(with_labels, averaged=denoiser)
        expected = alone(denoiser, x0[rows], condition[rows], one, networks=guided)
        torch.testing.assert_close(losses[row : row + 1], expected, rtol=1e-5, atol=1e-8)


def test_scales_are_uniform_and_a_function_of_the_position_of_the_sample():
    objective = Consistency(teacher=OracleTeacher(mixture()), guidance_range=RANGE)
    own, index = record("consistency"), torch.arange(4000)
    scales = drawn(objective, own, index, 4000).conditions["guidance_scale"]
    assert scales.shape == (4000, 1)
    assert scales.dtype == torch.float32
    assert RANGE[0] <= scales.min() < RANGE[0] + 0.01
    assert RANGE[1] - 0.01 < scales.max() <= RANGE[1]
    shares = torch.histc(scales, 5, *RANGE) / 4000
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.025, rtol=0)
    part = drawn(objective, own, index[17:20], 4000).conditions["guidance_scale"]
    assert torch.equal(part, scales[17:20])
    assert drawn(Consistency(), own, index[:3]).conditions == {}


@pytest.mark.parametrize("estimate", ["consistency", "mean_velocity"])
def test_a_network_with_the_scale_starts_as_the_one_without_and_learns_from_both_inputs(estimate):
    torch.manual_seed(0)
    inner = randomised(Perceptron([2], 8, 1))
    plain = copy.deepcopy(inner)
    is_nested = estimate == "mean_velocity"
    network = GuidanceEmbedding(lambda: TwoTimes(lambda: inner) if is_nested else inner)
    x, time = torch.randn(3, 2), torch.tensor([0.0, 100.0, 900.0])
    ends = {"end_time": 0.3 * time} if is_nested else {}
    scale = torch.tensor([[1.0], [2.0], [7.5]])
    assert torch.equal(network(x, time, guidance_scale=scale, **ends), plain(x, time))
    embeddings = [network.guidance, *([network.network.interval] if is_nested else [])]
    for embedding in embeddings:
        nn.init.normal_(embedding[-1].weight)
    changed = network(x, time, guidance_scale=scale, **ends)
    assert (
        ((network(x, time, guidance_scale=scale + 0.5, **ends) - changed).abs() > 1e-4).any(1).all()
    )
    if is_nested:
        other = network(x, time, guidance_scale=scale, end_time=0.9 * time)
        assert torch.equal(other[0], changed[0])  # t = r = 0 in both
        assert ((other - changed).abs() > 1e-4).any(1)[1:].all()
    assert torch.equal(copy.deepcopy(network)(x, time, guidance_scale=scale, **ends), changed)
    with pytest.raises(ValueError, match=r"scale is 0"):
        GuidanceEmbedding(lambda: inner, scale=0.0)


def test_the_default_of_a_condition_is_its_value_where_none_is_given():
    own = record("consistency")
    given = resolve(own, 3, {}, torch.tensor([0, 1, 1]))
    assert given.values["guidance_scale"].tolist() == [[2.0]] * 3
    item = read_item(lambda: (torch.zeros(2), 1), 0, own)
    assert torch.equal(item.extras["guidance_scale"], torch.tensor([2.0]))
    item = read_item(lambda: (torch.zeros(2), 1, {"guidance_scale": torch.tensor([3.0])}), 0, own)
    assert torch.equal(item.extras["guidance_scale"], torch.tensor([3.0]))
    denoiser = student(own)
    x, level = torch.randn(3, 2, dtype=torch.float64), own.schedule.level(0.6)
    assert torch.equal(denoiser(x, level).x0, denoiser(x, level, resolve(own, 3, {}, None)).x0)
    dropped = replace(own, conditions={"guidance_scale": replace(RECORD, absent="zeros", null=())})
    with pytest.raises(ValueError, match=r"condition guidance_scale is missing"):
        resolve(dropped, 3, {}, None)
    with pytest.raises(ValueError, match=r"item 0 of the data has no condition guidance_scale"):
        read_item(lambda: (torch.zeros(2), 1), 0, dropped)


TEACHER = OracleTeacher(mixture())
REFUSED = {
    "order": ({"guidance_range": (4.0, 1.0)}, {}, r"0 <= low < high"),
    "infinite": ({"guidance_range": (1.0, float("inf"))}, {}, r"0 <= low < high"),
    "no teacher": ({"teacher": None}, {}, r"guidance of the teacher is None"),
    "guided": ({"teacher": OracleTeacher(mixture(), CFG(2.0))}, {}, r"CFG\(scale=2.0"),
    "no condition": ({}, {"conditions": {}}, r"has no condition guidance_scale of shape"),
    "too narrow": ({"guidance_range": (1.0, 4.0)}, {}, r"whose range contains guidance_range"),
    "never dropped": (
        {"teacher": OracleTeacher(mixture(process(dropout=0.0)))},
        {},
        r"CFG\(scale=4.0.* trained without condition dropout",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_scale_that_the_teacher_or_the_process_cannot_have_is_refused(case):
    options, fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Consistency(**{"teacher": TEACHER, "guidance_range": RANGE} | options).check(
            replace(record("consistency"), **fields)
        )


def test_the_teacher_needs_the_scale_of_each_sample():
    objective = Consistency(teacher=TEACHER, guidance_range=RANGE)
    own = record("consistency")
    teacher = objective.networks(student(own), torch.device("cpu"), lambda n: n).teacher
    x, level = torch.zeros(2, 2), own.schedule.level(0.5)
    with pytest.raises(ValueError, match=r"the condition guidance_scale is missing"):
        teacher(x, level, torch.tensor([0, 1]))
    given = Conditions({"guidance_scale": torch.ones(2, 1)}, {}, torch.tensor([0, 1]))
    plain = TEACHER.denoiser()(x, level, torch.tensor([0, 1]))
    torch.testing.assert_close(teacher(x, level, given).x0, plain.x0)
