"""Guidance by the gradient of a classifier, and by its logits alone."""

import math

import pytest
import torch
from torch import nn

from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.guidance import (
    CFG,
    GFCG,
    ClassifierGuidance,
    Interval,
    MinorityGuidance,
    Sum,
    WeakerNetwork,
    minority_classes,
    minority_score,
)
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, integrate, watch
from diffcore.schedules import Cosine, Flow, UniformLogSNR
from tests.helpers.oracles import (
    COVARIANCES,
    MEANS,
    SCALINGS,
    WEIGHTS,
    Pair,
    gaussian,
    mixture,
    process,
)

ORACLE = mixture()
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
X = 2 * NOISE.start()
PRIOR = torch.tensor([0.5, 0.5], dtype=torch.float64)  # probability of each class


def bayes(oracle):
    """The exact classifier, with logits ln p(x | y) + ln p(y)."""

    def logits(x, level):
        each = [oracle.log_density(x, level, torch.full((len(x),), y)) for y in (0, 1)]
        return torch.stack(each, 1) + PRIOR.log()

    return logits


def unconditional(scaling="vp"):
    """The mixture as a network without classes."""
    record = process(Cosine(scaling=scaling), classes=0)
    return GaussianMixture(MEANS, COVARIANCES, WEIGHTS, torch.tensor([0, 1, 1]), record)


@pytest.mark.parametrize("logsnr", (-4.0, -1.0, 2.0))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_exact_classifier_at_w_1_makes_the_conditional_prediction_of_the_unconditional_one(
    scaling, logsnr
):
    """This is Bayes' rule; the network needs no classes."""
    oracle = mixture(process(Cosine(scaling=scaling)))
    level = oracle.process.schedule.at(logsnr)
    rule = ClassifierGuidance(bayes(oracle), 1.0)
    guided, _, evaluations = guided_prediction(unconditional(scaling), rule, X, level, LABELS, None)
    expected = oracle(X, level, LABELS)
    torch.testing.assert_close(guided.x0, expected.x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(guided.eps, expected.eps, rtol=1e-8, atol=1e-8)
    assert evaluations == 1


def test_on_the_conditional_prediction_it_is_cfg_with_w_plus_1():
    level = ORACLE.process.schedule.at(-1.0)
    ours, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0), X, level, LABELS, None
    )
    cfg, _, _ = guided_prediction(ORACLE, CFG(3.0), X, level, LABELS, None)
    torch.testing.assert_close(ours.x0, cfg.x0, rtol=1e-8, atol=1e-8)


def test_samples_of_an_unconditional_network_follow_their_labels():
    arguments = {
        "grid": UniformLogSNR(-6.0, 6.0),
        "steps": 20,
        "seeds": range(6),
        "condition": LABELS,
        "dtype": torch.float64,
    }
    by_classifier = sample(
        unconditional(), guidance=ClassifierGuidance(bayes(ORACLE), 1.0), **arguments
    )
    by_network = sample(ORACLE, guidance=CFG(1.0), **arguments)
    torch.testing.assert_close(by_classifier.x, by_network.x, rtol=0, atol=1e-7)
    assert by_classifier.evaluations == 20


def test_one_label_for_all_or_a_log_probability_replaces_the_labels():
    level = ORACLE.process.schedule.at(0.0)
    ones = torch.ones(6, dtype=torch.int64)
    by_condition, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0), X, level, ones, None
    )
    by_label, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0, label=1), X, level, ones, None
    )
    log_p = ClassifierGuidance(
        lambda x, level: bayes(ORACLE)(x, level).log_softmax(1)[:, 1], 2.0, label=0
    )
    by_value, _, _ = guided_prediction(ORACLE, log_p, X, level, ones, None)
    torch.testing.assert_close(by_label.x0, by_condition.x0)
    torch.testing.assert_close(by_value.x0, by_condition.x0)


@pytest.mark.parametrize(("joint", "marginal"), [(1.0, 0.5), (2.0, 1.0), (1.0, 0.0)])
def test_temperatures_weigh_the_logit_against_the_normalisation(joint, marginal):
    """∇ (τ_1 f_y - logsumexp τ_2 f) = τ_1 ∇f_y - τ_2 Σ_k softmax(τ_2 f)_k ∇f_k for f = A x."""
    A = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.2]], dtype=torch.float64)
    level = ORACLE.process.schedule.at(0.4)
    rule = ClassifierGuidance(
        lambda x, level: x @ A.T, 3.0, label=1, joint=joint, marginal=marginal
    )
    guided, _, _ = guided_prediction(ORACLE, rule, X, level, LABELS, None)
    p = torch.softmax(marginal * X @ A.T, 1)
    gradient = joint * A[1] - marginal * p @ A
    plain = ORACLE(X, level, LABELS)
    torch.testing.assert_close(
        guided.x0, plain.x0 + 3 * level.sigma**2 / level.alpha * gradient, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        guided.eps, plain.eps - 3 * level.sigma * gradient, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_on_the_prediction_of_x0_it_is_exact_for_data_of_the_stated_deviation(scaling):
    """For x_0 ~ N(m, s²), ln p(y | x_0) = b x_0: E[x_0 | x, y] = E[x_0 | x] + b Var[x_0 | x]."""
    record = process(Cosine(scaling=scaling), shape=(1,), classes=0, sigma_data=0.5)
    oracle = gaussian([0.3], torch.tensor([[0.25]]), record)
    x, b = torch.linspace(-2, 2, 5).double()[:, None], 1.7
    for logsnr in (-3.0, 0.0, 3.0):
        level = record.schedule.at(logsnr)
        rule = ClassifierGuidance(lambda x0, level: b * x0[:, 0], 1.0, label=0, input="x0")
        guided, _, _ = guided_prediction(oracle, rule, x, level, None, None)
        variance = 1 / (1 / 0.25 + (level.alpha / level.sigma) ** 2)  # Var[x_0 | x]
        torch.testing.assert_close(
            guided.x0, oracle(x, level).x0 + b * variance, rtol=1e-9, atol=1e-9
        )


def test_at_pure_noise_a_classifier_of_x_changes_nothing_and_one_of_x0_shifts_the_prior():
    level = ORACLE.process.schedule.level(1.0)
    plain = ORACLE(X, level, LABELS)
    by_x, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0), X, level, LABELS, None
    )
    assert torch.equal(by_x.x0, plain.x0)
    linear = ClassifierGuidance(lambda x0, level: x0.sum(1), 2.0, label=0, input="x0")
    by_x0, _, _ = guided_prediction(ORACLE, linear, X, level, LABELS, None)
    torch.testing.assert_close(
        by_x0.x0, plain.x0 + 2 * ORACLE.process.sigma_data**2, rtol=1e-12, atol=1e-12
    )


def test_with_cfg_in_a_sum_both_changes_are_added():
    level = ORACLE.process.schedule.at(0.0)
    rules = CFG(3.0), ClassifierGuidance(bayes(ORACLE), 2.0)
    both, _, _ = guided_prediction(ORACLE, Sum(rules), X, level, LABELS, None)
    cfg, _, _ = guided_prediction(ORACLE, CFG(5.0), X, level, LABELS, None)
    torch.testing.assert_close(both.x0, cfg.x0, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def frozen(x, level):
    return x @ torch.ones(2, 2, dtype=x.dtype)


@pytest.mark.parametrize(
    "classifier",
    [
        frozen,
        lambda x, level: x.detach() @ torch.ones(2, 2, dtype=x.dtype, requires_grad=True),
        lambda x, level: torch.zeros(len(x), 2),
    ],
    ids=("no_grad", "detached", "constant"),
)
def test_a_classifier_that_is_not_differentiable_is_refused_in_one_line_with_the_remedy(classifier):
    with pytest.raises(ValueError, match=r"not\s+differentiable.*GFCG") as caught:
        sample(ORACLE, steps=3, seeds=[1], condition=[0], guidance=ClassifierGuidance(classifier))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ClassifierGuidance(bayes(ORACLE)), "needs a class to move towards"),
        (GFCG(bayes(ORACLE)), "needs a class to move towards"),
    ],
    ids=("gradient", "forward"),
)
def test_without_labels_there_is_no_class_to_move_towards(rule, message):
    with pytest.raises(ValueError, match=message):
        sample(ORACLE, steps=3, seeds=[1], guidance=rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierGuidance(3), "classifier is 3"),
        (lambda: ClassifierGuidance(bayes(ORACLE), -1.0), "scale is -1.0"),
        (lambda: ClassifierGuidance(bayes(ORACLE), input="eps"), "input is 'eps'"),
        (lambda: ClassifierGuidance(bayes(ORACLE), joint=0.0), "joint and marginal"),
        (lambda: MinorityGuidance(bayes(ORACLE)), "label is None"),
        (lambda: GFCG(None), "classifier is None"),
        (lambda: GFCG(bayes(ORACLE), math.nan), "scale is nan"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [2.0, 2.5, 0.0]], dtype=torch.float64)


def three():
    return GaussianMixture(MEANS, COVARIANCES, WEIGHTS, torch.arange(3), process(classes=3))


def test_gfcg_moves_away_from_the_previous_rival_class_by_the_doubt():
    """y = 0, 1, 0 have the rivals 2, 2, 1. The first step has no reference."""
    oracle, labels = three(), torch.tensor([0, 1, 0])
    noise = Noise(torch.arange(3), (2,), dtype=torch.float64)
    knots = UniformLogSNR(-3.0, 3.0).knots(oracle.process.schedule, 4)
    path = list(
        watch(
            oracle,
            DDIM(),
            2 * noise.start(),
            knots,
            noise,
            GFCG(lambda x0, level: LOGITS.to(x0), 4.0),
            labels,
        )
    )
    assert [len(inputs.references) for inputs in path] == [0, 1, 1, 1]
    doubt = 1 - LOGITS.softmax(1)[range(3), labels]
    for before, after in zip(path[1:], path[2:], strict=False):
        t, s = before.step.level, after.step.level
        c, r = oracle(before.x, t, labels).x0, oracle(before.x, t, torch.tensor([2, 2, 1])).x0
        x0 = r + (1 + 3 * doubt[:, None]) * (c - r)
        torch.testing.assert_close(
            after.x, s.alpha * x0 + s.sigma * (before.x - t.alpha * x0) / t.sigma, rtol=0, atol=1e-9
        )


def test_gfcg_needs_no_condition_dropout_and_leaves_certain_samples_unchanged():
    record = process(classes=3, dropout=0.0)
    oracle = GaussianMixture(MEANS, COVARIANCES, WEIGHTS, torch.arange(3), record)
    sure = torch.full((1, 3), -200.0).scatter(1, torch.tensor([[1]]), 200.0)
    arguments = {"steps": 6, "seeds": range(4), "condition": [1] * 4, "dtype": torch.float64}
    made = sample(
        oracle, guidance=GFCG(lambda x0, level: sure.expand(len(x0), 3), 5.0), **arguments
    )
    plain = sample(oracle, guidance=CFG(1.0), **arguments)
    torch.testing.assert_close(made.x, plain.x, rtol=0, atol=1e-12)
    assert made.evaluations == made.planned == 11


def test_gfcg_evaluates_a_weaker_network_under_the_rival_class():
    oracle, labels = three(), torch.tensor([0, 1, 0])
    weak = GaussianMixture(MEANS, 3 * COVARIANCES, WEIGHTS, torch.arange(3), oracle.process)
    rule = GFCG(lambda x0, level: LOGITS.to(x0), 4.0, weak)
    noise = Noise(torch.arange(3), (2,), dtype=torch.float64)
    knots = UniformLogSNR(-3.0, 3.0).knots(oracle.process.schedule, 3)
    *_, last = watch(oracle, DDIM(), 2 * noise.start(), knots, noise, rule, labels)
    torch.testing.assert_close(
        last.references[0].x0,
        weak(last.x, last.step.level, torch.tensor([2, 2, 1])).x0,
        rtol=1e-9,
        atol=1e-9,
    )


def test_gfcg_refuses_a_classifier_of_other_classes_and_a_network_of_one():
    with pytest.raises(ValueError, match=r"returns shape \(64, 2\), expected \(64, 3\)"):
        sample(three(), steps=3, seeds=[1], condition=[0], guidance=GFCG(lambda x0, level: x0, 2.0))
    with pytest.raises(ValueError, match="2 classes or more"):
        sample(Pair(), steps=3, seeds=[1], condition=[0], guidance=GFCG(lambda x0, level: x0, 2.0))


def test_minority_guidance_is_classifier_guidance_towards_a_minority_class():
    level = ORACLE.process.schedule.at(0.0)
    ours, _, _ = guided_prediction(
        ORACLE, MinorityGuidance(bayes(ORACLE), 2.0, label=1), X, level, LABELS, None
    )
    same, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0, label=1), X, level, LABELS, None
    )
    assert torch.equal(ours.x0, same.x0)


def test_the_minority_score_is_the_error_of_reconstruction_and_its_classes_are_equally_large():
    """On N(0, 1) the error is ((1 - k α) x_0 - k σ ε)², k = α/(α² + σ²)."""
    oracle = gaussian([0.0], torch.tensor([[1.0]]), process(Flow(), shape=(1,), classes=0))
    level = oracle.process.schedule.at(-1.0)
    x0, eps = torch.linspace(-3, 3, 600).double()[:, None], torch.full((600, 1), 0.2).double()
    k = level.alpha / (level.alpha**2 + level.sigma**2)
    scores = minority_score(oracle, x0, eps, level)
    torch.testing.assert_close(
        scores, ((1 - k * level.alpha) * x0 - k * level.sigma * eps)[:, 0] ** 2
    )
    wide = minority_score(ORACLE, 2 * NOISE.start(), NOISE.start(), ORACLE.process.schedule.at(0.0))
    noisy = ORACLE.process.schedule.at(0.0)
    rebuilt = ORACLE((2 * noisy.alpha + noisy.sigma) * NOISE.start(), noisy).x0
    torch.testing.assert_close(wide, (rebuilt - 2 * NOISE.start()).square().sum(1) / 2)
    classes = minority_classes(scores, 3)
    assert classes.bincount().tolist() == pytest.approx([200] * 3, abs=1)
    assert scores[classes == 2].min() > scores[classes == 1].max() > scores[classes == 0].max()
    assert minority_classes(torch.tensor([3.0, 1.0, 2.0]), 2).tolist() == [1, 0, 1]  # at the cut


def test_a_weaker_network_and_a_classifier_add_up():
    knots = UniformLogSNR(-3.0, 3.0).knots(ORACLE.process.schedule, 3)
    rule = Sum((CFG(2.0, WeakerNetwork(ORACLE)), ClassifierGuidance(bayes(ORACLE), 1.0)))
    alone, _ = integrate(
        ORACLE, DDIM(), X, knots, NOISE, ClassifierGuidance(bayes(ORACLE), 1.0), LABELS
    )
    both, used = integrate(ORACLE, DDIM(), X, knots, NOISE, rule, LABELS)
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-10)  # the weaker one is the same one
    assert used == 6


def test_samples_with_the_null_label_are_not_guided():
    level, labels = ORACLE.process.schedule.at(-1.0), torch.tensor([0, 2, 1, 2, 1, 0])
    guided, _, _ = guided_prediction(
        ORACLE, ClassifierGuidance(bayes(ORACLE), 2.0), X, level, labels, None
    )
    plain = ORACLE(X, level, labels)
    assert (guided.x0 != plain.x0).any(1).tolist() == (labels < 2).tolist()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ClassifierGuidance(lambda x, level: x[:, :1]),
            r"\(64, 1\), expected \(B,\) or logits of 2 classes",
        ),
        (
            ClassifierGuidance(bayes(ORACLE), label=4),
            r"\(64, 2\), expected \(B,\) or logits of 5 classes",
        ),
        (ClassifierGuidance(lambda x, level: x.sum()), r"returns shape \(\), expected"),
    ],
)
def test_a_classifier_of_too_few_classes_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        sample(
            ORACLE,
            grid=UniformLogSNR(),
            seeds=[1],
            condition=[1],
            guidance=rule,
            dtype=torch.float64,
        )


class DropoutClassifier(nn.Module):
    """A classifier whose logits depend on its mode, which it records."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = nn.Dropout(0.5), set()

    def forward(self, x, level):
        self.modes.add(self.training)
        return self.dropout(x)


@pytest.mark.parametrize("make", (ClassifierGuidance, GFCG, MinorityGuidance), ids=str)
@pytest.mark.parametrize("wrap", (lambda rule: rule, lambda rule: Interval(rule, 0.1, 9.0)))
def test_a_classifier_is_evaluated_without_dropout_and_its_mode_is_restored(make, wrap):
    for choose in (lambda module: module, lambda module: module.forward):
        classifier = DropoutClassifier()
        options = {"label": 1} if make is MinorityGuidance else {}
        rule = wrap(make(choose(classifier), 2.0, **options))
        sample(mixture(), steps=4, seeds=[1, 2], condition=[0, 1], guidance=rule)
        assert classifier.modes == {False}
        assert classifier.training
