"""The process for samples of another size: conditions that are images of x_0 keep their ratio."""

import pytest

from diffcore.core.conditions import ConditionRecord
from diffcore.core.process import Process


def process(**records):
    return Process(shape=(4, 8, 8), conditions=records)


def test_an_image_keeps_its_ratio_to_x0_and_other_conditions_keep_their_shapes():
    whole = process(
        control=ConditionRecord((3, 64, 64)),
        low=ConditionRecord((4, 2, 2), absent="null", null=(1.0,)),
        style=ConditionRecord((16,)),
        tokens=ConditionRecord((77, 32)),
        strip=ConditionRecord((3, 8, 4)),
    )
    resized = whole.resized((4, 4, 12))
    assert resized.shape == (4, 4, 12)
    shapes = {name: record.shape for name, record in resized.conditions.items()}
    assert shapes == {
        "control": (3, 32, 96),
        "low": (4, 1, 3),
        "style": (16,),
        "tokens": (77, 32),
        "strip": (3, 8, 4),
    }
    assert resized.conditions["low"].null == (1.0,)
    assert resized.resized((4, 8, 8)) == whole
    assert whole.resized((4, 8, 8)) is whole


def test_a_size_without_a_whole_number_of_pixels_and_a_null_image_are_refused():
    with pytest.raises(ValueError, match=r"low of shape \(4, 2, 2\) .* 6 x 8, .* are 1/4 of"):
        process(low=ConditionRecord((4, 2, 2))).resized((4, 6, 8))
    null = ConditionRecord((1, 8, 8), absent="null", null=(0.5,) * 64)
    with pytest.raises(ValueError, match="its null value has one number for each element"):
        process(mask=null).resized((4, 4, 8))
