"""Rules with samplers: several evaluations in a step, memory, noise, jumps, corrections."""

import math
from itertools import groupby, pairwise

import pytest
import torch

from diffcore.core.denoiser import Denoiser, DenoiserWrapper
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
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import check_guidance, integrate, watch
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Cosine, Karras, Trailing, UniformLogSNR
from tests.helpers.guidance_rules import ORACLE, WEAKER, classifier
from tests.helpers.oracles import mixture, process
from tests.helpers.products import sampled
from tests.helpers.recording_network import RecordingNetwork

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


@pytest.mark.parametrize(
    ("sampler_name", "rule_name"), sampled(sorted(SAMPLERS), sorted(RULES), count=42)
)
def test_evaluations_used_are_those_planned_with_each_sampler(sampler_name, rule_name):
    sampler, rule = SAMPLERS[sampler_name], RULES[rule_name]
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
    assert made.planned == (None if sampler.is_adaptive else made.evaluations)
    assert made.x.isfinite().all()


def visited(sampler, rule, knots):
    return list(
        watch(ORACLE, sampler, NOISE.first_sample(knots[0], 0.5), knots, NOISE, rule, LABELS)
    )


@every_sampler
def test_an_interval_decides_once_a_step_by_the_first_evaluation(sampler):
    """All evaluations of a step are in one mode, also after churn and in the steps of a restart."""
    rule = Interval(CFG(3.0), sigma=BOUNDS)
    knots = insert_levels(Karras().knots(ORACLE.process.schedule, 6), rule.levels(ORACLE.process))
    modes = []
    for _, group in groupby(visited(sampler, rule, knots), key=lambda inputs: inputs.step.index):
        inputs = list(group)
        first = inputs[0].step.level.ratio
        inside = BOUNDS[0] * (1 + 1e-9) < first <= BOUNDS[1] * (1 + 1e-9)
        unguided = {False} if "guides='corrector'" in repr(sampler) else set()
        assert {bool(evaluation.references) for evaluation in inputs} <= {inside} | unguided
        modes.append(inside)
    assert {True, False} == set(modes)


def test_momentum_goes_from_evaluation_to_evaluation_within_a_step_and_across_steps():
    """Heun with APG, by hand."""
    w, beta = 3.0, -0.5
    knots = UniformLogSNR(-4.0, 4.0).knots(ORACLE.process.schedule, 4)
    average = torch.zeros(3, 2, dtype=torch.float64)

    def guided(x, level):
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
        first = guided(x, t)
        if s.sigma == 0:
            x = first.at(s)
            continue
        second = guided(first.at(s), s)
        x = s.alpha * (x / t.alpha + (s.ratio - t.ratio) * (first.eps + second.eps) / 2)
    ours, _ = integrate(ORACLE, Heun(), start, knots, NOISE, APG(w, momentum=beta), LABELS)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_watch_yields_the_inputs_of_a_run():
    """The predictor of a guided corrector has no references in either, and x is the same."""
    knots, rule = Karras().knots(ORACLE.process.schedule, 5), APG(3.0)
    inputs = visited(CORRECTOR, rule, knots)
    assert [len(evaluation.references) for evaluation in inputs] == [0, *[1, 0] * 4]
    xs = []
    integrate(
        ORACLE,
        CORRECTOR,
        NOISE.first_sample(knots[0], 0.5),
        knots,
        NOISE,
        rule,
        LABELS,
        callback=lambda i, state, prediction: xs.append(state.x),
    )
    assert all(torch.equal(evaluation.x, x) for evaluation, x in zip(inputs, xs, strict=True))


DIRECT_SAMPLERS = [
    DDIM(),
    DDIM(1.0),
    DDPM(0.5),
    EulerAncestral(),
    Euler(),
    Euler(churn=2.0),
    AlphaBlending(1),
    AlphaBlending(1, 1.0),
]
DIRECT_SAMPLERS += [
    DPMSolverPP("1"),
    DPMSolverSDE(1, eta=0.5),
    AdamsBashforth(1),
    GradientEstimation(1.0, 0.5),
    Restart(DDIM()),
]
DIRECT_SAMPLERS += [
    PredictorCorrector(EulerAncestral(), corrections=0),
    RePaint(DDIM(1.0), IMAGE, MASK, 2, 2),
]
OTHER_SAMPLERS = [
    Heun(),
    UniPC(1),
    AlphaBlending(2),
    DPMSolverPP("2M"),
    GradientEstimation(),
    GradientEstimation(1.5),
]
OTHER_SAMPLERS += [
    PredictorCorrector(),
    PredictorCorrector(snr=0.1),
    CORRECTOR,
    Restart(),
    Restart(PredictorCorrector()),
]
OTHER_SAMPLERS += [
    RePaint(Heun(), IMAGE, MASK, 2, 2),
    RePaint(GradientEstimation(), IMAGE, MASK, 2, 2),
    ADAPTIVE,
]
KNOTS = Karras(0.01, 20.0).knots(Cosine(), 5)


@pytest.mark.parametrize("sampler", DIRECT_SAMPLERS, ids=str)
def test_a_direct_sampler_reads_x0_and_eps_of_its_last_prediction_alone(sampler):
    """Neither x nor an earlier prediction enters, so the pair may break x = α x_0 + σ ε."""
    results = []
    for shift in (0.0, 1.0):
        state = sampler.start(NOISE.start() + shift, KNOTS, NOISE)
        while not state.done:
            now = shift if len(state.remaining) > 1 else 0.0
            before, state = state, sampler.advance(state, _pair(state, now), NOISE)
        results.append(sampler.advance(before, _pair(before, 0.0), NOISE).x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def _pair(state, shift):
    """An x_0 and an ε that do not depend on x."""
    return Prediction(torch.full_like(state.x, 0.3 + shift), torch.full_like(state.x, -0.7 - shift))


@pytest.mark.parametrize("sampler", DIRECT_SAMPLERS, ids=str)
def test_cfg_plus_plus_goes_with_first_order_steps(sampler):
    check_guidance(ORACLE.process, KNOTS, [0], CFGPlusPlus(), sampler)


@pytest.mark.parametrize("sampler", OTHER_SAMPLERS, ids=str)
def test_cfg_plus_plus_is_refused_by_samplers_that_need_a_consistent_pair(sampler):
    """GradientEstimation extrapolates ε at fixed y - u ε; a correction of any size moves x."""
    with pytest.raises(ValueError, match=r"breaks x = α x_0 \+ σ ε.*DDIM"):
        check_guidance(ORACLE.process, KNOTS, [0], CFGPlusPlus(), sampler)


def test_a_vanishing_correction_moves_x_under_cfg_plus_plus():
    """Langevin's step leaves x unchanged as it shrinks only if x = α x_0 + σ ε."""
    state = PredictorCorrector(snr=1e-6).start(NOISE.first_sample(KNOTS[1], 0.5), KNOTS[1:], NOISE)
    for rule, still in ((CFG(2.0), True), (CFGPlusPlus(0.6), False)):
        (inputs, *_) = visited(DDIM(), rule, KNOTS[1:])
        prediction, _ = rule.combine(inputs, None)
        change = (
            (PredictorCorrector(snr=1e-6)._correct(state, prediction, NOISE).x - state.x)
            .abs()
            .max()
        )
        assert (change < 1e-4) == still


def test_a_weaker_network_that_cannot_be_evaluated_at_a_knot_is_refused_before_the_first_step():
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
    (reference,) = confused.required_references(
        Step(ORACLE.process, Cosine().level(1.0), KNOTS[0], KNOTS[1], 1, 4), None
    )
    with pytest.raises(ValueError, match="for the weaker network"):
        reference.check_level(Cosine().level(1.0))
    # Neither rule evaluates the weaker network at pure noise.
    for rule in (Interval(AutoGuidance(2.0, weaker), sigma=BOUNDS), confused):
        sample(ORACLE, DDIM(), Trailing(), 4, seeds=[1], condition=[0], guidance=rule)


def test_gfcg_in_an_interval_begins_with_the_conditional_model():
    """Its first evaluation inside is the conditional model, its second is guided."""
    rule = Interval(GFCG(classifier, 3.0), sigma=BOUNDS)
    knots = insert_levels(Karras().knots(ORACLE.process.schedule, 8), rule.levels(ORACLE.process))
    memory, changed = None, []
    for inputs in visited(DDIM(), rule, knots):
        guided, memory = rule.combine(inputs, memory)
        changed.append(not torch.equal(guided.x0, inputs.conditional.x0))
    inside = [BOUNDS[0] * (1 + 1e-9) < knot.ratio <= BOUNDS[1] * (1 + 1e-9) for knot in knots[:-1]]
    first = inside.index(True)
    assert changed == [now and i != first for i, now in enumerate(inside)]
    assert sum(changed) >= 2
    assert math.isclose(knots[first].ratio, BOUNDS[1])


class Wrapped(DenoiserWrapper):
    """A denoiser that evaluates its inner one."""

    def __call__(self, x, level, condition=None):
        return self.inner(x, level, condition)


@pytest.mark.parametrize("wrap", (lambda denoiser: denoiser, Wrapped))
def test_watch_evaluates_the_network_without_dropout_and_restores_its_mode(wrap):
    network = RecordingNetwork()
    denoiser = wrap(Denoiser(network, process()).train())
    knots = Trailing().knots(denoiser.process.schedule, 3)
    start = NOISE.first_sample(knots[0], 0.5)
    for _ in watch(denoiser, DDIM(), start, knots, NOISE, CFG(2.0), LABELS):
        assert network.training
    assert network.modes == {False}
