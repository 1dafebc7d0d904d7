"""Rules with samplers that were written apart from them: several evaluations a step, memory, noise, jumps, corrections."""

import math
from itertools import groupby, pairwise

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.editing.inpainting import RePaint
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AutoGuidance,
    CFGPlusPlus,
    ClassifierGuidance,
    Interval,
    Label,
    Step,
    Sum,
)
from diffcore.samplers import (
    DDIM,
    DDPM,
    AdamsBashforth,
    AdaptiveRungeKutta,
    AlphaBlending,
    DPMSolverPP,
    DPMSolverSDE,
    Euler,
    EulerAncestral,
    GradientEstimation,
    Heun,
    PredictorCorrector,
    Restart,
    UniPC,
)
from diffcore.sampling.generation import sample, with_levels
from diffcore.sampling.loop import check_guidance, integrate, watch
from diffcore.schedules import Cosine, Karras, Trailing, UniformLogSNR
from tests.guidance.test_rules import ORACLE, WEAKER, classifier
from tests.helpers.oracles import mixture, process

IMAGE, MASK = torch.tensor([0.5, -0.5]), torch.tensor([True, False])
ADAPTIVE = AdaptiveRungeKutta("BogackiShampine", 0.1, 0.1)
CORRECTOR = PredictorCorrector(guides="corrector")
SAMPLERS = {
    "DDIM": DDIM(1.0),
    "Euler with churn": Euler(churn=2.0),
    "Heun": Heun(),
    "Heun with churn": Heun(churn=3.0),
    "AlphaBlending": AlphaBlending(2, 1.0),
    "DPM-Solver++ 2S": DPMSolverPP("2S"),
    "DPM-Solver++ 3M": DPMSolverPP("3M"),
    "AdamsBashforth": AdamsBashforth.lms(3),
    "UniPC": UniPC(2),
    "GradientEstimation": GradientEstimation(2.0, 0.5),
    "DPM-Solver SDE": DPMSolverSDE(3),
    "Restart": Restart(Heun()),
    "PredictorCorrector": PredictorCorrector(Heun(), 2),
    "PredictorCorrector, guided corrector": CORRECTOR,
    "Restart of a corrector": Restart(PredictorCorrector()),
    "RePaint": RePaint(Heun(), IMAGE, MASK, 2, 2),
    "RePaint of a guided corrector": RePaint(CORRECTOR, IMAGE, MASK, 2, 2),
    "AdaptiveRungeKutta": ADAPTIVE,
    "Restart, adaptive": Restart(ADAPTIVE),
    "RePaint, adaptive": RePaint(ADAPTIVE, IMAGE, MASK, 2, 2),
    "PredictorCorrector, adaptive": PredictorCorrector(ADAPTIVE),
}
BOUNDS = (0.19, 1.61)
RULES = {
    "CFG": CFG(3.0),
    "Interval(CFG)": Interval(CFG(3.0), sigma=BOUNDS),
    "AutoGuidance": AutoGuidance(2.0, WEAKER),
    "GFCG": GFCG(classifier, 3.0),
    "Interval(GFCG)": Interval(GFCG(classifier, 3.0), sigma=BOUNDS),
    "Sum": Sum((APG(2.0), Interval(APG(2.0, Label(1)), sigma=BOUNDS))),
    "ClassifierGuidance": ClassifierGuidance(classifier),
}
LABELS = torch.tensor([0, 1, 1])
NOISE = Noise(torch.arange(3), (2,), dtype=torch.float64)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_sampler
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_evaluations_used_are_those_planned_whatever_the_sampler(sampler, rule):
    made = sample(
        ORACLE,
        sampler,
        Karras(),
        6,
        seeds=[1, 2],
        condition=[0, 1],
        guidance=rule,
        batch_size=2,
        dtype=torch.float64,
    )
    assert made.planned == (None if sampler.adaptive else made.evaluations)
    assert made.x.isfinite().all()


def visited(sampler, rule, knots):
    return list(
        watch(ORACLE, sampler, NOISE.first_sample(knots[0], 0.5), knots, NOISE, rule, LABELS)
    )


@every_sampler
def test_an_interval_decides_once_a_step_by_what_was_asked_first(sampler):
    """Each step's evaluations are of one mode, also where churn raised the level, and between the knots of a restart."""
    rule = Interval(CFG(3.0), sigma=BOUNDS)
    knots = with_levels(Karras().knots(ORACLE.process.schedule, 6), rule.levels(ORACLE.process))
    modes = []
    for _, group in groupby(visited(sampler, rule, knots), key=lambda seen: seen.step.index):
        seen = list(group)
        first = seen[0].step.level.ratio
        inside = BOUNDS[0] * (1 + 1e-9) < first <= BOUNDS[1] * (1 + 1e-9)
        unguided = {False} if "guides='corrector'" in repr(sampler) else set()
        assert {bool(at.references) for at in seen} <= {inside} | unguided
        modes.append(inside)
    assert {True, False} == set(modes)


def test_momentum_goes_from_evaluation_to_evaluation_within_a_step_and_across_steps():
    """Heun with APG, by hand."""
    w, beta = 3.0, -0.5
    knots = UniformLogSNR(-4.0, 4.0).knots(ORACLE.process.schedule, 4)
    average = torch.zeros(3, 2, dtype=torch.float64)

    def asked(x, level):
        nonlocal average
        conditional, reference = ORACLE(x, level, LABELS), ORACLE(x, level)
        average = conditional.x0 - reference.x0 + beta * average
        share = (average * conditional.x0).sum(1, keepdim=True) / conditional.x0.square().sum(
            1, keepdim=True
        )
        x0 = conditional.x0 + (w - 1) * (average - share * conditional.x0)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    start = x = NOISE.first_sample(knots[0], 0.5)
    for t, s in pairwise(knots):
        first = asked(x, t)
        if s.sigma == 0:
            x = first.at(s)
            continue
        second = asked(first.at(s), s)
        x = s.alpha * (x / t.alpha + (s.ratio - t.ratio) * (first.eps + second.eps) / 2)
    ours, _ = integrate(ORACLE, Heun(), start, knots, NOISE, APG(w, momentum=beta), LABELS)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_what_is_watched_is_what_a_run_sees():
    """A guided corrector's predictor is asked without references there too, and x goes the same way."""
    knots, rule = Karras().knots(ORACLE.process.schedule, 5), APG(3.0)
    seen = visited(CORRECTOR, rule, knots)
    assert [len(at.references) for at in seen] == [0, *[1, 0] * 4]
    places = []
    integrate(
        ORACLE,
        CORRECTOR,
        NOISE.first_sample(knots[0], 0.5),
        knots,
        NOISE,
        rule,
        LABELS,
        callback=lambda i, state, prediction: places.append(state.x),
    )
    assert all(torch.equal(at.x, x) for at, x in zip(seen, places, strict=True))


DIRECT = [
    DDIM(),
    DDIM(1.0),
    DDPM(0.5),
    EulerAncestral(),
    Euler(),
    Euler(churn=2.0),
    AlphaBlending(1),
    AlphaBlending(1, 1.0),
]
DIRECT += [
    DPMSolverPP("1"),
    DPMSolverSDE(1, eta=0.5),
    AdamsBashforth(1),
    GradientEstimation(1.0, 0.5),
    Restart(DDIM()),
]
DIRECT += [
    PredictorCorrector(EulerAncestral(), corrections=0),
    RePaint(DDIM(1.0), IMAGE, MASK, 2, 2),
]
OTHERS = [
    Heun(),
    UniPC(1),
    AlphaBlending(2),
    DPMSolverPP("2M"),
    GradientEstimation(),
    GradientEstimation(1.5),
]
OTHERS += [
    PredictorCorrector(),
    PredictorCorrector(snr=0.1),
    CORRECTOR,
    Restart(),
    Restart(PredictorCorrector()),
]
OTHERS += [
    RePaint(Heun(), IMAGE, MASK, 2, 2),
    RePaint(GradientEstimation(), IMAGE, MASK, 2, 2),
    ADAPTIVE,
]
KNOTS = Karras(0.01, 20.0).knots(Cosine(), 5)


@pytest.mark.parametrize("sampler", DIRECT, ids=str)
def test_a_direct_sampler_reads_x0_and_eps_of_its_last_prediction_alone(sampler):
    """So it takes a pair that breaks x = α x_0 + σ ε for what it says: neither x nor an earlier prediction enters."""
    results = []
    for shift in (0.0, 1.0):
        state = sampler.start(NOISE.start() + shift, KNOTS, NOISE)
        while not state.done:
            now = shift if len(state.left) > 1 else 0.0
            before, state = state, sampler.advance(state, _pair(state, now), NOISE)
        results.append(sampler.advance(before, _pair(before, 0.0), NOISE).x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def _pair(state, shift):
    """An x_0 and an ε that have nothing to do with x."""
    return Prediction(torch.full_like(state.x, 0.3 + shift), torch.full_like(state.x, -0.7 - shift))


@pytest.mark.parametrize("sampler", DIRECT, ids=str)
def test_cfg_plus_plus_goes_with_first_order_steps(sampler):
    check_guidance(ORACLE.process, KNOTS, [0], CFGPlusPlus(), sampler)


@pytest.mark.parametrize("sampler", OTHERS, ids=str)
def test_cfg_plus_plus_is_refused_where_a_step_counts_on_its_pair(sampler):
    """GradientEstimation extrapolates ε for a fixed y - u ε; a correction would move x at no noise at all."""
    with pytest.raises(ValueError, match=r"breaks x = α x_0 \+ σ ε.*DDIM"):
        check_guidance(ORACLE.process, KNOTS, [0], CFGPlusPlus(), sampler)


def test_why_a_correction_cannot_take_cfg_plus_plus():
    """At a vanishing step Langevin's leaves x where it is, if x = α x_0 + σ ε."""
    state = PredictorCorrector(snr=1e-6).start(NOISE.first_sample(KNOTS[1], 0.5), KNOTS[1:], NOISE)
    for rule, still in ((CFG(2.0), True), (CFGPlusPlus(0.6), False)):
        (seen, *_) = visited(DDIM(), rule, KNOTS[1:])
        prediction, _ = rule.combine(seen, None)
        moved = (
            (PredictorCorrector(snr=1e-6)._corrected(state, prediction, NOISE) - state.x)
            .abs()
            .max()
        )
        assert (moved < 1e-4) == still


def test_a_weaker_network_that_cannot_be_asked_at_a_knot_is_refused_before_the_first_step():
    weaker = mixture(process(prediction="epsilon"))
    with pytest.raises(ValueError, match="for the weaker network, a knot is pure noise"):
        sample(
            ORACLE,
            DDIM(),
            Trailing(),
            4,
            seeds=[1],
            condition=[0],
            guidance=AutoGuidance(2.0, weaker),
        )
    confused = GFCG(classifier, 3.0, weaker)
    (asked,) = confused.required_references(
        Step(ORACLE.process, Cosine().level(1.0), KNOTS[0], KNOTS[1], 1, 4), None
    )
    with pytest.raises(ValueError, match="for the weaker network"):
        asked.check_level(Cosine().level(1.0))
    for rule in (Interval(AutoGuidance(2.0, weaker), sigma=BOUNDS), confused):  # not asked there
        sample(ORACLE, DDIM(), Trailing(), 4, seeds=[1], condition=[0], guidance=rule)


def test_gfcg_begins_with_the_conditional_model_where_it_comes_in_late():
    """Within an interval: the first evaluation inside is the conditional one, the second is guided."""
    rule = Interval(GFCG(classifier, 3.0), sigma=BOUNDS)
    knots = with_levels(Karras().knots(ORACLE.process.schedule, 8), rule.levels(ORACLE.process))
    memory, changed = None, []
    for seen in visited(DDIM(), rule, knots):
        answer, memory = rule.combine(seen, memory)
        changed.append(not torch.equal(answer.x0, seen.conditional.x0))
    inside = [BOUNDS[0] * (1 + 1e-9) < knot.ratio <= BOUNDS[1] * (1 + 1e-9) for knot in knots[:-1]]
    first = inside.index(True)
    assert changed == [now and i != first for i, now in enumerate(inside)]
    assert sum(changed) >= 2
    assert math.isclose(knots[first].ratio, BOUNDS[1])
