"""References: another condition or another network; one forward for each network; errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser, DenoiserWrapper
from diffcore.core.noise import Noise
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AutoGuidance,
    CFGPlusPlus,
    ComposedConditions,
    Interval,
    Label,
    Rescale,
    Sum,
    Unconditional,
    WeakerNetwork,
    find_networks,
    load_weaker_networks,
)
from diffcore.guidance.evaluation import evaluate_queries
from diffcore.guidance.reference import Query
from diffcore.samplers import AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Cosine, Flow, Laplace, Trailing, Truncated
from tests.helpers.oracles import (
    COVARIANCES,
    MEANS,
    WEIGHTS,
    ExactNetwork,
    GaussianMixture,
    Pair,
    gaussian,
    mixture,
    process,
)

RECORD = process()
ORACLE = mixture(RECORD)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
X = 2 * NOISE.start()
LEVEL = RECORD.schedule.at(-0.5)
COMPONENTS = torch.tensor([0, 1, 1])


def weak_of(record):
    return GaussianMixture(MEANS, 2 * COVARIANCES, WEIGHTS, COMPONENTS, record)


@pytest.mark.parametrize("label", (0, 1))
def test_a_negative_label_is_the_reference_and_needs_no_dropout(label):
    oracle = mixture(process(dropout=0.0))
    guided, _, _ = guided_prediction(oracle, CFG(3.0, Label(label)), X, LEVEL, LABELS, None)
    c, n = oracle(X, LEVEL, LABELS), oracle(X, LEVEL, torch.full((6,), label))
    torch.testing.assert_close(guided.x0, n.x0 + 3 * (c.x0 - n.x0), rtol=1e-10, atol=1e-10)
    same = label == LABELS
    torch.testing.assert_close(guided.x0[same], c.x0[same], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", (Cosine(), Flow(), Cosine(scaling="ve")), ids=str)
def test_autoguidance_accepts_a_weaker_network_of_another_schedule(schedule):
    """TimeSampling are matched in λ and x is rescaled, so the schedule does not matter."""
    guided, _, evaluations = guided_prediction(
        ORACLE, AutoGuidance(2.1, weak_of(process(schedule))), X, LEVEL, LABELS, None
    )
    c, w = ORACLE(X, LEVEL, LABELS), weak_of(RECORD)(X, LEVEL, LABELS)
    torch.testing.assert_close(guided.x0, w.x0 + 2.1 * (c.x0 - w.x0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided.eps, w.eps + 2.1 * (c.eps - w.eps), rtol=1e-9, atol=1e-9)
    assert evaluations == 2


def test_autoguidance_at_pure_noise_matches_by_sigma():
    level = Flow().level(1.0)
    guided, _, _ = guided_prediction(
        mixture(process(Flow())),
        AutoGuidance(2.0, weak_of(process(Cosine()))),
        X,
        level,
        LABELS,
        None,
    )
    assert guided.x0.isfinite().all()
    same, _, _ = guided_prediction(
        mixture(process(Flow())),
        AutoGuidance(2.0, weak_of(process(Flow()))),
        X,
        level,
        LABELS,
        None,
    )
    torch.testing.assert_close(guided.x0, same.x0)


def test_autoguidance_needs_no_condition_and_on_two_gaussians_has_the_variance_of_cfg():
    """2^(1-w), with N(0, 1) against N(0, 2)."""
    record, noise = (
        process(Flow(), shape=(1,), classes=0),
        Noise(torch.arange(3), (1,), dtype=torch.float64),
    )
    good, bad = (gaussian([0.0], torch.tensor([[v]]), record) for v in (1.0, 2.0))
    x, used = integrate(
        good,
        AlphaBlending(2),
        noise.start(),
        Trailing().knots(Flow(), 200),
        noise,
        AutoGuidance(3.0, bad),
        None,
    )
    torch.testing.assert_close(
        (x / noise.start()) ** 2, torch.full_like(x, 0.25), rtol=2e-4, atol=0
    )
    assert used == 800


def test_every_rule_takes_every_reference():
    for rule in (CFG, APG, lambda w, reference: Rescale(CFG(w, reference))):
        results = [
            guided_prediction(ORACLE, rule(3.0, reference), X, LEVEL, LABELS, None)[0].x0
            for reference in (Unconditional(), Label(1), WeakerNetwork(weak_of(RECORD)))
        ]
        assert len({round(result.sum().item(), 9) for result in results}) == 3


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (ComposedConditions((0, 1), (0.5, -1.0), 2.0), [24]),
        (Sum((CFG(2.0), CFG(3.0), CFG(2.0, Label(1)))), [18]),
        (CFG(2.0, WeakerNetwork(ORACLE)), [6]),
    ],
    ids=str,
)
def test_all_queries_to_one_network_share_one_forward(rule, sizes):
    network = ExactNetwork(mixture(RECORD), RECORD)
    guided_prediction(Denoiser(network, RECORD), rule, X, LEVEL, LABELS, None)
    assert [len(x) for x, _, _ in network.calls] == sizes


def test_predictions_come_in_the_order_of_the_queries():
    weak = weak_of(RECORD)
    queries = [Query(ORACLE, LABELS), Query(weak, LABELS), Query(ORACLE, None), Query(weak, None)]
    for micro_batch in (0, 4):
        predictions = evaluate_queries(queries, X, LEVEL, micro_batch)
        for query, guided in zip(queries, predictions, strict=True):
            torch.testing.assert_close(
                guided.x0, query.denoiser(X, LEVEL, query.condition).x0, rtol=1e-12, atol=1e-12
            )


class LearnedVariance(DenoiserWrapper):
    """The oracle with v = 0.3 + the label (0.1 without one) as its variance."""

    def __call__(self, x, level, condition=None):
        labels = torch.full((len(x),), 2) if condition is None else condition
        v = (0.3 + labels.to(x)).view(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return replace(self.inner(x, level, condition), variance=v)


@pytest.mark.parametrize("micro_batch", [0, 4])
@pytest.mark.parametrize(
    "rule", [CFG(3.0), CFGPlusPlus(0.6), APG(4.0), Rescale(CFG(3.0)), CFG(1.0)], ids=repr
)
def test_the_learned_variance_of_a_guided_prediction_is_the_conditional_one(rule, micro_batch):
    prediction, _, _ = guided_prediction(
        LearnedVariance(ORACLE), rule, X, LEVEL, LABELS, None, None, micro_batch
    )
    expected = (0.3 + LABELS.to(X))[:, None].expand_as(X)
    assert torch.equal(prediction.variance, expected)
    plain, _, _ = guided_prediction(ORACLE, rule, X, LEVEL, LABELS, None, None, micro_batch)
    torch.testing.assert_close(prediction.pair, plain.pair, rtol=0, atol=0)
    assert plain.variance is None


def test_composed_is_the_weighted_sum_of_conditions_and_negation_is_a_negative_weight():
    guided, _, evaluations = guided_prediction(
        ORACLE, ComposedConditions((0, 1), (0.7, -0.4), 2.0), X, LEVEL, LABELS, None
    )
    labels = (LABELS, None, torch.zeros(6), torch.ones(6))
    c, u, one, two = (ORACLE(X, LEVEL, y).pair for y in labels)
    for i in range(2):
        expected = u[i] + 2 * (c[i] - u[i]) + 0.7 * (one[i] - u[i]) - 0.4 * (two[i] - u[i])
        torch.testing.assert_close(guided.pair[i], expected, rtol=1e-10, atol=1e-10)
    assert evaluations == 4


def test_composed_of_gaussians_is_the_score_of_their_product():
    """With p_i = N(m_i, 1) and p = N(0, 1), p Π (p_i/p)^(w_i) is N(Σ w_i m_i, 1)."""
    means = torch.tensor([[1.0], [-2.0], [0.0]], dtype=torch.float64)

    class Shifted:
        process = process(Flow(), shape=(1,), classes=2)

        def __call__(self, x, level, condition=None):
            m = means[torch.full((len(x),), 2) if condition is None else condition]
            return gaussian_prediction(x, level, m)

    x = torch.linspace(-2, 2, 4).double()[:, None]
    guided, _, _ = guided_prediction(
        Shifted(),
        ComposedConditions((1,), (-0.5,), 1.5),
        x,
        Flow().at(0.3),
        torch.zeros(4, dtype=torch.int64),
        None,
    )
    expected = gaussian_prediction(
        x, Flow().at(0.3), torch.full((4, 1), 1.5 * 1.0 + 0.5 * 2.0).double()
    )
    torch.testing.assert_close(guided.x0, expected.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(guided.eps, expected.eps, rtol=1e-10, atol=1e-10)


def gaussian_prediction(x, level, m):
    from diffcore.core.prediction import Prediction

    total = level.alpha**2 + level.sigma**2
    y = x - level.alpha * m
    return Prediction(m + level.alpha / total * y, level.sigma / total * y)


@pytest.mark.parametrize(
    ("fields", "rule", "condition", "message"),
    [
        ({}, CFG(2.0), None, r"CFG\(.*needs a condition.*--labels"),
        (
            {"dropout": 0.0},
            Interval(APG(2.0)),
            [0],
            r"without condition dropout.*CFG\(1\.0\).*Label, WeakerNetwork",
        ),
        ({}, CFG(2.0, Label(5)), [0], "label 5.*2 classes"),
        ({}, ComposedConditions((2,), (1.0,)), [0], "label 2.*2 classes"),
        ({}, AutoGuidance(2.0, "runs/weak"), [0], r"names the run 'runs/weak'.*denoiser\(\)"),
        ({}, AutoGuidance(2.0, Pair()), [0], r"shapes \(2,\) and \(1,\)"),
        ({}, AutoGuidance(2.0, weak_of(process(classes=3))), [0], "2 and 3 classes"),
        (
            {},
            GFCG(lambda x0, level: x0, 2.0, "runs/weak"),
            [0],
            r"names the run 'runs/weak'.*denoiser\(\)",
        ),
        ({}, GFCG(lambda x0, level: x0, 2.0, Pair()), [0], r"GFCG.*shapes \(2,\) and \(1,\)"),
    ],
)
def test_a_reference_that_the_network_lacks_is_refused_before_the_first_call(
    fields, rule, condition, message
):
    record = process(**fields)
    network = ExactNetwork(mixture(record), record)
    with pytest.raises(ValueError, match=message) as caught:
        sample(Denoiser(network, record), steps=3, seeds=[1], condition=condition, guidance=rule)
    assert network.calls == []
    assert "\n" not in str(caught.value)


def test_an_interval_that_no_step_reaches_needs_no_reference():
    record = process(dropout=0.0)
    rule = Interval(CFG(3.0), sigma=(1e-9, 1e-8))
    knots = Trailing().knots(record.schedule, 4)
    _, used = integrate(mixture(record), AlphaBlending(1), X, knots, NOISE, rule, LABELS)
    assert used == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Label(-1), "label is -1"),
        (lambda: AutoGuidance(2.0), "weaker is missing"),
        (lambda: AutoGuidance(-2.0, ORACLE), "scale is -2.0"),
        (lambda: ComposedConditions((), ()), "labels are"),
        (lambda: ComposedConditions((1, 0), (1.0,)), "one weight for each"),
        (lambda: ComposedConditions((1,), (float("nan"),)), "finite"),
        (lambda: ComposedConditions((1,), (1.0,), -1.0), "scale is -1.0"),
        (lambda: Sum((CFG(2.0),)), "two or more"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(2.0, 3), r"reference is 3, expected a reference such as .*Label\(3\)"),
        (lambda: CFG(2.0, Label), "reference is <class"),
        (lambda: ComposedConditions((1,), (1.0,), 2.0, 3), "reference is 3"),
        (lambda: CFGPlusPlus(0.5, 3), "reference is 3"),
        (lambda: Interval(APG, low=0.1), "rule is <class"),
        (lambda: Rescale(3.0), r"rule is 3.0, expected a guidance rule such as CFG\(2.0\)"),
        (lambda: Sum((CFG(2.0), 3.0)), "rule is 3.0"),
    ],
)
def test_other_objects_in_place_of_a_rule_or_a_reference_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


class DropoutNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, time, class_labels=None):
        return self.dropout(x)


@pytest.mark.parametrize(
    "rule",
    (
        lambda weak: AutoGuidance(2.0, weak),
        lambda weak: Sum((CFG(2.0), Rescale(CFG(3.0, WeakerNetwork(weak))))),
    ),
)
def test_a_weaker_network_is_evaluated_without_dropout_and_returns_to_training(rule):
    weak = Denoiser(DropoutNetwork(), RECORD)
    assert weak.training
    assert list(find_networks(rule(weak))) == [weak]
    torch.manual_seed(0)
    made = [
        sample(ORACLE, steps=3, seeds=[1, 2], condition=[0, 1], guidance=rule(weak)).x
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert weak.training
    assert weak.network.dropout.training


def test_run_folders_are_loaded_at_any_depth_of_a_rule():
    rule = Interval(
        Sum((AutoGuidance(2.0, "weak"), APG(3.0, WeakerNetwork("other")), CFG(2.0))),
        sigma=(0.1, 1.0),
    )
    folders = []

    def load(folder):
        folders.append(folder)
        return ORACLE

    ready = load_weaker_networks(rule, load)
    expected = Interval(
        Sum((AutoGuidance(2.0, ORACLE), APG(3.0, WeakerNetwork(ORACLE)), CFG(2.0))),
        sigma=(0.1, 1.0),
    )
    assert ready == expected
    assert folders == ["weak", "other"]
    assert load_weaker_networks(CFG(2.0), load) == CFG(2.0)
    assert list(find_networks(rule)) == []
    assert list(find_networks(ready)) == [ORACLE, ORACLE]
    assert list(find_networks(GFCG(len, 2.0, ORACLE))) == [ORACLE]
    assert "weak" in repr(rule)
    assert "GaussianMixture" in repr(ready)


def test_a_weaker_network_is_not_evaluated_beyond_the_levels_of_its_training():
    """Its time is that of one end for all levels beyond it."""
    weaker = mixture(process(Truncated(Laplace(), -4.0, 4.0)))
    arguments = {"steps": 12, "seeds": [1], "condition": [1]}
    with pytest.raises(ValueError, match=r"weaker network, a knot is at λ = .* from λ = -4 to 4"):
        sample(ORACLE, guidance=AutoGuidance(2.0, weaker), **arguments)
    within = Interval(AutoGuidance(2.0, weaker), math.exp(-1.9), math.exp(1.9))
    assert sample(ORACLE, guidance=within, **arguments).x.isfinite().all()
