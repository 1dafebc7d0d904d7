"""The averaged weights: the closed form, in float32 whatever the module's dtype, and swapped in without a trace."""

import pytest
import torch
from torch import nn

from diffcore.training.ema import EMA, Decay


class Ramp(nn.Module):
    """A weight that is the step, a half-precision neighbour, and a counter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("seen", torch.tensor(0))

    def set(self, value, seen=0):
        with torch.no_grad():
            self.weight.fill_(value)
            self.seen.fill_(seen)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_on_a_ramp_the_average_is_its_closed_form(decay):
    module, slope = Ramp(), 0.25
    average = EMA(module, Decay(decay, warmup=False))
    for step in range(1, 31):
        module.set(slope * step)
        average.update(step)
    # sum over k of (1-β) β^(n-k) k = n - β (1 - β^n) / (1 - β)
    expected = slope * (30 - decay * (1 - decay**30) / (1 - decay))
    torch.testing.assert_close(
        average.shadow["weight"], torch.full((3,), expected), rtol=1e-5, atol=0
    )


def test_the_decay_warms_up_to_its_limit():
    decay = Decay(0.9)
    assert [decay(step) for step in (0, 1, 8, 80, 10**6)] == [1 / 10, 2 / 11, 9 / 18, 81 / 90, 0.9]
    assert decay(79) == 80 / 89 < 0.9 == decay(81)
    assert {Decay(0.9, warmup=False)(step) for step in (0, 1, 100)} == {0.9}


def test_warm_up_forgets_the_initial_weights_and_weighs_each_step_as_stated():
    module = Ramp()
    module.set(5.0)
    average, expected = EMA(module, Decay(0.999)), 5.0
    for step in range(1, 20):
        module.set(float(step))
        average.update(step)
        beta = (1 + step) / (10 + step)
        expected = beta * expected + (1 - beta) * step
    assert average.shadow["weight"][0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_a_half_precision_module_is_float32_and_moves(dtype):
    module = Ramp(dtype)
    module.set(1.0)
    average = EMA(module, Decay(0.9999, warmup=False))
    module.set(2.0)
    for step in range(5000):
        average.update(step)
    assert average.shadow["weight"].dtype == torch.float32
    assert average.shadow["weight"][0].item() == pytest.approx(
        2 - 0.9999**5000, abs=1e-3
    )  # 1.39; in bfloat16 1.0


def test_counters_are_copied_not_averaged():
    module = Ramp()
    average = EMA(module, Decay(0.9))
    module.set(1.0, seen=7)
    average.update(1)
    assert average.shadow["seen"].item() == 7
    assert average.shadow["seen"].dtype == torch.int64


def test_the_average_is_not_an_alias_of_the_weights():
    module = Ramp()
    average = EMA(module, Decay(0.9))
    module.set(3.0, seen=3)
    assert average.shadow["weight"].tolist() == [0, 0, 0]
    assert average.shadow["seen"].item() == 0


def moved(dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype)
    average = EMA(module, Decay(0.9))
    module(torch.randn(16, 4, dtype=dtype))  # moves the running mean and counts a batch
    with torch.no_grad():
        module[0].weight.add_(torch.randn(4, 4))
    return module, average


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(dtype, fails):
    module, average = moved(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="inside"), average.applied():
            raise RuntimeError("inside")
    else:
        with average.applied():
            for name, value in module.state_dict().items():
                assert torch.equal(value, average.shadow[name].to(value.dtype)), name
            assert not torch.equal(module[0].weight, before["0.weight"])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [
        parameter.data_ptr() for parameter in module.parameters()
    ] == pointers  # the optimizer's own tensors


def test_what_happens_to_the_weights_inside_does_not_reach_the_average():
    module, average = moved()
    before = average.shadow["0.weight"].clone()
    with average.applied(), torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(average.shadow["0.weight"], before)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay is .*expected within \[0, 1\)"):
        Decay(decay)
