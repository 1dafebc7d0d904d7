"""The exact denoisers agree with formulas, quadrature and high-precision sums.

The references share no code with the denoisers.
"""

import math

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal

from diffcore.core.oracle import EmpiricalDistribution, GaussianMixture
from diffcore.schedules import Cosine
from tests.helpers.oracles import COVARIANCES, LABELS, MEANS, SCALINGS, WEIGHTS, mixture, process

LOGSNRS = (-8.0, -2.0, 0.0, 3.0, 8.0)
X = torch.tensor([[0.3, -0.2], [1.4, 0.9], [-2.0, 1.0], [4.0, -5.0]], dtype=torch.float64)
POINTS = torch.tensor(
    [[0.5, -1.0], [1.5, 0.2], [-0.7, 0.9], [0.0, 0.4], [-1.2, -0.6]], dtype=torch.float64
)
CLASSES = torch.tensor([0, 0, 1, 1, 1])
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64, after sums of a few terms of size 1


def level_at(logsnr, scaling="vp"):
    return Cosine(scaling=scaling).at(logsnr)


def reference(x, level, keep):
    """ln p, E[x_0 | x] and E[ε | x] of the components in `keep`, by solving with α²C + σ²I."""
    a, s = level.alpha, level.sigma
    total = a**2 * COVARIANCES + s**2 * torch.eye(2, dtype=torch.float64)
    log_joint, x0, eps = [], [], []
    for k in keep:
        log_joint.append(
            (WEIGHTS[k] / WEIGHTS[keep].sum()).log()
            + MultivariateNormal(a * MEANS[k], total[k]).log_prob(x)
        )
        solved = torch.linalg.solve(total[k], (x - a * MEANS[k]).T).T
        x0.append(MEANS[k] + a * solved @ COVARIANCES[k])
        eps.append(s * solved)
    r = torch.stack(log_joint).softmax(0)[..., None]
    return (
        torch.stack(log_joint).logsumexp(0),
        (r * torch.stack(x0)).sum(0),
        (r * torch.stack(eps)).sum(0),
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("logsnr", LOGSNRS)
@pytest.mark.parametrize(
    ("condition", "keep"), [(None, [0, 1, 2]), (0, [0]), (1, [1, 2]), (2, [0, 1, 2])]
)
def test_mixture_agrees_with_the_formula_for_the_components_of_the_condition(
    logsnr, scaling, condition, keep
):
    level = level_at(logsnr, scaling)
    labels = None if condition is None else torch.full((len(X),), condition)
    log_density, x0, eps = reference(X, level, keep)
    torch.testing.assert_close(mixture()(X, level, labels).x0, x0, **CLOSE)
    torch.testing.assert_close(mixture()(X, level, labels).eps, eps, **CLOSE)
    torch.testing.assert_close(mixture().log_density(X, level, labels), log_density, **CLOSE)
    torch.testing.assert_close(mixture().score(X, level, labels), -eps / level.sigma, **CLOSE)


def test_samples_of_a_batch_may_have_different_conditions_and_levels():
    labels, logsnrs = (
        torch.tensor([0, 1, 2, 1]),
        torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64),
    )
    together = mixture()(X, level_at(logsnrs[:, None]), labels)
    for i in range(4):
        alone = mixture()(X[i : i + 1], level_at(logsnrs[i].item()), labels[i : i + 1])
        torch.testing.assert_close(together.x0[i], alone.x0[0], **CLOSE)
        torch.testing.assert_close(together.eps[i], alone.eps[0], **CLOSE)


@pytest.mark.parametrize("logsnr", (-3.0, 0.0, 3.0))
@pytest.mark.parametrize("dimension", (1, 2))
def test_mixture_agrees_with_quadrature_over_x0(dimension, logsnr):
    """The trapezoid rule on a Gaussian is exact to rounding at a spacing below its std (0.2)."""
    means, covariances = MEANS[:, :dimension], COVARIANCES[:, :dimension, :dimension]
    oracle, level = (
        GaussianMixture(means, covariances, WEIGHTS, process=process(shape=(dimension,))),
        level_at(logsnr),
    )
    axis = torch.arange(-6, 6, 0.06, dtype=torch.float64)
    x0 = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension)
    prior = sum(
        w * MultivariateNormal(m, c).log_prob(x0).exp()
        for w, m, c in zip(WEIGHTS, means, covariances, strict=True)
    )
    x = X[:3, :dimension]
    residual = x[:, None] - level.alpha * x0
    density = (-(residual**2).sum(-1) / (2 * level.sigma**2)).exp() / (
        2 * math.pi * level.sigma**2
    ) ** (dimension / 2)
    joint = density * prior * 0.06**dimension
    torch.testing.assert_close(oracle.log_density(x, level), joint.sum(1).log(), **CLOSE)
    mean = (joint[..., None] * x0).sum(1) / joint.sum(1)[:, None]
    torch.testing.assert_close(oracle(x, level).x0, mean, **CLOSE)
    noise = (joint[..., None] * residual).sum(1) / joint.sum(1)[:, None] / level.sigma
    torch.testing.assert_close(oracle(x, level).eps, noise, **CLOSE)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("logsnr", LOGSNRS)
@pytest.mark.parametrize("condition", (None, torch.tensor([0, 1, 2, 1])))
@pytest.mark.parametrize(
    "oracle", (mixture(), EmpiricalDistribution(POINTS, CLASSES)), ids=("mixture", "empirical")
)
def test_score_is_the_gradient_of_the_log_density(oracle, condition, logsnr, scaling):
    level, x = level_at(logsnr, scaling), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.log_density(x, level, condition).sum(), x)
    torch.testing.assert_close(oracle.score(X, level, condition), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", ("vp", "flow"))
def test_mixture_at_pure_noise_predicts_the_mean_and_the_noise(scaling):
    x0, eps = mixture()(X, level_at(-math.inf, scaling))
    torch.testing.assert_close(x0, (WEIGHTS @ MEANS).expand(4, 2), **CLOSE)
    torch.testing.assert_close(eps, X, **CLOSE)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_mixture_at_clean_data_predicts_x0_and_zero_noise(scaling):
    x0, eps = mixture()(X, level_at(math.inf, scaling))
    torch.testing.assert_close(x0, X, **CLOSE)
    assert (eps == 0).all()


@pytest.mark.parametrize("condition", (None, 0, 1))
def test_mixture_samples_have_its_moments(condition):
    n, keep = 20000, {None: [0, 1, 2], 0: [0], 1: [1, 2]}[condition]
    labels = None if condition is None else torch.full((n,), condition)
    x = mixture().sample(torch.arange(n), labels)
    w = WEIGHTS[keep] / WEIGHTS[keep].sum()
    mean = w @ MEANS[keep]
    outer = MEANS[keep][:, :, None] * MEANS[keep][:, None]
    covariance = (w[:, None, None] * (COVARIANCES[keep] + outer)).sum(0) - mean[:, None] * mean
    # Variances are below 1.2 and fourth moments below 4, so 5 standard errors are below 0.05 and
    # 0.08.
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.08)


@pytest.mark.parametrize(
    "oracle", (mixture(), EmpiricalDistribution(POINTS, CLASSES)), ids=("mixture", "empirical")
)
def test_a_sample_depends_only_on_its_seed(oracle):
    seeds = torch.tensor([5, 3, 8, 1])
    assert torch.equal(
        oracle.sample(seeds), torch.cat([oracle.sample(seed[None]) for seed in seeds])
    )
    assert len(oracle.sample(torch.arange(64)).unique(dim=0)) > 3


def test_mixture_takes_and_returns_the_shape_of_the_data():
    images = GaussianMixture(
        torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    )
    x = images.sample(torch.arange(3))
    assert (
        x.shape
        == images(x, level_at(0.0)).x0.shape
        == images.score(x, level_at(0.0)).shape
        == (3, 1, 2, 2)
    )
    torch.testing.assert_close(
        images(x, level_at(0.0)).x0, x * 0.5**0.5, **CLOSE
    )  # α x / (α² + σ²)


def test_a_covariance_with_asymmetric_axes_is_exact():
    """In 2-D the eigenvectors may form a symmetric matrix, so this covariance is 3-D."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.4, 0.7, 0.3]], dtype=torch.float64)
    mean, covariance = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), root @ root.T
    oracle, level = GaussianMixture(mean[None], covariance[None]), level_at(0.7)
    x = torch.cat((X, X[:, :1]), 1)
    total = level.alpha**2 * covariance + level.sigma**2 * torch.eye(3, dtype=torch.float64)
    solved = torch.linalg.solve(total, (x - level.alpha * mean).T).T
    torch.testing.assert_close(
        oracle(x, level).x0, mean + level.alpha * solved @ covariance, **CLOSE
    )
    torch.testing.assert_close(oracle(x, level).eps, level.sigma * solved, **CLOSE)
    expected = MultivariateNormal(level.alpha * mean, total).log_prob(x)
    torch.testing.assert_close(oracle.log_density(x, level), expected, **CLOSE)
    n = 20000  # variances are at most 1: 5 standard errors of a covariance are 5 √(2/n) = 0.05
    torch.testing.assert_close(
        oracle.sample(torch.arange(n)).T.cov(), covariance, rtol=0, atol=0.05
    )


def test_mixture_refuses_a_covariance_that_is_not_positive_definite():
    with pytest.raises(ValueError, match="positive"):
        GaussianMixture(MEANS[:1], torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))[None])


def exact_sums(x, points, level):
    """ln p, E[x_0 | x] and E[ε | x] over points, in 60 digits."""
    with mpmath.workdps(60):
        a, s = mpmath.mpf(level.alpha), mpmath.mpf(level.sigma)
        rows = [[mpmath.mpf(v) for v in point.tolist()] for point in points]
        x = [mpmath.mpf(v) for v in x.tolist()]
        p = [
            mpmath.exp(-sum((v - a * d) ** 2 for v, d in zip(x, row, strict=True)) / (2 * s**2))
            for row in rows
        ]
        x0 = [
            sum(q * row[i] for q, row in zip(p, rows, strict=True)) / sum(p) for i in range(len(x))
        ]
        eps = [(v - a * m) / s for v, m in zip(x, x0, strict=True)]
        log_density = mpmath.log(sum(p) / len(p)) - len(x) * mpmath.log(2 * mpmath.pi * s**2) / 2
        return float(log_density), [float(v) for v in x0], [float(v) for v in eps]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("logsnr", LOGSNRS)
def test_empirical_agrees_with_a_softmax_in_60_digits(logsnr, scaling):
    level, oracle = level_at(logsnr, scaling), EmpiricalDistribution(POINTS)
    for x in X:
        log_density, x0, eps = exact_sums(x, POINTS, level)
        assert oracle(x[None], level).x0[0].tolist() == pytest.approx(x0, rel=1e-10, abs=1e-10)
        assert oracle(x[None], level).eps[0].tolist() == pytest.approx(eps, rel=1e-10, abs=1e-10)
        assert oracle.log_density(x[None], level).item() == pytest.approx(log_density, rel=1e-10)


@pytest.mark.parametrize("logsnr", (-6.0, 0.0, 3.0))
@pytest.mark.parametrize(("offset", "close"), [(100.0, 1e-9), (1e6, 1e-6)])
def test_empirical_is_stable_far_from_data_that_is_far_from_the_origin(offset, close, logsnr):
    """In float64, squares of 1e6 have an error of 1e-4 in a logit.

    With centred points, the rounding of x limits the error to 1e-10 σ^-2.
    """
    level, points, oracle = (
        level_at(logsnr),
        POINTS + offset,
        EmpiricalDistribution(POINTS + offset),
    )
    for x in level.alpha * offset + torch.tensor(
        [[1e3, 0.0], [-600.0, 800.0], [0.1, 0.2]], dtype=torch.float64
    ):
        _, x0, eps = exact_sums(x, points, level)
        assert oracle(x[None], level).x0[0].tolist() == pytest.approx(x0, rel=0, abs=close)
        assert oracle(x[None], level).eps[0].tolist() == pytest.approx(eps, rel=1e-9, abs=close)


def test_empirical_in_float32_is_the_rounded_float64_prediction():
    x, level = X.float(), level_at(2.0)
    prediction = EmpiricalDistribution(POINTS + 100)(x, level)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    torch.testing.assert_close(
        prediction.x0,
        EmpiricalDistribution(POINTS + 100)(x.double(), level).x0.float(),
        rtol=0,
        atol=0,
    )


def test_empirical_at_small_noise_is_the_nearest_point():
    x = POINTS + torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    torch.testing.assert_close(EmpiricalDistribution(POINTS)(x, level_at(30.0)).x0, POINTS, **CLOSE)


def test_empirical_keeps_the_points_of_the_condition():
    level, labels = level_at(-1.0), torch.tensor([0, 1, 2, 0])
    prediction = EmpiricalDistribution(POINTS, CLASSES)(X, level, labels)
    for i, keep in enumerate(([0, 1], [2, 3, 4], [0, 1, 2, 3, 4], [0, 1])):
        torch.testing.assert_close(
            prediction.x0[i],
            EmpiricalDistribution(POINTS[keep])(X[i : i + 1], level).x0[0],
            **CLOSE,
        )


def test_empirical_at_pure_noise_predicts_the_mean_and_the_noise():
    x0, eps = EmpiricalDistribution(POINTS)(X, level_at(-math.inf))
    torch.testing.assert_close(x0, POINTS.mean(0).expand(4, 2), **CLOSE)
    torch.testing.assert_close(eps, X, **CLOSE)


@pytest.mark.parametrize("method", ("__call__", "score", "log_density"))
def test_empirical_refuses_sigma_0(method):
    with pytest.raises(ValueError, match="σ = 0"):
        getattr(EmpiricalDistribution(POINTS), method)(X, level_at(math.inf))


def test_empirical_samples_are_its_points_equally_often_within_the_class():
    oracle, n = EmpiricalDistribution(POINTS, CLASSES), 3000
    samples = oracle.sample(torch.arange(n), torch.full((n,), 1))
    counts = [(samples - point).abs().amax(1).lt(1e-12).sum().item() for point in POINTS]
    assert counts[:2] == [0, 0]
    assert sum(counts) == n
    assert all(
        abs(count - 1000) < 5 * (n * 2 / 9) ** 0.5 for count in counts[2:]
    )  # 5 standard deviations


@pytest.mark.parametrize(("condition", "labels"), [(None, {0, 1}), (2, {0, 1}), (0, {0})])
def test_samples_have_the_class_of_the_condition(condition, labels):
    oracle = EmpiricalDistribution(LABELS[:, None].double(), LABELS)
    given = None if condition is None else torch.full((50,), condition)
    assert set(oracle.sample(torch.arange(50), given).round().long().flatten().tolist()) == labels


def test_a_class_without_components_is_refused():
    oracle = GaussianMixture(
        torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2), labels=torch.tensor([0, 2])
    )
    x, level = torch.zeros(3, 2), Cosine().at(0.0)
    with pytest.raises(ValueError, match=r"class 1 has no component, expected one of \[0, 2\]"):
        oracle(x, level, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="class 1 has no component"):
        oracle.sample(torch.arange(2), torch.tensor([1, 0]))
    assert oracle(x, level, torch.tensor([0, 2, 3])).x0.isfinite().all()
