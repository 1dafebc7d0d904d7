"""The study of guidance: measurements, counts, tables, and pictures."""

from functools import partial

import pytest
import torch
from experiments import guidance as guidance_study
from experiments import guidance_fields as fields
from experiments.guidance import (
    ADAPTIVE,
    CONDITIONAL,
    RULES,
    NetworkPair,
    count_references,
    draw,
    format_savings,
    format_table,
    measure,
    measure_quality,
    run_study,
    shared_count,
    train_pair,
    values_of,
)
from experiments.study import read_measurements
from experiments.training import digits_unet

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
    return Denoiser(digits_unet(), PROCESS).eval()


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


def test_real_scans_have_distance_zero_and_are_recognised():
    digits = Digits("train")
    at_bounds = digits.x0.abs() == 1
    found = measure_quality(
        digits.x0 * (1 + at_bounds), digits.labels
    )  # beyond the bounds, and clamped before they are compared
    assert found["train"] == pytest.approx(0, abs=1e-6)
    assert found["recognised"] > 0.99
    assert found["saturation"] == found["excess"] == pytest.approx(float(at_bounds.float().mean()))


def test_a_batch_needs_the_largest_count_of_its_samples():
    counts = torch.tensor([1, 2, 3, 4, 0, 0])
    assert [shared_count(counts, size) for size in (1, 2, 4, 6)] == [
        10 / 6,
        2.0,
        (4 * 4 + 2 * 0) / 6,
        4.0,
    ]


@pytest.mark.parametrize("threshold", (0.2, 0.6, 1.0))
def test_counted_references_are_those_of_sampling(threshold, denoiser, monkeypatch):
    """Counts of each sample alone, against sampling with one sample in a batch and with all."""
    monkeypatch.setattr(guidance_study, "STEPS", 4)
    rule, seeds, labels = AdaptiveGuidance(CFG(3.0), threshold), [5, 6, 7], torch.tensor([1, 2, 3])
    counts = count_references(denoiser, rule, torch.tensor(seeds), labels)
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
        assert made.evaluations == pytest.approx(4 + shared_count(counts, size))


def test_a_measurement_counts_evaluations_by_batch(denoiser, monkeypatch):
    monkeypatch.setattr(guidance_study, "STEPS", 2)
    monkeypatch.setattr(guidance_study, "BATCHES", (1, 4))
    plain = measure(denoiser, CFG(2.0), 0, 4)
    assert plain["evaluations"] == {"1": 4.0, "4": 4.0}
    adaptive = measure(denoiser, AdaptiveGuidance(CFG(2.0), -0.99), 0, 4)
    assert adaptive["evaluations"] == {"1": 3.0, "4": 3.0}  # all agree at once
    assert adaptive["test"] > 0


@pytest.mark.slow
def test_the_weaker_network_is_smaller_and_depends_on_its_own_steps():
    pairs = [train_pair(0, points) for points in ((1, 2), (1, 2), (2, 2))]
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


def test_a_study_continues_its_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(guidance_study, "train_pair", lambda seed: NetworkPair(seed, None))
    monkeypatch.setattr(guidance_study, "RULES", {"CFG": lambda w, weaker: CFG(w)})
    monkeypatch.setattr(
        guidance_study, "measure", lambda *cell: calls.append(cell) or {"test": 1.0}
    )
    out = tmp_path / "guidance.jsonl"
    assert len(list(run_study(out, [0], (1.0, 2.0), 10))) == 2
    assert len(list(run_study(out, [0, 1], (1.0, 2.0, 3.0), 10))) == 4
    assert [(rule.scale, seed) for _, rule, seed, _ in calls] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert read_measurements(out)[0] == {"rule": CONDITIONAL, "scale": 1.0, "seed": 0, "test": 1.0}


def example_measurements():
    """Two seeds at two scales; AdaptiveGuidance saves a quarter in batches of 1, nothing at 100."""
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
    measured = list(example_measurements())
    lines = format_table(measured, "test").splitlines()
    assert lines[0] == "| rule | w = 1 | w = 2 |"
    assert lines[2:] == [f"| {name} | 10.5 ± 0.5 | 10.5 ± 0.5 |" for name in RULES]
    assert values_of(measured, ADAPTIVE, 2.0, "evaluations", 1) == [30.0, 30.0]
    line = "| 2 | 40 | 30.0 (-25%) | 35.0 (-12%) | 40.0 (-0%) | 10.5 ± 0.5 | 10.5 ± 0.5 |"
    assert format_savings(measured).splitlines()[2] == line


def test_tables_leave_out_missing_measurements(tmp_path):
    measured = [row for row in example_measurements() if row["rule"] in (CONDITIONAL, "CFG")]
    assert format_table(measured, "test").splitlines()[2:4] == [
        "| CFG | 10.5 ± 0.5 | 10.5 ± 0.5 |",
        "| Rescale(CFG) | 10.5 ± 0.5 |  |",
    ]
    assert len(format_savings(measured).splitlines()) == 2
    draw(measured, tmp_path)


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path, monkeypatch):
    draw(list(example_measurements()), tmp_path)
    monkeypatch.setattr(fields, "COUNT", 4)
    monkeypatch.setattr(fields, "STEPS", 3)
    monkeypatch.setattr(
        fields, "PANELS", {name: fields.PANELS[name] for name in list(fields.PANELS)[-2:]}
    )
    fields.draw_fields(tmp_path / "guidance-fields.png")
    fields.draw_samples(tmp_path / "guidance-samples.png")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"guidance-{what}.png" for what in (*guidance_study.TITLES, "fields", "samples")
    }


def test_the_classifiers_of_the_mixture_are_exact():
    """Clean data belongs to the nearest component; p(class 0) is its weight at pure noise."""
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
