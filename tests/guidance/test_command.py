"""Guidance on the command line: rules by name, runs by folder, evaluations in the report."""

import pytest

QUICK = (
    "--sampler=DDIM",
    "--grid=Trailing",
    "--steps=4",
    "--batch-size=2",
    "--labels=1,2",
    "--out=x.safetensors",
)
INTERVAL = ("--guidance", "Interval", "--guidance.inner", "APG", "--guidance.inner.scale", "4")
RAMP = ("--guidance.scale.noisy=1", "--guidance.scale.clean=3")
BOUNDS = ("--guidance.low", "0.19", "--guidance.high", "1.61")


def test_a_command_reports_the_evaluations_used_and_planned(diffcore, trained):
    """σ/α = inf, 2.4, 1.61, 1, 0.41, 0.19, 0: three of the six steps evaluate a reference."""
    ended = diffcore("sample", trained, *QUICK, *INTERVAL, *BOUNDS)
    assert ended.status == 0, ended.err
    assert "7 knots" in ended.out
    assert "2 samples of 9 network evaluations each, 9 planned" in ended.out
    assert "6 steps, Interval(inner=APG(scale=4.0" in ended.out


@pytest.mark.parametrize(
    ("arguments", "evaluations"),
    [
        (
            ("CFG", "--guidance.scale=LinearScale", *RAMP),
            7,
        ),
        (
            (
                "CFG",
                "--guidance.scale=2",
                "--guidance.reference=Label",
                "--guidance.reference.label=3",
            ),
            8,
        ),
        (("CFG", "--guidance.scale=2", "--guidance.reference=PerturbedAttention"), 8),
        (("Rescale", "--guidance.inner=CFG", "--guidance.inner.scale=3", "--guidance.phi=0.5"), 8),
        (("ComposedConditions", "--guidance.labels=[3,4]", "--guidance.weights=[1.0,-0.5]"), 16),
        (
            (
                "ComposedConditions",
                "--guidance.labels=[3]",
                "--guidance.weights=[1.0]",
                "--guidance.scale=CosineScale",
                *RAMP,
            ),
            12,
        ),
        (("CFGPlusPlus", "--guidance.scale=0.5"), 8),
        (("CFGPlusPlus",), 8),  # its own scale, and not the run's
        (("CFG",), 8),  # the run's
        (("APG",), 4),  # 1, its own
        (("CFGZeroStar", "--guidance.scale=3", "--guidance.zero-init=1"), 7),
    ],
    ids=str,
)
def test_rules_are_named_with_their_options(diffcore, trained, arguments, evaluations):
    """LinearScale begins at w = 1, where no reference is needed."""
    ended = diffcore("sample", trained, *QUICK, "--guidance", *arguments)
    assert ended.status == 0, ended.err
    assert f"of {evaluations} network evaluations each, {evaluations} planned" in ended.out


def test_a_weaker_network_is_named_by_the_folder_of_its_run(diffcore, trained):
    ended = diffcore(
        "sample",
        trained,
        *QUICK,
        "--guidance=AutoGuidance",
        "--guidance.scale=2",
        f"--guidance.weaker={trained}",
    )
    assert ended.status == 0, ended.err
    assert "2 samples of 8 network evaluations" in ended.out
    assert f"WeakerNetwork({trained})" in ended.out


def test_a_classifier_is_named_by_its_import_path_once_its_module_is_trusted(
    diffcore, trained, tmp_path
):
    (tmp_path / "here" / "my_classifier.py").write_text(
        "def logits(x, level):\n    return x.flatten(1)[:, :10]\n"
    )
    line = (
        "--guidance=ClassifierGuidance",
        "--guidance.classifier=my_classifier.logits",
        "--guidance.scale=2",
    )
    ended = diffcore("sample", trained, *QUICK, "--trust=my_classifier", *line)
    assert ended.status == 0, ended.err
    assert "2 samples of 4 network evaluations" in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (*INTERVAL, "--guidance.low=2", "--guidance.high=1"),
            ("low and high are 2.0 and 1.0", "swap"),
        ),
        (
            ("--guidance=Rescale", "--guidance.inner=CFGPlusPlus"),
            ("cannot hold CFGPlusPlus", "use CFG"),
        ),
        (
            ("--guidance=AutoGuidance", "--guidance.weaker=nowhere"),
            ("nowhere", "not a run's folder"),
        ),
        (
            ("--guidance=CFGPlusPlus", "--guidance.scale=0.5", "--sampler=AlphaBlending"),
            ("first-order", "DDIM"),
        ),
        (("--guidance=CFG", "--guidance.scale=.nan"), ("scale is nan",)),
        (("--guidance=CFG", "--guidance.scale=-1"), ("scale is -1",)),
        (("--guidance=CFG", "--guidance.reference=3"), ("reference", "import path")),
        (("--guidance=Interval", "--guidance.inner=3"), ("inner", "import path")),
        (
            (
                "--guidance=Rescale",
                "--guidance.inner=CFG",
                "--guidance.inner.scale=2",
                "--guidance.space=epsilon",
            ),
            ("λ = -inf",),
        ),
    ],
    ids=str,
)
def test_refusals_are_one_line(diffcore, trained, arguments, words):
    ended = diffcore("sample", trained, *QUICK, *arguments)
    assert ended.status in (1, 2)
    assert all(word in ended.err for word in words), ended.err
    assert len(ended.err.strip().splitlines()) == 1
