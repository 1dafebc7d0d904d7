"""What holds for every rule, and for every pair of one rule around another."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    AutoGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    ComposedConditions,
    CosineScale,
    Guidance,
    GuidanceInput,
    Interval,
    Label,
    LinearAG,
    MinorityGuidance,
    Rescale,
    Step,
    Sum,
)
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, planned, watch
from diffcore.schedules import Cosine, Explicit, Trailing, UniformLogSNR
from tests.helpers.oracles import (
    COVARIANCES,
    KINDS,
    MEANS,
    ExactNetwork,
    GaussianMixture,
    mixture,
    process,
)

SEEDS, LABELS, STEPS = (3, 1, 4, 15, 9), torch.tensor([0, 1, 1, 0, 1]), 6
GRID = UniformLogSNR(-5.0, 5.0)
RECORD = process()
ORACLE = mixture(RECORD)
WEAKER = GaussianMixture(MEANS, 2 * COVARIANCES, labels=ORACLE.labels, process=RECORD)


def classifier(x, level):
    """The exact one of noisy x: ln p(x | y) + ln p(y)."""
    each = [ORACLE.log_density(x, level, torch.full((len(x),), y)) + math.log(0.5) for y in (0, 1)]
    return torch.stack(each, 1)


LEAVES = {
    "CFG": CFG(3.0),
    "CFG by λ": CFG(CosineScale(1.0, 4.0)),
    "CFG of a function": CFG(lambda logsnr: 2.0 + math.tanh(logsnr)),
    "CFG from a negative": CFG(2.0, Label(0)),
    "APG": APG(4.0, momentum=-0.5, threshold=1.0),
    "AutoGuidance": AutoGuidance(2.0, WEAKER),
    "CFGPlusPlus": CFGPlusPlus(0.6),
    "CFGZeroStar": CFGZeroStar(3.0),
    "ClassifierGuidance": ClassifierGuidance(classifier, 2.0, marginal=0.8),
    "MinorityGuidance": MinorityGuidance(classifier, 1.0, label=1),
    "GFCG": GFCG(classifier, 3.0),
    "ComposedConditions": ComposedConditions((1,), (-0.5,), 2.0),
    "Sum": Sum((CFG(2.0), APG(2.0, Label(1)), Interval(CFG(2.0), sigma=(0.5, 2.0)))),
}
COEFFICIENTS = ((), (), (0.1, 0.7, 0.2, 0.1), (), (0.0, 0.9), ())
WRAPPED = {
    "Interval": Interval(APG(4.0), sigma=(0.3, 2.0)),
    "Rescale": Rescale(CFG(5.0), space="v_prediction"),
    "AdaptiveGuidance": AdaptiveGuidance(APG(4.0), threshold=0.9),
    "LinearAG": LinearAG(CFG(3.0), COEFFICIENTS),
}
RULES = LEAVES | WRAPPED
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def draw(rule, denoiser=ORACLE, seeds=SEEDS, labels=LABELS, sampler=DDIM(), **arguments):
    return sample(
        denoiser,
        sampler,
        arguments.pop("grid", GRID),
        STEPS,
        seeds=seeds,
        condition=labels,
        guidance=rule,
        batch_size=len(seeds),
        dtype=arguments.pop("dtype", torch.float64),
        **arguments,
    )


def knots_for(rule):
    return draw(rule).knots


@every_rule
def test_rows_do_not_depend_on_each_other(rule):
    """AdaptiveGuidance stops each row by its own cosine."""
    together = draw(rule).x
    for i, (seed, label) in enumerate(zip(SEEDS, LABELS, strict=True)):
        torch.testing.assert_close(
            draw(rule, seeds=[seed], labels=label[None]).x[0], together[i], rtol=0, atol=1e-11
        )


def path(rule, seed):
    """What the rule sees in a run of one seed."""
    knots, noise = knots_for(rule), Noise(torch.tensor([seed]), (2,), dtype=torch.float64)
    return watch(
        ORACLE, DDIM(), noise.first_sample(knots[0], 0.5), knots, noise, rule, torch.tensor([1])
    )


@every_rule
def test_runs_do_not_leak_into_each_other(rule):
    """Two runs of one rule, step by step in turn, are the two runs alone."""
    together = list(zip(path(rule, 7), path(rule, 8), strict=True))
    for own, seed in enumerate((7, 8)):
        alone = list(path(rule, seed))
        assert all(
            torch.equal(seen[own].x, other.x) for seen, other in zip(together, alone, strict=True)
        )


@every_rule
@pytest.mark.parametrize("scaling", ("vp", "ve", "flow"))
def test_a_consistent_rule_keeps_x_in_x0_and_eps(rule, scaling):
    oracle = mixture(process(Cosine(scaling=scaling)))
    knots = GRID.knots(oracle.process.schedule, STEPS)
    noise = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64)
    path = watch(oracle, DDIM(), 3 * noise.start(), knots, noise, rule, LABELS)
    memory, broken = None, 0.0
    for seen in path:
        answer, memory = rule.combine(seen, memory)
        broken = max(broken, (answer.at(seen.step.level) - seen.x).abs().max().item())
    assert (broken < 1e-9) == rule.is_consistent


@every_rule
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_does_not_depend_on_what_the_network_outputs(rule, kind):
    """Each acts in its own space, computed from (x_0, ε)."""
    record = process(prediction=kind)
    network = Denoiser(ExactNetwork(mixture(record), record), record)
    torch.testing.assert_close(draw(rule, network).x, draw(rule).x, rtol=0, atol=1e-8)


@every_rule
def test_the_evaluations_used_are_those_planned(rule):
    record = process()
    network = ExactNetwork(mixture(record), record)
    made = draw(rule, Denoiser(network, record))
    own = sum(len(x) for x, _, _ in network.calls) / len(SEEDS)
    elsewhere = STEPS if isinstance(rule, AutoGuidance) else 0  # its reference is another network
    assert made.evaluations == own + elsewhere
    assert made.evaluations == made.planned or isinstance(rule, AdaptiveGuidance)
    assert STEPS <= made.evaluations <= made.planned


class NoSync(TorchDispatchMode):
    """Raises where a tensor is asked for its value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} asks the device for a value")
        return func(*args, **(kwargs or {}))


@every_rule
def test_c7_a_rule_asks_no_tensor_for_its_value(rule):
    """AdaptiveGuidance decides from data, and is exempt by name."""
    seen_before, memory = list(path(rule, 5)), None
    with NoSync(), torch.no_grad():
        for seen in seen_before:
            if not isinstance(rule, AdaptiveGuidance):
                rule.required_references(seen.step, memory)
            _, memory = rule.combine(seen, memory)


@every_rule
@pytest.mark.parametrize("rows", (1, 3, 20))
def test_calls_of_any_number_of_rows_give_the_same_samples(rule, rows):
    record = process()
    network = ExactNetwork(mixture(record), record)
    made = draw(rule, Denoiser(network, record), rows=rows)
    torch.testing.assert_close(made.x, draw(rule).x, rtol=0, atol=1e-8)
    assert {len(x) for x, _, _ in network.calls} == {rows}


@every_rule
def test_a_rule_works_from_pure_noise_in_single_precision(rule):
    x = sample(
        ORACLE,
        DDIM(),
        Trailing(),
        STEPS,
        seeds=SEEDS,
        condition=LABELS,
        guidance=rule,
        batch_size=5,
    ).x
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("name", sorted({*RULES} - {"CFG of a function", "GFCG", "AutoGuidance"}))
def test_a_rule_is_a_value_that_its_spec_rebuilds(name):
    rule = RULES[name]
    if "Guidance" in name and name != "AdaptiveGuidance":
        pytest.skip("a classifier is a function of the caller")
    assert from_spec(Holder, {"rule": to_spec(rule)}).rule == rule
    assert hash(rule) == hash(from_spec(Holder, {"rule": to_spec(rule)}).rule)


class Holder:
    def __init__(self, rule: Guidance) -> None:
        self.rule = rule


ONE = [CFG, APG, partial(CFGZeroStar, zero_init=0), lambda w: Interval(APG(w), sigma=(0.1, 9.0))]
ONE += [
    lambda w: Rescale(CFG(w)),
    lambda w: AdaptiveGuidance(CFG(w)),
    lambda w: AutoGuidance(w, WEAKER),
]
ONE += [lambda w: Sum((CFG(w), APG(w)))]
ONE += [lambda w: CFG(lambda logsnr: w), lambda w: CFG(w, Label(1)), lambda w: GFCG(classifier, w)]


@pytest.mark.parametrize("make", ONE)
def test_w_1_is_the_conditional_model_bit_for_bit_at_one_evaluation(make):
    record = process()
    network = ExactNetwork(mixture(record), record)
    made = draw(make(1.0), Denoiser(network, record), sampler=AlphaBlending(2))
    grid = Explicit(tuple(knot.logsnr for knot in made.knots))
    steps = len(made.knots) - 1
    plain = sample(
        ORACLE,
        AlphaBlending(2),
        grid,
        steps,
        seeds=SEEDS,
        condition=LABELS,
        batch_size=5,
        dtype=torch.float64,
    )
    assert made.evaluations == made.planned == len(network.calls) == 2 * steps
    torch.testing.assert_close(made.x, plain.x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", ONE)
def test_w_1_answers_with_the_conditional_prediction_itself(make):
    level = RECORD.schedule.at(0.2)
    step = Step(RECORD, level, level, level, 2, STEPS)
    conditional = ORACLE(torch.ones(5, 2), level, LABELS)
    answer, _ = make(1.0).combine(
        GuidanceInput(torch.ones(5, 2), step, conditional, (), LABELS), None
    )
    assert make(1.0).required_references(step, None) == ()
    assert torch.equal(answer.x0, conditional.x0)
    assert torch.equal(answer.eps, conditional.eps)


REFUSED = {
    ("Rescale", "Rescale"),
    ("Rescale", "CFGPlusPlus"),
    ("Rescale", "CFGZeroStar"),
    ("AdaptiveGuidance", "ClassifierGuidance"),
    ("AdaptiveGuidance", "MinorityGuidance"),
    ("AdaptiveGuidance", "ComposedConditions"),
    ("AdaptiveGuidance", "Sum"),
    ("AdaptiveGuidance", "AdaptiveGuidance"),
    ("LinearAG", "ClassifierGuidance"),
    ("LinearAG", "MinorityGuidance"),
    ("LinearAG", "GFCG"),
    ("LinearAG", "ComposedConditions"),
    ("LinearAG", "Sum"),
    ("LinearAG", "Interval"),
    ("LinearAG", "AdaptiveGuidance"),
    ("LinearAG", "LinearAG"),
    ("Interval", "LinearAG"),
    ("Sum", "CFGPlusPlus"),
    ("Sum", "CFGZeroStar"),
}
NEUTRAL = {  # wrappers that should change nothing
    "Interval": lambda rule: Interval(rule, low=0.0, high=math.inf),
    "Rescale": lambda rule: Rescale(rule, phi=0.0),
    "AdaptiveGuidance": lambda rule: AdaptiveGuidance(rule, threshold=1.0),
    "LinearAG": lambda rule: LinearAG(rule, ((),) * STEPS),
    "Sum": lambda rule: Sum((rule, CFG(1.0))),
}
PAIRS = [(outer, inner) for outer in NEUTRAL for inner in RULES]


def test_the_guide_says_of_every_pair_what_is_true():
    head, _, *rows = (
        row
        for row in Path("docs/guidance.md")
        .read_text()
        .split("| inside |")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    outers = [cell.strip(" `") for cell in head.split("|") if cell.strip()]
    said = {
        (outer, cells[0].strip(" `")): cell.strip()
        for cells in (row.strip("|").split("|") for row in rows)
        for outer, cell in zip(outers, cells[1:], strict=True)
    }
    names = {type(rule).__name__ for rule in RULES.values()}
    assert said == {
        (o, i): "refused" if (o, i) in REFUSED else "yes" for o in NEUTRAL for i in names
    }


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_every_pair_composes_or_is_refused_at_construction(outer, inner):
    """SamplerWrapper any rule, a wrapper with neutral settings is that rule; what has no meaning says so, with the remedy."""
    if (outer, inner) in REFUSED:
        with pytest.raises(ValueError, match=r"cannot hold .*use") as caught:
            NEUTRAL[outer](RULES[inner])
        assert "\n" not in str(caught.value)
        return
    rule = NEUTRAL[outer](RULES[inner])
    made, plain = draw(rule), draw(RULES[inner])
    torch.testing.assert_close(made.x, plain.x, rtol=0, atol=1e-10)
    assert made.planned == plain.planned
    assert rule.is_consistent == RULES[inner].is_consistent


def test_a_plan_counts_every_reference_of_every_evaluation():
    """Two evaluations a step by the midpoint rule, of which one step in (0.5, 2] asks twice, and so on."""
    knots = UniformLogSNR(-4.0, 4.0).knots(RECORD.schedule, 5)  # σ/α = 7.4, 2.7, 1, 0.37, 0.14, 0
    assert planned(RECORD, AlphaBlending(2), knots, Interval(CFG(2.0), sigma=(0.3, 3.0))) == 2 * (
        1 + 2 + 2 + 2 + 1
    )
    assert planned(RECORD, DDIM(), knots, ComposedConditions((0, 1), (1.0, 1.0))) == 5 * 4
    assert planned(RECORD, DDIM(), knots, GFCG(classifier)) == 1 + 4 * 2


def test_guided_needs_no_step_and_forgets_nothing_it_is_given():
    level, x = RECORD.schedule.at(0.0), torch.ones(5, 2, dtype=torch.float64)
    first, memory, asked = guided_prediction(
        ORACLE, APG(3.0, momentum=-0.5), x, level, LABELS, None
    )
    second, _, _ = guided_prediction(ORACLE, APG(3.0, momentum=-0.5), x, level, LABELS, memory)
    assert asked == 2
    assert not torch.equal(first.x0, second.x0)
