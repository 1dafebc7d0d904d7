"""Distances and scores of feature sets against brute force, closed forms and torchmetrics."""

import math
from itertools import combinations, product

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffcore.core.random import Stream, normal
from diffcore.evaluation import energy_distance as energy
from diffcore.evaluation import kernel_distance as kernel
from diffcore.evaluation import neighbours
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.evaluation.features.feature_table import FeatureTable
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.evaluation.image_statistics import image_statistics, summarize_statistics
from diffcore.evaluation.inception_score import inception_score
from diffcore.evaluation.kernel_distance import kernel_distance
from diffcore.evaluation.neighbours import nearest_neighbours, neighbour_scores
from diffcore.evaluation.results import measure


def gaussian(seed, count, size, scale=1.0, shift=0.0):
    return normal(seed, Stream.NOISE, torch.arange(count), (size,)) * scale + shift


class Identity(nn.Module):
    """Features that are the images themselves, for torchmetrics."""

    def forward(self, x):
        return x.flatten(1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that sets of a test need several."""
    for module in (energy, kernel, neighbours):
        monkeypatch.setattr(module, "BLOCK", 200)


A, B = gaussian(0, 300, 6), gaussian(1, 250, 6, 1.3, 0.4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distances_and_score_equal_those_of_torchmetrics_on_the_same_features(small_blocks):
    frechet = FrechetInceptionDistance(feature=Identity(), input_img_size=(6, 1, 1))
    frechet.set_dtype(torch.float64)
    kernels = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=250)
    for metric in (frechet, kernels):
        metric.update(A[:250, :, None, None], real=True)
        metric.update(B[:, :, None, None], real=False)
    assert frechet_distance(A[:250], B) == pytest.approx(float(frechet.compute()), rel=1e-4)
    assert kernel_distance(A[:250], B) == pytest.approx(float(kernels.compute()[0]), rel=1e-4)
    score = InceptionScore(feature=Identity(), splits=1)
    score.update(3 * A[:, :, None, None])
    assert inception_score(3 * A) == pytest.approx(float(score.compute()[0]), rel=1e-4)


def test_the_frechet_distance_of_gaussians_that_do_not_commute_equals_the_closed_form():
    """In two dimensions tr (C_a C_b)^½ = (tr C_a C_b + 2 (det C_a C_b)^½)^½."""
    x = torch.linalg.svd(gaussian(0, 40, 2).double() - gaussian(0, 40, 2).double().mean(0))[0]
    x = x[:, :2] * math.sqrt(39)
    x = x - x.mean(0)
    p, q = torch.tensor([[2.0, 0.7], [0.0, 0.5]]), torch.tensor([[1.0, 0.0], [-0.9, 3.0]])
    a, b = x @ p.double(), x @ q.double() + torch.tensor([1.0, -2.0])
    c_a, c_b = a.T.cov(), b.T.cov()
    root = torch.sqrt((c_a @ c_b).trace() + 2 * (c_a @ c_b).det().sqrt())
    assert frechet_distance(a, b) == pytest.approx(float(5 + (c_a + c_b).trace() - 2 * root))


def test_the_frechet_distance_of_fewer_samples_than_features_keeps_its_digits():
    a = gaussian(0, 5, 40)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 2) == pytest.approx(160, rel=1e-6)


def test_the_kernel_distance_is_unbiased():
    """Its mean over all subsets of each size is its value for the whole sets."""
    a, b = gaussian(0, 5, 2).double(), gaussian(1, 4, 2, 1.3, 0.4).double()
    for n, m in ((2, 2), (3, 2), (4, 3)):
        pairs = product(combinations(range(5), n), combinations(range(4), m))
        estimates = [kernel_distance(a[list(rows)], b[list(columns)]) for rows, columns in pairs]
        assert sum(estimates) / len(estimates) == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_the_kernel_distance_of_gaussians_approaches_the_closed_form():
    """For x ~ N(0, 1) and y ~ N(m, s²) in one dimension, E (xy + 1)³ follows from the moments."""
    s, m = 0.8, 0.5
    one, two = (0.0, 1.0, 0.0), (m, m**2 + s**2, m**3 + 3 * m * s**2)
    mean = lambda f, g: 1 + 3 * f[0] * g[0] + 3 * f[1] * g[1] + f[2] * g[2]  # noqa: E731
    exact = mean(one, one) + mean(two, two) - 2 * mean(one, two)
    estimate = kernel_distance(gaussian(0, 2000, 1), gaussian(1, 2000, 1, s, m))
    assert estimate == pytest.approx(exact, rel=0.15)


def test_subsets_of_the_kernel_distance_are_keyed_and_have_its_mean():
    full = kernel_distance(A, B)
    first = kernel_distance(A, B, subsets=40, subset_size=100)
    assert first == kernel_distance(A, B, subsets=40, subset_size=100)
    assert first != kernel_distance(A, B, subsets=40, subset_size=100, seed=1)
    assert first == pytest.approx(full, rel=0.2)
    assert kernel_distance(A[:250], B, subsets=1, subset_size=250) == pytest.approx(
        kernel_distance(A[:250], B)
    )
    with pytest.raises(ValueError, match="1 subset of 2 to 250 samples"):
        kernel_distance(A, B, subsets=1, subset_size=251)


def by_brute_force(samples, reference, k):
    """Precision, recall, density and coverage by Python loops over all pairs."""
    x, y = samples.double(), reference.double()
    radius = lambda z: [sorted(float((z[i] - w).norm()) for w in z)[k] for i in range(len(z))]  # noqa: E731
    fake, real = radius(x), radius(y)
    d = [[float((p - q).norm()) for q in y] for p in x]
    rows, columns = range(len(x)), range(len(y))
    inside = [[d[i][j] <= real[j] for j in columns] for i in rows]
    return (
        sum(any(row) for row in inside) / len(x),
        sum(any(d[i][j] <= fake[i] for i in rows) for j in columns) / len(y),
        sum(sum(row) for row in inside) / (k * len(x)),
        sum(any(inside[i][j] for i in rows) for j in columns) / len(y),
    )


def test_neighbour_scores_equal_brute_force(small_blocks):
    a, b = gaussian(0, 45, 3, 1.0, 5.0), gaussian(1, 38, 3, 1.2, 6.5)
    for three, five in ((3, 5), (1, 2)):
        scores = neighbour_scores(a, b, three, five)
        narrow, wide = by_brute_force(a, b, three), by_brute_force(a, b, five)
        assert scores == pytest.approx((*narrow[:2], *wide[2:]), abs=1e-12)
        assert 0.2 < scores.precision < 1
        assert 0.2 < scores.recall < 1


def test_a_set_compared_with_itself_is_precise_and_covered():
    scores = neighbour_scores(A, A)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    far = neighbour_scores(A + 100, A)
    assert far == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="more samples than k"):
        neighbour_scores(A[:5], A)


def test_the_nearest_neighbour_of_a_copy_is_its_original_at_distance_0(small_blocks):
    x = gaussian(3, 60, 4, 1.0, 1000.0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    distance, index = nearest_neighbours(x[order], x)
    assert torch.equal(index, order)
    assert not distance.any()
    distance, index = nearest_neighbours(A[:20], B)
    expected = torch.cdist(A[:20].double(), B.double()).min(1)
    assert torch.equal(index, expected.indices)
    assert torch.allclose(distance, expected.values)


def test_the_inception_score_is_the_number_of_classes_that_are_certain_and_equally_frequent():
    certain = torch.eye(4).repeat(5, 1) * 1e4
    assert inception_score(certain) == pytest.approx(4)
    assert inception_score(torch.zeros(6, 4)) == pytest.approx(1)


def full_energy_distance(a, b):
    a, b = a.double(), b.double()
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - sum(within))


def test_the_energy_distance_is_exact_in_one_dimension_and_near_it_in_several(small_blocks):
    a, b = gaussian(0, 70, 1), gaussian(1, 50, 1, 0.7, 0.5)
    assert energy_distance(a, b, directions=1) == pytest.approx(full_energy_distance(a, b))
    exact = full_energy_distance(A, B)
    assert energy_distance(A, B, directions=5000) == pytest.approx(exact, rel=0.05)
    assert energy_distance(A, B) == energy_distance(A, B)
    assert energy_distance(A, B) != energy_distance(A, B, seed=1)


@pytest.mark.parametrize("metric", [kernel_distance, energy_distance, nearest_neighbours])
def test_sets_of_different_features_are_refused(metric):
    with pytest.raises(ValueError, match="of equal size"):
        metric(torch.zeros(5, 3), torch.zeros(5, 4))


def test_statistics_of_plain_images_are_known():
    red, grey, half = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    red[0], grey[:], half[:, :2] = 255, 102, 255
    found = image_statistics(torch.stack((red, grey, half)))
    expected = [[0.299, 0, 1, 1], [0.4, 0, 0, 0], [0.5, 0.5, 0, 1]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    summary = summarize_statistics(found)
    assert summary["brightness"] == pytest.approx((0.299 + 0.4 + 0.5) / 3)
    assert summary["brightness_spread"] == pytest.approx(float(found[:, 0].std(correction=0)))
    assert image_statistics(grey[None, :1])[0].tolist() == pytest.approx([0.4, 0, 0, 0])


@pytest.mark.parametrize("has_training", [False, True])
def test_real_images_are_not_judged_by_the_classifier_that_was_fitted_to_them(has_training):
    labels = torch.arange(20) % 2
    features = labels[:, None] + torch.linspace(0, 0.4, 40).view(20, 2)
    table = FeatureTable(features, torch.zeros(20, 0), torch.zeros(20, 4), labels, "")
    columns = measure([table], table, table if has_training else None)["label_accuracy"]
    assert columns == {"samples": 1.0} | ({"reference": 1.0} if has_training else {})
