"""Averaged weights: their closed form, their precision, and their use in place of the weights."""

import pytest
import torch
from torch import nn

from diffcore.training.averages.ema import EMA, Decay


class Settable(nn.Module):
    """A weight and a counter that the test sets."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))

    def set(self, value, count=0):
        with torch.no_grad():
            self.weight.fill_(value)
            self.count.fill_(count)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_of_linearly_growing_weights_is_its_closed_form(decay):
    module, slope = Settable(), 0.25
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


def test_with_warmup_the_average_follows_its_recursion_and_forgets_the_initial_weights():
    module = Settable()
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
    module = Settable(dtype)
    module.set(1.0)
    average = EMA(module, Decay(0.9999, warmup=False))
    module.set(2.0)
    for step in range(5000):
        average.update(step)
    assert average.shadow["weight"].dtype == torch.float32
    value = average.shadow["weight"][0].item()
    assert value == pytest.approx(2 - 0.9999**5000, abs=1e-3)  # 1.39; in bfloat16 it stays at 1.0


def test_counters_are_copied_not_averaged():
    module = Settable()
    average = EMA(module, Decay(0.9))
    module.set(1.0, count=7)
    average.update(1)
    assert average.shadow["count"].item() == 7
    assert average.shadow["count"].dtype == torch.int64


def test_the_average_is_not_an_alias_of_the_weights():
    module = Settable()
    average = EMA(module, Decay(0.9))
    module.set(3.0, count=3)
    assert average.shadow["weight"].tolist() == [0, 0, 0]
    assert average.shadow["count"].item() == 0


def module_and_average(dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype)
    average = EMA(module, Decay(0.9))
    module(torch.randn(16, 4, dtype=dtype))  # changes the running mean and the batch counter
    with torch.no_grad():
        module[0].weight.add_(torch.randn(4, 4))
    return module, average


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_applied_the_weights_are_restored_bit_for_bit(dtype, fails):
    module, average = module_and_average(dtype)
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
    # The optimizer refers to these tensors.
    assert [parameter.data_ptr() for parameter in module.parameters()] == pointers


def test_changing_the_weights_inside_applied_does_not_change_the_average():
    module, average = module_and_average()
    before = average.shadow["0.weight"].clone()
    with average.applied(), torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(average.shadow["0.weight"], before)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay is .*expected within \[0, 1\)"):
        Decay(decay)
