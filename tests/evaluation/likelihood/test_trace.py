"""Traces of Jacobians: exact ones, and their estimates by random vectors."""

import pytest
import torch

from diffcore.evaluation.likelihood.trace import (
    EXACT_DIMENSIONS,
    ExactTrace,
    Hutchinson,
    default_trace,
)


def random_jacobian(size):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double()


def estimate(trace, jacobian, count, seed=0):
    """Traces of the linear function x -> J x at `count` points."""
    x = torch.zeros(count, len(jacobian), dtype=torch.float64, requires_grad=True)
    return trace.estimate(x @ jacobian.T, x, trace.vectors(len(x[0]), seed, torch.arange(count)))


def test_the_exact_trace_is_the_sum_of_the_diagonal_of_the_jacobian_of_each_sample():
    x = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    v = torch.stack([x[:, 0].exp(), x[:, 0] * x[:, 1], x[:, 2].sin() + x[:, 1]], 1)
    trace = ExactTrace()
    expected = (x[:, 0].exp() + x[:, 0] + x[:, 2].cos()).detach()
    found = trace.estimate(v, x, trace.vectors(3, 0, torch.arange(2)))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("probes", [1, 4])
def test_the_estimate_is_unbiased_and_has_the_variance_of_rademacher_vectors(probes):
    jacobian, count = random_jacobian(5), 4000
    values = estimate(Hutchinson(probes), jacobian, count)
    symmetric = (jacobian + jacobian.T) / 2
    off = symmetric - symmetric.diagonal().diag()
    variance = 2 * float(off.square().sum()) / probes
    error = (variance / count) ** 0.5
    assert abs(float(values.mean()) - float(jacobian.trace())) < 4 * error
    assert float(values.var()) == pytest.approx(variance, rel=0.1)


def test_the_vectors_are_signs_that_depend_on_the_seed_the_position_and_the_probe():
    vectors = Hutchinson(2).vectors(32, 7, torch.tensor([3, 4]))
    assert vectors.shape == (2, 2, 32)
    assert set(vectors.unique().tolist()) == {-1.0, 1.0}
    assert len(vectors.flatten(0, 1).unique(dim=0)) == 4
    assert torch.equal(Hutchinson(2).vectors(32, 7, torch.tensor([4]))[:, 0], vectors[:, 1])
    assert not torch.equal(Hutchinson(2).vectors(32, 8, torch.tensor([3, 4])), vectors)


def test_the_default_is_exact_up_to_64_elements():
    assert EXACT_DIMENSIONS == 64
    assert default_trace(64) == ExactTrace()
    assert default_trace(65) == Hutchinson(1)


def test_an_estimate_without_vectors_is_refused():
    with pytest.raises(ValueError, match="probes is 0, expected at least 1"):
        Hutchinson(0)
