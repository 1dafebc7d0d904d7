"""Claims about every guidance rule, and about every pair of one rule around another."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import PredictionType
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    AutoGuidance,
    CFGZeroStar,
    ComposedConditions,
    Guidance,
    GuidanceInput,
    Interval,
    Label,
    Rescale,
    Step,
    Sum,
)
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import count_evaluations, guided_prediction, watch
from diffcore.schedules import Cosine, Explicit, Trailing, UniformLogSNR
from tests.helpers.guidance_rules import (
    GRID,
    LABELS,
    NEUTRAL,
    ORACLE,
    RECORD,
    REFUSED,
    RULES,
    SEEDS,
    STEPS,
    WEAKER,
    classifier,
    rule_classes,
)
from tests.helpers.oracles import SCALINGS, ExactNetwork, mixture, process
from tests.helpers.products import sampled

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
def test_samples_of_a_batch_do_not_depend_on_each_other(rule):
    together = draw(rule).x
    for i, (seed, label) in enumerate(zip(SEEDS, LABELS, strict=True)):
        torch.testing.assert_close(
            draw(rule, seeds=[seed], labels=label[None]).x[0], together[i], rtol=0, atol=1e-11
        )


def path(rule, seed):
    """The inputs of the rule at each evaluation of a run of one seed."""
    knots, noise = knots_for(rule), Noise(torch.tensor([seed]), (2,), dtype=torch.float64)
    return watch(
        ORACLE, DDIM(), noise.first_sample(knots[0], 0.5), knots, noise, rule, torch.tensor([1])
    )


@every_rule
def test_runs_do_not_leak_into_each_other(rule):
    """Two runs of one rule whose steps alternate give the same x as each run alone."""
    together = list(zip(path(rule, 7), path(rule, 8), strict=True))
    for i, seed in enumerate((7, 8)):
        alone = list(path(rule, seed))
        assert all(
            torch.equal(both[i].x, single.x) for both, single in zip(together, alone, strict=True)
        )


@pytest.mark.parametrize(("name", "scaling"), sampled(sorted(RULES), SCALINGS, count=24))
def test_a_consistent_rule_keeps_x_in_x0_and_eps(name, scaling):
    rule = RULES[name]
    oracle = mixture(process(Cosine(scaling=scaling)))
    knots = GRID.knots(oracle.process.schedule, STEPS)
    noise = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64)
    path = watch(oracle, DDIM(), 3 * noise.start(), knots, noise, rule, LABELS)
    memory, broken = None, 0.0
    for inputs in path:
        guided, memory = rule.combine(inputs, memory)
        broken = max(broken, (guided.at(inputs.step.level) - inputs.x).abs().max().item())
    assert (broken < 1e-9) == rule.is_consistent


@pytest.mark.parametrize(
    ("name", "prediction"), sampled(sorted(RULES), get_args(PredictionType), count=30)
)
def test_a_rule_does_not_depend_on_the_prediction_type(name, prediction):
    """Each rule acts in a space of its own, which is computed from (x_0, ε)."""
    rule = RULES[name]
    record = process(prediction=prediction)
    network = Denoiser(ExactNetwork(mixture(record), record), record)
    torch.testing.assert_close(draw(rule, network).x, draw(rule).x, rtol=0, atol=1e-8)


@every_rule
def test_the_evaluations_used_are_those_planned(rule):
    record = process()
    network = ExactNetwork(mixture(record), record)
    made = draw(rule, Denoiser(network, record))
    counted = sum(len(x) for x, _, _ in network.calls) / len(SEEDS)
    weaker = STEPS if isinstance(rule, AutoGuidance) else 0  # evaluations of the weaker network
    assert made.evaluations == counted + weaker
    assert made.evaluations == made.planned or isinstance(rule, AdaptiveGuidance)
    assert STEPS <= made.evaluations <= made.planned


class NoSynchronisation(TorchDispatchMode):
    """Raises an error if the host reads the value of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value from the device")
        return func(*args, **(kwargs or {}))


@every_rule
def test_a_rule_does_not_wait_for_the_device(rule):
    """AdaptiveGuidance decides from data, so its required references are exempt."""
    evaluations, memory = list(path(rule, 5)), None
    with NoSynchronisation(), torch.no_grad():
        for inputs in evaluations:
            if not isinstance(rule, AdaptiveGuidance):
                rule.required_references(inputs.step, memory)
            _, memory = rule.combine(inputs, memory)


@pytest.mark.parametrize(("name", "rows"), sampled(sorted(RULES), (1, 3, 20), count=24))
def test_calls_of_any_size_give_the_same_samples(name, rows):
    rule = RULES[name]
    record = process()
    network = ExactNetwork(mixture(record), record)
    made = draw(rule, Denoiser(network, record), micro_batch=rows)
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


CONDITIONAL_AT_1 = {  # rules of a scale w that are the conditional model at w = 1
    "CFG": CFG,
    "CFG by λ": lambda w: CFG(lambda logsnr: w),
    "CFG from a label": lambda w: CFG(w, Label(1)),
    "APG": APG,
    "AdaptiveGuidance": lambda w: AdaptiveGuidance(CFG(w)),
    "AutoGuidance": lambda w: AutoGuidance(w, WEAKER),
    "CFGZeroStar": partial(CFGZeroStar, zero_init=0),
    "GFCG": lambda w: GFCG(classifier, w),
    "Interval": lambda w: Interval(APG(w), sigma=(0.1, 9.0)),
    "Rescale": lambda w: Rescale(CFG(w)),
    "Sum": lambda w: Sum((CFG(w), APG(w))),
}
each_at_1 = pytest.mark.parametrize("make", CONDITIONAL_AT_1.values(), ids=CONDITIONAL_AT_1.keys())


@each_at_1
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


@each_at_1
def test_w_1_returns_the_conditional_prediction_itself(make):
    level = RECORD.schedule.at(0.2)
    step = Step(RECORD, level, level, level, 2, STEPS)
    conditional = ORACLE(torch.ones(5, 2), level, LABELS)
    answer, _ = make(1.0).combine(
        GuidanceInput(torch.ones(5, 2), step, conditional, (), LABELS), None
    )
    assert make(1.0).required_references(step, None) == ()
    assert torch.equal(answer.x0, conditional.x0)
    assert torch.equal(answer.eps, conditional.eps)


def test_the_table_of_pairs_in_the_guide_is_that_of_the_code():
    head, _, *lines = (
        row
        for row in Path("docs/guidance.md")
        .read_text()
        .split("| inside |")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    outers = [cell.strip(" `") for cell in head.split("|") if cell.strip()]
    documented = {
        (outer, cells[0].strip(" `")): cell.strip()
        for cells in (row.strip("|").split("|") for row in lines)
        for outer, cell in zip(outers, cells[1:], strict=True)
    }
    names = {type(rule).__name__ for rule in RULES.values()}
    assert documented == {
        (o, i): "refused" if (o, i) in REFUSED else "yes" for o in NEUTRAL for i in names
    }


def test_the_tables_have_every_rule_of_the_package():
    assert sorted({type(rule).__name__ for rule in RULES.values()}) == rule_classes()


@pytest.mark.parametrize(("outer", "inner"), sorted(REFUSED))
def test_a_pair_without_a_meaning_is_refused_with_the_remedy(outer, inner):
    with pytest.raises(ValueError, match=r"cannot hold .*use") as caught:
        NEUTRAL[outer](RULES[inner])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("outer", "inner"), sampled(sorted(NEUTRAL), sorted(RULES), count=40))
def test_a_wrapper_with_neutral_settings_gives_the_samples_of_its_rule(outer, inner):
    if (outer, inner) in REFUSED:
        return
    rule = NEUTRAL[outer](RULES[inner])
    made, plain = draw(rule), draw(RULES[inner])
    torch.testing.assert_close(made.x, plain.x, rtol=0, atol=1e-10)
    assert made.planned == plain.planned
    assert rule.is_consistent == RULES[inner].is_consistent


def test_a_plan_counts_every_reference_of_every_evaluation():
    """The midpoint rule evaluates twice in each step, and each evaluation may have references."""
    knots = UniformLogSNR(-4.0, 4.0).knots(RECORD.schedule, 5)  # σ/α = 7.4, 2.7, 1, 0.37, 0.14, 0
    assert count_evaluations(
        RECORD, AlphaBlending(2), knots, Interval(CFG(2.0), sigma=(0.3, 3.0))
    ) == 2 * (1 + 2 + 2 + 2 + 1)
    assert count_evaluations(RECORD, DDIM(), knots, ComposedConditions((0, 1), (1.0, 1.0))) == 5 * 4
    assert count_evaluations(RECORD, DDIM(), knots, GFCG(classifier)) == 1 + 4 * 2


def test_guided_prediction_needs_no_step_and_passes_the_memory_on():
    level, x = RECORD.schedule.at(0.0), torch.ones(5, 2, dtype=torch.float64)
    first, memory, evaluations = guided_prediction(
        ORACLE, APG(3.0, momentum=-0.5), x, level, LABELS, None
    )
    second, _, _ = guided_prediction(ORACLE, APG(3.0, momentum=-0.5), x, level, LABELS, memory)
    assert evaluations == 2
    assert not torch.equal(first.x0, second.x0)


@every_rule
def test_a_rule_that_depends_on_the_steps_is_one_whose_memory_or_step_number_matters(rule):
    """The same x and level with another memory and another number of the step."""
    changed, memory = not rule.is_consistent, None
    for inputs in path(rule, 7):
        step = inputs.step
        arguments = (ORACLE, rule, inputs.x, step.level, torch.tensor([0]))
        guided, memory, _ = guided_prediction(*arguments, memory, step)
        for index in (0, STEPS - 1):
            other = guided_prediction(*arguments, None, replace(step, index=index))[0]
            changed = changed or not torch.allclose(other.x0, guided.x0, rtol=0, atol=1e-9)
    assert changed == rule.depends_on_steps
