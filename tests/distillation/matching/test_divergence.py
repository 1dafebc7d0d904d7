"""The weight h(r) of each f-divergence, from its generator f and from the table of its source."""

import math
from typing import get_args

import pytest
import torch

from diffcore.distillation.matching.divergence import (
    Divergence,
    DivergenceName,
    MeanDivergenceWeight,
)

NAMES = get_args(DivergenceName)
RATIOS = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
TABLE = {
    "rkl": lambda r: torch.ones_like(r),
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened-rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
}
GENERATORS = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened-rkl": lambda r: (r + 1) * (0.5 + 1 / (2 * r)).log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_is_that_of_the_table_and_of_the_generator(name):
    weight = Divergence(name).weight(RATIOS.log())
    torch.testing.assert_close(weight, TABLE[name](RATIOS))
    r = RATIOS.clone().requires_grad_()
    (first,) = torch.autograd.grad(GENERATORS[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    ratio = weight / (RATIOS**2 * second)
    torch.testing.assert_close(ratio, ratio[0].expand(5))
    assert ratio[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_ratios_beyond_the_bound_count_as_the_bound(name):
    divergence = Divergence(name, bound=5.0)
    found = divergence.weight(torch.tensor([-90.0, 90.0]))
    expected = divergence.weight(torch.tensor([-math.log(5), math.log(5)]))
    assert found.tolist() == expected.tolist()
    assert found.isfinite().all()
    assert (found > 0).all()


def test_the_running_mean_of_each_interval_becomes_that_of_its_weights():
    module = MeanDivergenceWeight(Divergence("kl", bins=2, decay=0.5))
    logit = torch.tensor([2.0, 4.0]).log()
    t = torch.tensor([0.1, 0.2])
    first = module(logit, t)
    assert first.tolist() == pytest.approx([2, 4])  # no mean is known yet
    module.update(module.take())
    assert module(logit, t).tolist() == pytest.approx([2 / 3, 4 / 3])
    assert module(logit, t + 0.7).tolist() == pytest.approx([2, 4])  # another interval
    module.take()
    module(torch.tensor([6.0]).log(), t[:1])
    module.update(module.take())
    # weights 0.5 of 6 and 0.25 of 3
    assert module(logit, t).tolist() == pytest.approx([2 / 5, 4 / 5])


def test_the_recorded_sums_do_not_depend_on_the_split_and_leave_nan_out():
    whole, parts = (MeanDivergenceWeight(Divergence("js")) for _ in range(2))
    logit, t = torch.linspace(-2, 2, 12), torch.linspace(0, 1, 12)
    whole(logit, t)
    for part in (slice(0, 5), slice(5, 12)):
        parts(logit[part], t[part])
    parts(torch.tensor([math.nan]), t[:1])
    torch.testing.assert_close(whole.take(), parts.take())
    assert whole.take() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tv"}, "divergence.name is 'tv', expected one of rkl, kl"),
        ({"bound": 1.0}, "divergence.bound is 1.0"),
        ({"bins": 0}, "divergence.bins is 0"),
        ({"decay": 1.0}, "divergence.decay is 1.0"),
    ],
    ids=repr,
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**options)
