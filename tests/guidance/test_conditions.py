"""Guidance by the names of conditions, on a network whose output is known for each set of them."""

import pytest
import torch
from torch import nn

from diffcore.core.conditions import ConditionRecord, batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.guidance import CFG, Label, ScaledConditions, Sum, Unconditional, Without
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import check_guidance, guided_prediction

IMAGE = ConditionRecord((1, 2, 2), dropout=0.1)
STYLE = ConditionRecord((1,))  # never dropped
PROCESS = Process(
    shape=(1, 2, 2), prediction="sample", classes=2, dropout=0.1, conditions={"image": IMAGE}
)
X = torch.zeros(3, 1, 2, 2)
LABELS = torch.tensor([0, 1, 0])
IMAGES = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
LEVEL = PROCESS.schedule.level(0.5)


class Table(nn.Module):
    """Another number for each set of conditions, which is no sum of their effects."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, x, time, class_labels, image, style=None):
        self.rows += len(x)
        label, style = (
            class_labels.view(-1, 1, 1, 1),
            0 if style is None else style[..., None, None],
        )
        return (label + 1) * (image + 2) ** 2 + style + torch.zeros_like(x)


def predict(rule, process=PROCESS, **values):
    network = Table()
    given = batch_condition(process, LABELS, {"image": IMAGES} | values)
    prediction, _, count = guided_prediction(
        Denoiser(network, process), rule, X, LEVEL, given, None
    )
    assert network.rows == count * len(X)
    return prediction.x0, count


def value(label, image):
    return (label + 1) * (image + 2) ** 2


BOTH = value(LABELS.view(-1, 1, 1, 1), IMAGES)
IMAGE_ONLY, LABEL_ONLY = value(2, IMAGES), value(LABELS.view(-1, 1, 1, 1), 0 * IMAGES)
NEITHER = value(2, 0 * IMAGES)


def test_two_scales_are_those_of_instruct_pix2pix():
    guided, count = predict(ScaledConditions(("image", "label"), (1.5, 7.5)))
    # StableDiffusionInstructPix2PixPipeline of diffusers: text 7.5, image 1.5
    expected = NEITHER + 7.5 * (BOTH - IMAGE_ONLY) + 1.5 * (IMAGE_ONLY - NEITHER)
    assert torch.allclose(guided, expected, rtol=1e-5)
    assert count == 3


def test_the_order_of_the_conditions_matters():
    guided, _ = predict(ScaledConditions(("label", "image"), (7.5, 1.5)))
    expected = NEITHER + 7.5 * (LABEL_ONLY - NEITHER) + 1.5 * (BOTH - LABEL_ONLY)
    assert torch.allclose(guided, expected, rtol=1e-5)


def test_predictions_without_effect_are_not_evaluated():
    guided, count = predict(ScaledConditions(("image", "label"), (3.0, 3.0)))
    assert count == 2
    assert torch.allclose(guided, predict(CFG(3.0))[0], rtol=1e-5)
    guided, count = predict(ScaledConditions(("image", "label"), (1.0, 4.0)))
    assert count == 2
    assert torch.allclose(guided, IMAGE_ONLY + 4 * (BOTH - IMAGE_ONLY), rtol=1e-5)
    guided, count = predict(ScaledConditions(("image", "label"), (1.0, 1.0)))
    assert count == 1
    assert torch.equal(guided, BOTH)


def test_a_reference_without_one_condition_keeps_the_others():
    assert torch.allclose(
        predict(CFG(2.0, Without(("label",))))[0], IMAGE_ONLY + 2 * (BOTH - IMAGE_ONLY)
    )
    assert torch.allclose(
        predict(CFG(2.0, Without(("image",))))[0], LABEL_ONLY + 2 * (BOTH - LABEL_ONLY)
    )
    assert torch.allclose(predict(CFG(2.0, Unconditional()))[0], NEITHER + 2 * (BOTH - NEITHER))


def test_another_label_keeps_the_named_conditions():
    expected = value(1, IMAGES)
    assert torch.allclose(predict(CFG(2.0, Label(1)))[0], expected + 2 * (BOTH - expected))


def test_rules_of_different_conditions_can_be_summed():
    rule = Sum((CFG(2.0, Without(("label",))), CFG(3.0, Without(("image",)))))
    guided, count = predict(rule)
    assert torch.allclose(guided, BOTH + (BOTH - IMAGE_ONLY) + 2 * (BOTH - LABEL_ONLY))
    assert count == 3


def test_a_condition_that_training_never_dropped_is_always_kept():
    process = Process(
        shape=(1, 2, 2), prediction="sample", classes=2, dropout=0.1,
        conditions={"image": IMAGE, "style": STYLE},
    )  # fmt: skip
    guided, _ = predict(CFG(2.0), process, style=torch.full((3, 1), 5.0))
    assert torch.allclose(guided, 5 + NEITHER + 2 * (BOTH - NEITHER))


@pytest.mark.parametrize(
    "rule, message",
    [
        (CFG(2.0, Without(("colour",))), "'colour', but this network has label, image, style"),
        (CFG(2.0, Without(("style",))), "needs a prediction without the condition style"),
        (ScaledConditions(("style",), (2.0,)), "needs a prediction without the condition style"),
        (ScaledConditions(("colour",), (1.0,)), "refers to the condition 'colour'"),
    ],
)
def test_a_reference_needs_conditions_that_were_dropped(rule, message):
    process = Process(
        shape=(1, 2, 2), classes=2, dropout=0.1, conditions={"image": IMAGE, "style": STYLE}
    )
    with pytest.raises(ValueError, match=message):
        check_guidance(process, (LEVEL, process.schedule.level(0.1)), {"style": [0]}, rule, None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Without(()), "names are"),
        (lambda: Without(("a", "a")), "expected different names"),
        (lambda: ScaledConditions((), ()), "expected one scale for each condition"),
        (lambda: ScaledConditions(("a",), (1.0, 2.0)), "expected one scale for each condition"),
        (lambda: ScaledConditions(("a", "a"), (1.0, 2.0)), "expected different names"),
        (lambda: ScaledConditions(("a",), (-1.0,)), "scale is -1.0"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samples_are_functions_of_their_own_conditions():
    denoiser = Denoiser(Table(), PROCESS)
    rule = ScaledConditions(("image", "label"), (1.5, 2.0))
    options = {"steps": 3, "guidance": rule, "batch_size": 2, "micro_batch": 2}
    condition = {"label": LABELS, "image": IMAGES}
    together = sample(denoiser, seeds=[4, 5, 6], condition=condition, **options).x
    alone = {"label": LABELS[1:2], "image": IMAGES[1]}
    assert torch.equal(sample(denoiser, seeds=[5], condition=alone, **options).x[0], together[1])
    other = {"label": LABELS, "image": IMAGES + 1}
    assert not torch.equal(
        sample(denoiser, seeds=[4, 5, 6], condition=other, **options).x, together
    )


@pytest.mark.parametrize(
    "condition, message",
    [
        ({"colour": [1.0]}, "no condition 'colour', expected image"),
        ({"image": torch.zeros(1, 3, 3)}, r"shape \(1, 3, 3\)"),
        ({"label": [0, 0]}, "one label for each of 1 seeds"),
        ({"label": [7]}, r"labels \[7\] are out of range"),
        (batch_condition(PROCESS, LABELS, {"image": IMAGES}), "has 3 samples .* expected 1"),
    ],
)
def test_conditions_are_checked_before_the_first_step(condition, message):
    with pytest.raises(ValueError, match=message):
        sample(Denoiser(Table(), PROCESS), seeds=[0], condition=condition)


def test_guidance_needs_some_condition():
    with pytest.raises(ValueError, match="needs a condition to strengthen"):
        sample(Denoiser(Table(), PROCESS), seeds=[0], condition={}, guidance=CFG(2.0))
