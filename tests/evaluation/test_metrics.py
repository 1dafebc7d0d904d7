"""Metrics against closed forms, and the classifier of the digits on real scans."""

import pytest
import torch

from diffcore.evaluation.digits import to_scan_units
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.evaluation.label_accuracy import LabelClassifier
from diffcore.training.data import Digits


def standardized(count, size):
    """Samples with mean 0 and covariance 1, to rounding."""
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (count - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def test_the_frechet_distance_of_gaussians_with_commuting_covariances_is_a_sum_of_squares():
    """For axis-parallel Gaussians it is |m_a - m_b|² + Σ (s_a - s_b)²."""
    x = standardized(50, 3)
    a, b = x * torch.tensor([1.0, 2.0, 3.0]), x * torch.tensor([2.0, 2.0, 0.5]) + 1
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 2.5**2)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (5, 3)])
def test_sets_that_cannot_be_compared_are_refused(shape):
    with pytest.raises(ValueError, match="expected two samples or more, of equal size"):
        frechet_distance(torch.zeros(shape), torch.zeros(5, 4))


def test_the_classifier_recognises_held_out_scans_under_their_own_labels_only():
    train, test = Digits("train"), Digits("test")
    classifier = LabelClassifier(train.x0, train.labels)
    assert classifier.accuracy(test.x0, test.labels) > 0.95
    assert classifier.accuracy(test.x0, (test.labels + 1) % 10) < 0.05


def test_scan_units_are_pixels_from_0_to_16():
    assert to_scan_units(torch.tensor([-2.0, -1.0, 0.0, 0.875, 3.0])).tolist() == [0, 0, 8, 15, 16]
