"""Couplings: the assignment is optimal within its group and class, and permutes the noise."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.objectives.coupling import IndependentCoupling, OptimalTransport
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(x0, noise):
    return (x0 - noise).flatten(1).square().sum().item()


def order(coupled, noise):
    """The index in `noise` of each sample of `coupled`, which must be a permutation."""
    same = (coupled.flatten(1)[:, None] == noise.flatten(1)).all(2)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()
    return same.double().argmax(1).tolist()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("group", [2, 4, 5])
def test_the_cost_is_minimal_among_all_permutations(group, seed):
    x0, noise = 3 * normals(seed, group, 2, 3) + 1, normals(100 + seed, group, 2, 3)
    best = min(cost(x0, noise[list(rows)]) for rows in permutations(range(group)))
    assert cost(x0, OptimalTransport(group)(x0, noise, None)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_cost_is_minimal_among_the_permutations_within_classes(seed):
    x0, noise = normals(seed, 6, 4), normals(100 + seed, 6, 4)
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    allowed = [rows for rows in permutations(range(6)) if (labels[list(rows)] == labels).all()]
    assert len(allowed) == 12
    coupled = OptimalTransport(6)(x0, noise, labels)
    assert cost(x0, coupled) == pytest.approx(
        min(cost(x0, noise[list(rows)]) for rows in allowed), rel=1e-12
    )
    assert tuple(order(coupled, noise)) in allowed


@pytest.mark.parametrize("conditional", [True, False])
def test_each_noise_is_used_once_within_its_group_and_class(conditional):
    x0, noise = normals(0, 48, 1, 2, 2), normals(1, 48, 1, 2, 2)
    labels = torch.arange(48) % 3 if conditional else None
    rows = torch.tensor(order(OptimalTransport(16)(x0, noise, labels), noise))
    assert torch.equal(rows // 16, torch.arange(48) // 16)
    assert not torch.equal(rows, torch.arange(48))
    if labels is not None:
        assert torch.equal(labels[rows], labels)


def test_the_pairs_of_a_group_do_not_depend_on_other_groups():
    x0, noise, labels = normals(0, 24, 3), normals(1, 24, 3), torch.arange(24) % 2
    whole = OptimalTransport(8)(x0, noise, labels)
    for part in torch.arange(24).split(8):
        assert torch.equal(OptimalTransport(8)(x0[part], noise[part], labels[part]), whole[part])


def test_the_coupled_noise_of_a_sample_is_standard_normal():
    """The noise of one fixed sample of the group is standard normal over many batches."""
    x0 = normals(0, 8, 2) + torch.tensor([5.0, 0.0])
    partners = [
        OptimalTransport(8)(
            x0[torch.randperm(8, generator=torch.Generator().manual_seed(i))],
            normals(9 + i, 8, 2),
            None,
        )[3]
        for i in range(600)
    ]
    for values in torch.stack(partners).T:
        assert stats.kstest(values.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("group", [8, 32, 128])
def test_larger_groups_give_straighter_paths(group):
    """Mean squared distance of the pairs, for 2-D data on a ring; E|x_0|² + 2 if independent."""
    angle = torch.linspace(0, 12, 512, dtype=torch.float64)
    x0 = (
        2
        * torch.stack((angle.cos(), angle.sin()), 1)[
            torch.randperm(512, generator=torch.Generator().manual_seed(0))
        ]
    )
    noise = normals(1, 512, 2)
    ratio = cost(x0, OptimalTransport(group)(x0, noise, None)) / cost(
        x0, IndependentCoupling()(x0, noise, None)
    )
    assert ratio < {8: 0.4, 32: 0.28, 128: 0.25}[group]


@pytest.mark.parametrize("rows", [1, 6, 12])
def test_a_group_that_does_not_divide_the_micro_batch_is_refused(rows):
    with pytest.raises(
        ValueError,
        match=rf"{rows} samples are not a multiple of OptimalTransport\(group=8\)'s group",
    ) as e:
        OptimalTransport(8)(normals(0, rows, 2), normals(1, rows, 2), None)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("group", [1, 0, -3])
def test_a_group_smaller_than_2_is_refused(group):
    with pytest.raises(ValueError, match=f"group is {group}, expected at least 2"):
        OptimalTransport(group)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_data_that_is_not_finite_is_paired_without_an_error(broken):
    """scipy refuses NaN, which would stop training before the trainer names the sample."""
    x0, noise = normals(0, 4, 2), normals(1, 4, 2)
    x0[2, 0] = broken
    order(OptimalTransport(4)(x0, noise, torch.tensor([0, 0, 0, 1])), noise)


def test_independent_coupling_returns_the_noise_itself():
    x0, noise = normals(0, 4, 2), normals(1, 4, 2)
    assert IndependentCoupling()(x0, noise, None) is noise


class ZeroNetwork(nn.Module):
    """A network with output 0 that records its input."""

    def forward(self, x, time, class_labels=None):
        self.x = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pairs_do_not_change_if_the_batch_is_split_between_groups(parts):
    """The target is the coupled noise, so a network with output 0 has its mean square as loss."""
    process = Process(shape=(2,), prediction="epsilon", classes=2, dropout=0.5)
    objective = Objective(MSE("epsilon"), coupling=OptimalTransport(8))
    x0, labels = normals(0, 32, 2).float(), torch.arange(32) % 2

    def losses(rows):
        key = SampleKey(3, 5, rows, 32)
        network = ZeroNetwork()
        denoiser, draw = Denoiser(network, process), objective.draw(process, key)
        result = objective(denoiser, x0[rows], labels[rows], draw)
        noise = (network.x - draw.level.alpha * x0[rows]) / draw.level.sigma
        torch.testing.assert_close(
            result.double(), noise.double().square().mean(1), rtol=1e-3, atol=1e-3
        )
        return result

    whole = losses(torch.arange(32))
    noise = normal(3, Stream.NOISE, 5 * 32 + torch.arange(32), (2,))
    assert sorted(whole.tolist()) == pytest.approx(
        sorted(noise.square().mean(1).tolist()), rel=1e-5
    )
    assert not torch.allclose(whole, noise.square().mean(1))
    for rows in torch.arange(32).split(32 // parts):
        torch.testing.assert_close(losses(rows), whole[rows], rtol=1e-6, atol=0)


def test_pairs_are_formed_before_the_condition_is_dropped():
    """Without its condition a sample keeps the noise of its class, which would leak otherwise."""
    process = Process(shape=(2,), prediction="epsilon", classes=2, dropout=0.5)
    x0, labels = normals(0, 16, 2).float(), torch.arange(16) % 2
    conditions = []

    class RecordingCoupling(OptimalTransport):
        def __call__(self, x0, noise, condition):
            conditions.append(condition)
            return super().__call__(x0, noise, condition)

    objective = replace(Objective(), coupling=RecordingCoupling(16))
    objective(
        Denoiser(ZeroNetwork(), process),
        x0,
        labels,
        objective.draw(process, SampleKey(0, 0, torch.arange(16), 16)),
    )
    assert torch.equal(conditions[0], labels)
