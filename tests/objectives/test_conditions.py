"""Named conditions in the objective: independent dropout, keyed by the position."""

import pytest
import torch
from torch import nn

from diffcore.core.conditions import ConditionRecord, batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective

PROCESS = Process(
    shape=(1,),
    classes=2,
    dropout=0.5,
    conditions={
        "a": ConditionRecord((1,), dropout=0.5),
        "b": ConditionRecord((1,), dropout=0.25, absent="null", null=(9.0,)),
        "c": ConditionRecord((1,)),
    },
)
COUNT = 4000


def draw(rows=slice(None), process=PROCESS):
    return Objective().draw(process, SampleKey(7, 0, torch.arange(COUNT)[rows], COUNT))


def test_each_condition_is_dropped_at_its_own_rate_and_independently():
    drawn = draw()
    masks = torch.stack([drawn.dropout_mask, *drawn.condition_masks.values()]).double()
    assert masks.mean(1) == pytest.approx([0.5, 0.5, 0.25, 0.0], abs=0.03)
    # One standard deviation of the correlation of 4000 independent pairs is 0.016.
    correlation = torch.corrcoef(masks[:3]).fill_diagonal_(0)
    assert correlation.abs().max() < 0.06


def test_the_dropout_of_a_sample_depends_on_its_position_alone():
    part, whole = draw(slice(100, 200)), draw()
    for name in PROCESS.conditions:
        assert torch.equal(part.condition_masks[name], whole.condition_masks[name][100:200])


def test_another_condition_changes_no_dropout_of_the_others():
    fewer = Process(shape=(1,), conditions={"b": PROCESS.conditions["b"]})
    assert torch.equal(draw(process=fewer).condition_masks["b"], draw().condition_masks["b"])


def test_the_network_is_trained_on_the_absent_values():
    class Recorder(nn.Module):
        def forward(self, x, time, **arguments):
            self.arguments = arguments
            return torch.zeros_like(x)

    network, drawn = Recorder(), draw()
    values = {name: torch.ones(COUNT, 1) for name in PROCESS.conditions}
    given = batch_condition(PROCESS, torch.ones(COUNT, dtype=torch.int64), values)
    Objective()(Denoiser(network, PROCESS), torch.zeros(COUNT, 1), given, drawn)
    found = network.arguments
    assert torch.equal(found["class_labels"], torch.where(drawn.dropout_mask, 2, 1))
    assert torch.equal(found["a"][:, 0], (~drawn.condition_masks["a"]).float())
    assert torch.equal(found["b"][:, 0], torch.where(drawn.condition_masks["b"], 9.0, 1.0))
    assert torch.equal(found["c"], torch.ones(COUNT, 1))


def test_optimal_transport_between_different_conditions_is_refused():
    with pytest.raises(ValueError, match="exchanges noise among samples of different conditions"):
        Objective(coupling=OptimalTransport(2)).check(PROCESS)
