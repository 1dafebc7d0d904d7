"""The study of guidance: what is measured, counted, continued, averaged and drawn; and the pictures of the mixture."""

from functools import partial

import pytest
import torch
from experiments import guidance as guidance_study
from experiments import guidance_fields as fields
from experiments.guidance import (
    ADAPTIVE,
    CONDITIONAL,
    RULES,
    Pair,
    draw,
    measure,
    quality,
    references,
    savings,
    shared,
    study,
    table,
    trained,
    values,
)
from experiments.training import network, rows

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.guidance import CFG, AdaptiveGuidance, ClassifierGuidance, Step
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Karras
from diffcore.training.data import Digits

PROCESS = Process(Cosine(), shape=(1, 8, 8), sigma_data=0.75, classes=10, dropout=0.1)


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return Denoiser(network(), PROCESS).eval()


@pytest.mark.parametrize("name", RULES)
def test_at_w_1_every_rule_is_the_conditional_model(name, denoiser):
    level = PROCESS.schedule.at(0.0)
    assert (
        RULES[name](1.0, denoiser).required_references(Step(PROCESS, level, level, level), None)
        == ()
    )
    assert (
        RULES[name](2.0, denoiser).required_references(Step(PROCESS, level, level, level), None)
        != ()
    )


def test_real_scans_are_at_no_distance_and_are_recognised():
    digits = Digits("train")
    at_bounds = digits.x0.abs() == 1
    found = quality(
        digits.x0 * (1 + at_bounds), digits.labels
    )  # beyond the bounds, and clamped before they are compared
    assert found["train"] == pytest.approx(0, abs=1e-6)
    assert found["recognised"] > 0.99
    assert found["saturation"] == found["excess"] == pytest.approx(float(at_bounds.float().mean()))


def test_batches_share_the_evaluations_of_their_last_sample():
    asked = torch.tensor([1, 2, 3, 4, 0, 0])
    assert [shared(asked, size) for size in (1, 2, 4, 6)] == [10 / 6, 2.0, (4 * 4 + 2 * 0) / 6, 4.0]


@pytest.mark.parametrize("threshold", (0.2, 0.6, 1.0))
def test_references_are_those_that_sampling_asks_for(threshold, denoiser, monkeypatch):
    """What each sample alone would need, against runs of one sample a batch and of all together."""
    monkeypatch.setattr(guidance_study, "STEPS", 4)
    rule, seeds, labels = AdaptiveGuidance(CFG(3.0), threshold), [5, 6, 7], torch.tensor([1, 2, 3])
    asked = references(denoiser, rule, torch.tensor(seeds), labels)
    for size in (1, 3):
        made = sample(
            denoiser,
            DDIM(),
            grid=guidance_study.KNOTS,
            steps=4,
            seeds=seeds,
            condition=labels,
            guidance=rule,
            batch_size=size,
        )
        assert made.evaluations == pytest.approx(4 + shared(asked, size))


def test_a_measurement_counts_evaluations_by_batch(denoiser, monkeypatch):
    monkeypatch.setattr(guidance_study, "STEPS", 2)
    monkeypatch.setattr(guidance_study, "BATCHES", (1, 4))
    plain = measure(denoiser, CFG(2.0), 0, 4)
    assert plain["evaluations"] == {"1": 4.0, "4": 4.0}
    adaptive = measure(denoiser, AdaptiveGuidance(CFG(2.0), -0.99), 0, 4)
    assert adaptive["evaluations"] == {"1": 3.0, "4": 3.0}  # all agree at once
    assert adaptive["test"] > 0


def test_a_seed_gives_its_network_and_a_smaller_one_that_has_learned_less():
    pairs = [trained(0, points) for points in ((1, 2), (1, 2), (2, 2))]
    strong, weaker = zip(*pairs, strict=True)
    sizes = [
        sum(parameter.numel() for parameter in each.parameters()) for each in (strong[0], weaker[0])
    ]
    assert 2.5 < sizes[0] / sizes[1] < 3.5
    equal = [
        [all(map(torch.equal, a.parameters(), b.parameters())) for b in others[1:]]
        for a, others in ((strong[0], strong), (weaker[0], weaker))
    ]
    assert equal == [[True, True], [True, False]]


def test_a_study_continues_what_its_file_holds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(guidance_study, "trained", lambda seed: Pair(seed, None))
    monkeypatch.setattr(guidance_study, "RULES", {"CFG": lambda w, weaker: CFG(w)})
    monkeypatch.setattr(
        guidance_study, "measure", lambda *cell: asked.append(cell) or {"test": 1.0}
    )
    out = tmp_path / "guidance.jsonl"
    assert len(list(study(out, [0], (1.0, 2.0), 10))) == 2
    assert len(list(study(out, [0, 1], (1.0, 2.0, 3.0), 10))) == 4
    assert [(rule.scale, seed) for _, rule, seed, _ in asked] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert rows(out)[0] == {"rule": CONDITIONAL, "scale": 1.0, "seed": 0, "test": 1.0}


def made():
    """Two seeds of two scales; AdaptiveGuidance saves a quarter alone and nothing in company."""
    plain = {"train": 3.0, "recognised": 0.9, "saturation": 0.2, "excess": 0.01}
    cells = [(CONDITIONAL, 1.0), *((name, 2.0) for name in RULES)]
    for seed in (0, 1):
        for name, scale in cells:
            used = (
                {"1": 30.0, "10": 35.0, "100": 40.0}
                if name == ADAPTIVE
                else dict.fromkeys(("1", "10", "100"), 40.0)
            )
            yield {
                "rule": name,
                "scale": scale,
                "seed": seed,
                "test": 10.0 + seed,
                **plain,
                "evaluations": used,
            }


def test_tables_hold_means_over_seeds_and_the_conditional_model_for_every_rule():
    measured = list(made())
    lines = table(measured, "test").splitlines()
    assert lines[0] == "| rule | w = 1 | w = 2 |"
    assert lines[2:] == [f"| {name} | 10.5 ± 0.5 | 10.5 ± 0.5 |" for name in RULES]
    assert values(measured, ADAPTIVE, 2.0, "evaluations", 1) == [30.0, 30.0]
    line = "| 2 | 40 | 30.0 (-25%) | 35.0 (-12%) | 40.0 (-0%) | 10.5 ± 0.5 | 10.5 ± 0.5 |"
    assert savings(measured).splitlines()[2] == line


def test_what_is_not_measured_yet_is_left_out(tmp_path):
    measured = [row for row in made() if row["rule"] in (CONDITIONAL, "CFG")]
    assert table(measured, "test").splitlines()[2:4] == [
        "| CFG | 10.5 ± 0.5 | 10.5 ± 0.5 |",
        "| Rescale(CFG) | 10.5 ± 0.5 |  |",
    ]
    assert len(savings(measured).splitlines()) == 2
    draw(measured, tmp_path)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    draw(list(made()), tmp_path)
    monkeypatch.setattr(fields, "COUNT", 4)
    monkeypatch.setattr(fields, "STEPS", 3)
    monkeypatch.setattr(
        fields, "PANELS", {name: fields.PANELS[name] for name in list(fields.PANELS)[-2:]}
    )
    fields.draw_fields(tmp_path)
    fields.draw_samples(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"guidance-{what}.png" for what in (*guidance_study.TITLES, "fields", "samples")
    }


def test_the_mixture_s_classifiers_are_exact():
    """At clean data beside a component both classifiers name it; p(class 0) is its weight at pure noise."""
    x = fields.MEANS
    assert fields.class_of_x0(x, None).argmax(1).tolist() == [0, 0, 1, 1]
    assert fields.rarity_of(x[:2], fields.CLEAN).argmax(1).tolist() == [0, 1]
    noise = fields.PROCESS.schedule.at(float("-inf"))
    torch.testing.assert_close(
        fields.class_of(x, noise).double().softmax(1)[0, 0].item(), 0.5, rtol=1e-6, atol=0
    )


def test_guidance_by_a_classifier_of_noise_is_cfg_there():
    """∇ ln p(y | x) is the difference of the scores, so w of one is 1 + w of the other."""
    draw = partial(
        sample, fields.MIXTURE, grid=Karras(), steps=20, seeds=range(50), condition=[0] * 50
    )
    by_classifier, by_cfg, weaker = (
        draw(guidance=rule).x
        for rule in (ClassifierGuidance(fields.class_of, 2.0), CFG(3.0), CFG(2.5))
    )
    torch.testing.assert_close(by_classifier, by_cfg, rtol=0, atol=1e-3)
    assert not torch.allclose(weaker, by_cfg, atol=1e-2)
