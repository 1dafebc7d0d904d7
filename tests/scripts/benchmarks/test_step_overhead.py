"""Both sides of the comparison of steps do the same work; no times are tested."""

import pytest
import torch
from benchmarks.step_overhead import diffcore_loop, diffusers_loop, measure_steps


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_both_sides_make_the_same_samples(prediction):
    torch.testing.assert_close(
        diffcore_loop((3, 1, 8, 8), prediction)(),
        diffusers_loop((3, 1, 8, 8), prediction)(),
        rtol=2e-5,
        atol=2e-5,
    )


def test_the_bound_holds_for_small_tensors_and_few_pairs_are_refused():
    found = measure_steps(30, shapes=((1, 2), (1, 16_385)))
    assert [comparison.bound for comparison in found] == [0.5, 0.5, float("inf"), float("inf")]
    assert [len(comparison.ours) for comparison in found] == [30] * 4
    with pytest.raises(ValueError, match="pairs is 29"):
        measure_steps(29)
